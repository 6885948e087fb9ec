"""Files that try to run code: each touches a marker if anything that it names is called.

An attack is a function from a :class:`Place` to the words of a command; it writes its files and says what the command
must answer.
"""

from __future__ import annotations

import builtins
import gzip
import json
import os
import pickle
import re
import subprocess
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.kit.needs import needs_package
from tests.kit.toys import make_dataset


@dataclass(frozen=True)
class Place:
    """A folder with images, a detector in a Python file, which is code, and a marker that nothing may touch."""

    folder: Path

    @property
    def marker(self) -> Path:
        return self.folder.parent / "touched"

    def data(self, ann: str = "images/annotation.json") -> list[str]:
        return ["--ann", ann, "--images", "images"]

    def dump(self, detector: str, *words: str) -> list[str]:
        return ["dump", "--detector", detector, *self.data(), "-o", "out.json", *words]

    def train(self, *words: str) -> list[str]:
        return ["train", "--detector", "mine.py:detector", *self.data(), "--epochs", "1", *words]


def make_place(folder: Path) -> Place:
    folder.mkdir()
    make_dataset(folder / "images", 3)
    code = f"""
        from pathlib import Path
        from tests.kit.toys import make_dataset

        def detector():
            return make_dataset(Path({str(folder / "again")!r}), 3)[1]
    """
    (folder / "mine.py").write_text(textwrap.dedent(code))
    return Place(folder)


# --- payloads --------------------------------------------------------------------------------------------------------


class Payload:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def payloads(marker: Path) -> dict[str, Payload]:
    path = str(marker)
    return {
        "os.system": Payload(os.system, f"touch {path}"),
        "eval": Payload(builtins.eval, f"open({path!r}, 'w').close()"),
        "exec": Payload(builtins.exec, f"open({path!r}, 'w').close()"),
        "open": Payload(open, path, "w"),
        "subprocess": Payload(subprocess.call, ["touch", path]),
        "Path.touch": Payload(Path.touch, Path(path)),
    }


def tags(marker: Path) -> dict[str, str]:
    """Values of YAML that call something."""
    path = str(marker)
    return {
        "apply": f'!!python/object/apply:os.system ["touch {path}"]',
        "list": f"!!python/object/apply:subprocess.check_call [[touch, {path}]]",
        "eval": f"!!python/object/apply:eval [\"open('{path}', 'w').close()\"]",
        "kwds": f'!!python/object/apply:subprocess.call {{args: [[touch, "{path}"]]}}',
        "long": f'!<tag:yaml.org,2002:python/object/apply:os.system> ["touch {path}"]',
    }


