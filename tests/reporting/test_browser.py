"""The page in a real browser: opens from a file, asks for nothing, does what its keys say, fits narrow and wide."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iou_refiner.reporting import make_report
from tests.kit.needs import ABSENT, DEV, needs_package
from tests.reporting.cases import HOSTILE, make_case

WIDTHS = (360, 1280)
LAYERS = {"t": "truth", "b": "before", "a": "after"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: the folder that IOU_REFINER_SCREENSHOTS names, else one of pytest's."""
    named = os.environ.get("IOU_REFINER_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's chromium without a window, through its driver."""
    webdriver = needs_package("selenium.webdriver", install=DEV)
    service = needs_package("selenium.webdriver.chrome.service", install=DEV)
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip(f"{ABSENT}chromium is not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    profile = tmp_path_factory.mktemp("profile")
    # Without its sandbox, since tests run as root in containers; the page is our own.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=service.Service(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    case = make_case(folder / "data", 12)
    make_report(case.before, case.after, case.ann, case.images, resamples=20).save(folder / "report.html")
    return (folder / "report.html").as_uri()


def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> Any:
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    return browser


def requests(browser: Any) -> list[str]:
    """The addresses that the page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def shown(browser: Any, layer: str) -> bool:
    script = "return getComputedStyle(document.querySelector(arguments[0])).display !== 'none'"
    return bool(browser.execute_script(script, f".layer-{layer}"))


def test_it_asks_for_nothing_and_complains_of_nothing(browser: Any, address: str):
    opened(browser, address)
    assert requests(browser) == [address]
    assert browser.get_log("browser") == []
    assert browser.title.startswith("AP ")  # and not what a name would have set it to
    assert HOSTILE in browser.find_element("tag name", "body").text


def test_a_page_that_asks_for_something_is_noticed(browser: Any, tmp_path: Path):
    (tmp_path / "bad.html").write_text("<img src='other.png'><script>nonsense()</script>")
    opened(browser, (tmp_path / "bad.html").as_uri())
    assert len(requests(browser)) == 2
    assert browser.get_log("browser") != []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_screen(browser: Any, address: str, pictures: Path, width: int, scheme: str):
    opened(browser, address, width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true })")
    script = """
        const out = [], edge = document.documentElement.clientWidth;
        for (const element of document.querySelectorAll("body *")) {
            const scrolls = element.closest(".scroll");
            if (!(scrolls && scrolls !== element) && element.getBoundingClientRect().right > edge + 0.5)
                out.push(element.outerHTML.slice(0, 80));
        }
        return [document.documentElement.scrollWidth, edge, innerWidth, out];
    """
    scroll, edge, inner, out = browser.execute_script(script)
    assert inner == width
    assert out == []
    assert scroll == edge
    browser.execute_script("document.querySelectorAll('details').forEach(e => { e.open = false })")
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    (pictures / f"report_{width}_{scheme}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(browser: Any, address: str, scheme: str):
    opened(browser, address, scheme=scheme)
    script = """
        const parse = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const paper = parse(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll("h1, p, span, td, th, figcaption, summary, a, dd, dt")]
            .filter((element) => element.textContent.trim())
            .map((element) => [parse(getComputedStyle(element).color), paper, element.outerHTML.slice(0, 80)]);
    """

    def luminance(colour: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: list[float], b: list[float]) -> float:
        dark, light = sorted((luminance(a), luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    texts = browser.execute_script(script)
    assert len(texts) > 50
    # Keys of a legend, which hold no text, are painted in colours of their own.
    assert [text for ink, paper, text in texts if contrast(ink, paper) < 4.5] == []


def test_keys_and_buttons_show_and_hide(browser: Any, address: str):
    opened(browser, address)
    body = browser.find_element("tag name", "body")
    for key, layer in LAYERS.items():
        button = browser.find_element("css selector", f"button[data-layer={layer}]")
        for press in (lambda key=key: body.send_keys(key), button.click):
            assert shown(browser, layer)
            press()
            assert not shown(browser, layer)
            assert button.get_attribute("aria-pressed") == "false"
            press()
            assert shown(browser, layer)
            assert button.get_attribute("aria-pressed") == "true"


def test_flipping_goes_from_one_side_to_the_other(browser: Any, address: str):
    opened(browser, address)
    body = browser.find_element("tag name", "body")
    seen = []
    for _ in range(3):
        body.send_keys("f")
        seen.append((shown(browser, "before"), shown(browser, "after"), shown(browser, "truth")))
    assert seen == [(True, False, True), (False, True, True), (True, False, True)]


def test_everything_that_can_be_used_or_seen_has_a_name(browser: Any, address: str):
    opened(browser, address)
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert len(roles["button"]) == 4
    assert len([name for role in ("image", "img") for name in roles.get(role, [])]) >= 6
    for role in ("button", "image", "img", "toolbar", "table", "region", "heading"):
        assert all(name.strip() for name in roles.get(role, [])), role
    focusable = browser.execute_script("return document.querySelectorAll('button, summary, [tabindex=\"0\"]').length")
    assert focusable > 8
