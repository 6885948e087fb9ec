
"use strict";
(() => {
  const buttons = [...document.querySelectorAll("button[data-layer]")];
  const galleries = document.getElementById("galleries");
  const flip = document.querySelector("button[data-flip]");
  if (!galleries || !flip) return;

  const isShown = (layer) => !galleries.classList.contains("no-" + layer);
  const show = (layer, on) => {
    galleries.classList.toggle("no-" + layer, !on);
    for (const button of buttons) {
      if (button.dataset.layer === layer) button.setAttribute("aria-pressed", String(on));
    }
  };
  const toggle = (layer) => show(layer, !isShown(layer));
  // From both to before alone, and from then on from one to the other.
  const turn = () => {
    const before = !(isShown("before") && !isShown("after"));
    show("before", before);
    show("after", !before);
  };

  for (const button of buttons) button.addEventListener("click", () => toggle(button.dataset.layer));
  flip.addEventListener("click", turn);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const key = event.key.toLowerCase();
    const layer = { t: "truth", b: "before", a: "after" }[key];
    if (layer) toggle(layer);
    else if (key === "f") turn();
  });
})();