def torch_saved(path: Path, value: Any, kind: str) -> None:
    """As torch saves: its archive, the form it had before, or a bare pickle."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value, protocol=4))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "archive")


# --- what a command must answer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    name: str
    make: Callable[[Place], list[str]]
    code: int | tuple[int, ...] = 3
    says: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


def detectron2_config(folder: Path) -> None:
    from tests.adapters.cases_detectron2 import R_CNN, tiny_config

    (folder / "c.yaml").write_text(tiny_config(R_CNN).dump())


def detectron2_weights(name: str, payload: str, protocol: int = 2, wrap: Callable[[Any], Any] = lambda p: p) -> Attack:
    def make(place: Place) -> list[str]:
        detectron2_config(place.folder)
        content = pickle.dumps(wrap(payloads(place.marker)[payload]), protocol=protocol)
        (place.folder / name).write_bytes(content)
        return place.dump(f"detectron2:c.yaml:{name}")

    shape = getattr(wrap, "__name__", "").strip("<>").replace("lambda", "bare")
    return Attack(f"detectron2-{name}-{payload}-{protocol}-{shape}", make, says=(name, "IOU_REFINER_TRUST_PICKLES"))


def detectron2_torch(name: str, kind: str) -> Attack:
    def make(place: Place) -> list[str]:
        detectron2_config(place.folder)
        payload = payloads(place.marker)["os.system"]
        torch_saved(place.folder / name, {"model": {"a": torch.ones(2)}, "extra": payload}, kind)
        return place.dump(f"detectron2:c.yaml:{name}")

    return Attack(f"detectron2-{name}-{kind}", make, says=(name, "system", "IOU_REFINER_TRUST_PICKLES"))


def detectron2_tag(tag: str, base: str = "") -> Attack:
    def make(place: Place) -> list[str]:
        needs_package("yaml")
        from tests.adapters.cases_detectron2 import tiny_config

        tiny_config()
        evil = f"MODEL:\n  WEIGHTS: {tags(place.marker)[tag]}\n"
        (place.folder / ("inner.yaml" if base else "c.yaml")).write_text(evil)
        if base:
            (place.folder / "c.yaml").write_text(f"_BASE_: {base}\nMODEL: {{}}\n")
        return place.dump("detectron2:c.yaml")

    return Attack(f"detectron2-yaml-{tag}-{base}", make, says=("c.yaml", "!!python/object", "file.py:function"))


def mmdet_weights(name: str, kind: str) -> Attack:
    def make(place: Place) -> list[str]:
        from tests.adapters.cases_mmdet import small_config

        small_config("retinanet").dump(place.folder / "c.py")
        value = {"state_dict": {}, "meta": payloads(place.marker)["exec"]}
        torch_saved(place.folder / name, value, kind)
        return place.dump(f"mmdet:c.py:{name}")

    return Attack(f"mmdet-{name}-{kind}", make, says=(name, "exec", "IOU_REFINER_TRUST_PICKLES"))


def mmdet_config(name: str) -> Attack:
    def make(place: Place) -> list[str]:
        from tests.adapters.cases_mmdet import import_mmdet

        import_mmdet()
        text = f"model: {tags(place.marker)['apply']}\n"
        if name.endswith(".json"):
            (place.folder / "base.yaml").write_text(text)
            text = json.dumps({"_base_": "base.yaml", "model": {}})
        (place.folder / name).write_text(text)
        return place.dump(f"mmdet:{name}")

    return Attack(f"mmdet-{name}", make, says=(name, "CONFIG.py"))


def torchvision_cached(kind: str) -> Attack:
    """Weights that somebody exchanged in the folder where torch keeps its downloads."""

    def make(place: Place) -> list[str]:
        models = needs_package("torchvision.models")
        name = "ssdlite320_mobilenet_v3_large"
        kept = place.folder / "hub" / "checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
        kept.parent.mkdir(parents=True)
        torch_saved(kept, {"a": payloads(place.marker)["Path.touch"]}, kind)
        return place.dump(f"torchvision:{name}")

    return Attack(
        f"torchvision-{kind}", make, says=("ssdlite320", "IOU_REFINER_TRUST_PICKLES"), env={"TORCH_HOME": "."}
    )


def saved_detr(place: Place) -> tuple[Any, Path]:
    from tests.adapters.cases_transformers import detr, perturbed

    transformers = needs_package("transformers")
    config, processor = detr(transformers, "Detr", ["stage4"])
    model, folder = perturbed(transformers, config, 0), place.folder / "detr"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, folder


def transformers_weights(kind: str) -> Attack:
    def make(place: Place) -> list[str]:
        model, folder = saved_detr(place)
        (folder / "model.safetensors").unlink()
        value = dict(model.state_dict()) | {"x": payloads(place.marker)["os.system"]}
        torch_saved(folder / "pytorch_model.bin", value, kind)
        return place.dump("transformers:detr")

    return Attack(f"transformers-bin-{kind}", make, says=("detr",))


def transformers_code(file: str, key: str) -> Attack:
    """A Python file beside the weights, which the config asks to be run."""

    def make(place: Place) -> list[str]:
        _, folder = saved_detr(place)
        (folder / "evil.py").write_text(f"open({str(place.marker)!r}, 'w').close()\n")
        about = json.loads((folder / file).read_text()) | {"auto_map": {key: "evil.Evil"}}
        for name in ("model_type", "image_processor_type", "architectures"):
            about.pop(name, None)
        (folder / file).write_text(json.dumps(about))
        return place.dump("transformers:detr")

    # An image processor of transformers may take the place of the one that is not run.
    return Attack(f"transformers-{key}", make, code=(0, 3) if key == "AutoImageProcessor" else 3)


def transformers_kernels(place: Place) -> list[str]:
    _, folder = saved_detr(place)
    about = json.loads((folder / "config.json").read_text()) | {"attn_implementation": "somebody/kernels"}
    (folder / "config.json").write_text(json.dumps(about))
    return place.dump("transformers:detr")


def yolox_with(location: str, *, link: bool = False, inner: bool = False, length: int | None = None) -> Any:
    """A graph that keeps a tensor outside its folder; ``inner``: one in a node, not in the list of the graph."""

    def make(place: Place) -> list[str]:
        onnx = needs_package("onnx")
        from tests.adapters.onnx_graphs import tiny_yolox

        model = tiny_yolox()
        tensor = model.graph.initializer[0]
        secret = place.folder.parent / "secret"
        secret.write_bytes(tensor.raw_data)
        if link:
            (place.folder / "linked").symlink_to(secret)
        if inner:
            node = onnx.helper.make_node("Constant", [], ["unused"], value=onnx.numpy_helper.from_array(np.ones(3)))
            model.graph.node.append(node)
            tensor = model.graph.node[-1].attribute[0].t
        onnx.external_data_helper.set_external_data(tensor, location.format(secret=secret), length=length)
        tensor.ClearField("raw_data")
        (place.folder / "m.onnx").write_bytes(model.SerializeToString())
        return place.dump("onnx:m.onnx")

    return make


def onnx_file(content: Callable[[Place], bytes]) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        needs_package("onnx")
        (place.folder / "m.onnx").write_bytes(content(place))
        return place.dump("onnx:m.onnx")

    return make


def custom_operator(place: Place) -> bytes:
    from tests.adapters.onnx_graphs import tiny_yolox

    model = tiny_yolox()
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.domain, node.op_type = "evil", "Evil"
    return model.SerializeToString()


def layout(text: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        needs_package("onnx")
        from tests.adapters.onnx_graphs import tiny_yolox

        (place.folder / "m.onnx").write_bytes(tiny_yolox().SerializeToString())
        (place.folder / "m.layout.json").write_text(text)
        return place.dump("onnx:m.onnx")

    return make


def head_file(name: str, kind: str, command: str) -> Attack:
    def make(place: Place) -> list[str]:
        torch_saved(place.folder / name, {"w": payloads(place.marker)["os.system"]}, kind)
        if command == "info":
            return ["info", name]
        (place.folder / "dets.json").write_text("[]")
        words = ["--head", name, "--detector", "mine.py:detector", "-o", "out.json"]
        return ["rescore", "dets.json", *words, *place.data()]

    return Attack(f"head-{name}-{kind}-{command}", make, says=(name,))


def head_text(place: Place) -> list[str]:
    """A head file whose description is text that would run if anything evaluated it."""
    about = f"__import__('os').system('touch {place.marker}')"
    safetensors.torch.save_file({"w": torch.ones(1)}, place.folder / "h.safetensors", {"iou_refiner": about})
    return ["info", "h.safetensors"]


def last(kind: str) -> Attack:
    def make(place: Place) -> list[str]:
        (place.folder / "out").mkdir()
        torch_saved(place.folder / "out" / "last.pt", {"settings": payloads(place.marker)["os.system"]}, kind)
        return place.train("-o", "out", "--resume")

    return Attack(f"last.pt-{kind}", make, says=("last.pt",))


def cache_label(place: Place) -> list[str]:
    (place.folder / "cache").mkdir()
    (place.folder / "cache" / "cache.json").write_bytes(pickle.dumps(payloads(place.marker)["os.system"]))
    return place.dump("mine.py:detector", "--cache", "cache")


def cache_entries(place: Place) -> list[str]:
    """All entries are exchanged; they are none any more, so the images are seen anew, or refused."""
    from iou_refiner import cli

    with pytest.raises(SystemExit) as done:
        cli.main(place.dump("mine.py:detector", "--cache", "cache"))
    assert done.value.code == 0
    entries = list((place.folder / "cache").rglob("*.safetensors"))
    assert len(entries) >= 3
    for path in entries:
        path.write_bytes(pickle.dumps(payloads(place.marker)["os.system"]))
    return place.dump("mine.py:detector", "--cache", "cache", "--overwrite")


def instead_of_json(name: str, command: list[str], packed: bool = False) -> Attack:
    def make(place: Place) -> list[str]:
        content = pickle.dumps(payloads(place.marker)["eval"], protocol=0)
        (place.folder / name).write_bytes(gzip.compress(content) if packed else content)
        return command

    return Attack(f"json-{name}-{command[0]}", make, says=(name,))


def config_file(tag: str) -> Attack:
    def make(place: Place) -> list[str]:
        needs_package("yaml")
        (place.folder / "c.yaml").write_text(f"validate:\n  max-examples: {tags(place.marker)[tag]}\n")
        (place.folder / "dets.json").write_text("[]")
        return ["validate", "dets.json", "--config", "c.yaml"]

    return Attack(f"config-{tag}", make, code=(2, 3), says=("c.yaml",))


def settings_file(name: str, text: str) -> Attack:
    def make(place: Place) -> list[str]:
        (place.folder / name).write_text(text.replace("MARKER", str(place.marker)))
        (place.folder / "dets.json").write_text("[]")
        return ["validate", "dets.json", "--config", name]

    return Attack(f"config-{name}", make, code=(2, 3))


def slipping(place: Place) -> list[str]:
    """A checkpoint whose entries would lie outside of any folder it is unpacked into."""
    detectron2_config(place.folder)
    with zipfile.ZipFile(place.folder / "w.pth", "w") as archive:
        archive.writestr("../../touched", "x")
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/version", "3\n")
        archive.writestr(str(place.marker), "x")
    return place.dump("detectron2:c.yaml:w.pth")


def image_is_a_pickle(place: Place) -> list[str]:
    (place.folder / "images" / "1.png").write_bytes(pickle.dumps(payloads(place.marker)["os.system"]))
    return place.dump("mine.py:detector")


def image_is_an_array(place: Place) -> list[str]:
    with open(place.folder / "images" / "1.png", "wb") as stream:
        np.save(stream, np.array([payloads(place.marker)["os.system"]], object), allow_pickle=True)
    return place.dump("mine.py:detector")


def text_in_names(place: Place) -> list[str]:
    """Names with what shells, templates and Python would run: they are names, and all is well."""
    path = place.folder / "images" / "annotation.json"
    truth = json.loads(path.read_text())
    truth["categories"][0]["name"] = f"$(touch {place.marker}) `touch {place.marker}` {{{{7*7}}}} __import__('os')"
    path.write_text(json.dumps(truth))
    return place.dump("mine.py:detector")


def spec_is_text(spec: str) -> Attack:
    """A detector that is named like code, but names no module, file or function."""

    def make(place: Place) -> list[str]:
        return place.dump(spec.replace("MARKER", str(place.marker)))

    return Attack(f"spec-{re.sub(r'[^a-z]+', '-', spec.lower())}", make, says=("--detector",))


def in_model(payload: Payload) -> Any:
    return {"model": {"w": payload}, "__author__": "me"}


def in_array(payload: Payload) -> Any:
    return {"model": {"w": np.array([payload], object)}, "__author__": "me"}


def as_key(payload: Payload) -> Any:
    return {"model": [("w", payload)], "__author__": "me"}


OUTSIDE = ("m.onnx", "outside the folder")
ATTACKS = [
    *(detectron2_weights("w.pkl", payload) for payload in payloads(Path("x"))),
    *(detectron2_weights("w.pkl", "os.system", protocol) for protocol in (0, 4, 5)),
    *(detectron2_weights("w.pkl", "exec", 4, wrap) for wrap in (in_model, in_array, as_key)),
    *(detectron2_torch(name, kind) for name in ("w.pth", "w.bin") for kind in ("archive", "old", "pickle")),
    detectron2_torch("w.pyth", "archive"),
    Attack("detectron2-slipping", slipping, says=("w.pth",)),
    *(detectron2_tag(tag) for tag in tags(Path("x"))),
    *(detectron2_tag("apply", base) for base in ("inner.yaml", "[inner.yaml]", "./inner.yaml")),
    *(mmdet_weights(name, kind) for name in ("w.pth", "w.pkl") for kind in ("archive", "old", "pickle")),
    *(mmdet_config(name) for name in ("c.yaml", "c.yml", "c.json")),
    *(torchvision_cached(kind) for kind in ("archive", "old", "pickle")),
    *(transformers_weights(kind) for kind in ("archive", "old", "pickle")),
    transformers_code("config.json", "AutoConfig"),
    transformers_code("config.json", "AutoModelForObjectDetection"),
    transformers_code("preprocessor_config.json", "AutoImageProcessor"),
    Attack("transformers-kernels", transformers_kernels, says=("config.json", "somebody/kernels")),
    Attack("onnx-parent", yolox_with("../secret"), says=OUTSIDE),
    Attack("onnx-absolute", yolox_with("{secret}"), says=OUTSIDE),
    Attack("onnx-around", yolox_with("images/../../secret"), says=OUTSIDE),
    Attack("onnx-link", yolox_with("linked", link=True), says=OUTSIDE),
    Attack("onnx-windows", yolox_with("C:\\secret"), says=OUTSIDE),
    Attack("onnx-in-a-node", yolox_with("../secret", inner=True), says=OUTSIDE),
    Attack("onnx-no-file", yolox_with("absent"), says=("m.onnx", "absent")),
    Attack("onnx-folder", yolox_with("images"), says=("m.onnx", "images")),
    Attack("onnx-length", yolox_with("mine.py", length=2**40), says=("m.onnx", "2 GB")),
    Attack("onnx-pickle", onnx_file(lambda p: pickle.dumps(payloads(p.marker)["exec"])), says=("m.onnx",)),
    Attack("onnx-operator", onnx_file(custom_operator), says=("m.onnx", "libraries of others are not loaded")),
    *(
        Attack(f"layout-{number}", layout(text), says=("m.layout.json", *says))
        for number, (text, *says) in enumerate(
            [
                ('{"scale": NaN}', "NaN"),
                ('{"mean": [0, 0, -Infinity]}', "Infinity"),
                ('{"pad_value": 1e999}', "pad_value"),
                ('{"mean": [1e999, 0, 0]}', "mean"),
                ('{"std": [1, 1, 0]}', "std[2]"),
                ('{"strides": [8, -16, 32]}', "strides[1]"),
                ('{"input_size": [1000000, 64]}', "input_size", "16384"),
                ('{"input_size": [-64, 64]}', "input_size[0]"),
                ('{"category_ids": [-1, 2]}', "category_ids"),
                ('{"category_ids": [1, 99999999999999999999999]}', "category_ids"),
                ('{"scale": 1' + "0" * 400 + "}",),
                ("[" * 100_000,),
                (" " * 2_000_000, "1,000,000 bytes"),
                ("cos\nsystem\n(S'touch x'\ntR.", "JSON"),
            ]
        )
    ),
    *(head_file("h.safetensors", kind, command) for kind in ("archive", "pickle") for command in ("info", "rescore")),
    head_file("h.pt", "old", "info"),
    head_file("h.pt", "old", "rescore"),
    Attack("head-text", head_text, says=("h.safetensors",)),
    *(last(kind) for kind in ("archive", "old", "pickle")),
    Attack("cache-label", cache_label, says=("cache",)),
    Attack("cache-entries", cache_entries, code=(0, 3)),
    instead_of_json("d.json", ["validate", "d.json"]),
    instead_of_json("d.json.gz", ["validate", "d.json.gz"], packed=True),
    instead_of_json("d.json", ["eval", "d.json", "--ann", "images/annotation.json"]),
    instead_of_json("a.json", ["validate", "images/annotation.json", "--ann", "a.json"]),
    *(config_file(tag) for tag in tags(Path("x"))),
    settings_file("c.toml", "x = !!python/object/apply:os.system ['touch MARKER']\n"),
    settings_file("c.json", '{"validate": __import__("os").system("touch MARKER")}'),
    Attack("image-pickle", image_is_a_pickle, says=("1.png",)),
    Attack("image-array", image_is_an_array, says=("1.png",)),
    Attack("names", text_in_names, code=0),
    spec_is_text("__import__('os').system('touch MARKER')"),
    spec_is_text("$(touch MARKER)"),
    spec_is_text("torchvision:__import__('os').system('touch MARKER')"),
    spec_is_text("mine.py:__import__('os')"),
    spec_is_text("mine:detector.__globals__"),
]
