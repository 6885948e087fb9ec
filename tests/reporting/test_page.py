"""The page and the command: one file, nothing from outside, names as text, errors and exit codes as those of eval."""

from __future__ import annotations

import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from iou_refiner import MissingPackageError, cli
from iou_refiner.reporting import Report, make_report
from iou_refiner.reporting.gallery import MOST_IMAGES
from tests.reporting.cases import HOSTILE, Case, make_case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("report"), 20)


@pytest.fixture(scope="module")
def report(case: Case) -> Report:
    return make_report(case.before, case.after, case.ann, case.images, resamples=20)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def page(report: Report) -> Elements:
    return Elements(report.html)


FETCHING = ("src", "href", "xlink:href", "action", "data", "poster", "srcset", "background")


def outside(page: str) -> list[str]:
    """Whatever in a page could make a browser fetch something."""
    elements = Elements(page)
    addresses = [value for _, attributes in elements.found for name in FETCHING if (value := attributes.get(name))]
    styles = [attributes["style"] or "" for _, attributes in elements.found if "style" in attributes]
    styles += re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    addresses += [match for style in styles for match in re.findall(r"(?:url\(|@import)\s*([^)]+)", style)]
    return [address for address in addresses if not address.startswith("data:")]


def test_nothing_in_it_is_fetched(report: Report):
    assert outside(report.html) == []
    assert "http://" not in report.html
    assert "https://" not in report.html


@pytest.mark.parametrize(
    "page", ['<img src="http://a/b">', "<a href=//a>", "<style>@import 'x'</style>", "<p style='background:url(x)'>"]
)
def test_what_would_be_fetched_is_noticed(page: str):
    assert outside(page)


def test_names_stay_text(report: Report, page: Elements):
    assert len(page.of("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert page.of("img") == []
    assert HOSTILE in "".join(page.text)
    assert str(html.escape(HOSTILE)).replace("&#x27;", "&#39;") in report.html
    assert "\u202e" not in report.html  # which would turn the text around
    assert "\x1b" not in report.html


def test_the_first_screen_is_the_gain_and_whether_to_trust_it(report: Report, page: Elements):
    verdict = report.facts.verdict
    text = re.sub(r"\s+", " ", "".join(page.text))
    assert verdict.gain in text
    assert verdict.trust in text
    assert all(reason in text for reason in verdict.reasons)


def test_every_figure_has_a_name_and_its_numbers_as_a_table(report: Report, page: Elements):
    figures = re.findall(r'<figure class="plot">(.*?)</figure>', report.html, re.DOTALL)
    assert len(figures) == 6  # the curve, errors, score before and after, predicted IoU, calibration
    for figure in figures:
        assert re.search(r"<details>.*<table>.*</table>.*</details>", figure, re.DOTALL)
    identifiers = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for svg in page.of("svg"):
        name = svg.get("aria-label") or svg.get("aria-labelledby") in identifiers
        assert name or svg.get("aria-hidden") == "true"


def test_the_galleries_show_the_largest_changes_first_for_better_and_for_worse(report: Report):
    galleries = report.galleries
    assert galleries is not None
    for images, sign in ((galleries.gained, 1), (galleries.lost, -1)):
        changes = [sign * (image.ap[1] - image.ap[0]) for image in images]
        assert 0 < len(images) <= MOST_IMAGES
        assert min(changes) > 0
        assert changes == sorted(changes, reverse=True)
    assert {image.id % 4 for image in galleries.lost} == {0}
    assert galleries.counts[1] == len(galleries.lost) == 5


def test_the_boxes_of_a_gallery_are_those_of_the_files(report: Report, case: Case):
    image = report.galleries.lost[0]  # type: ignore[union-attr]
    truth = [row["bbox"] for row in json.loads(case.ann.read_text())["annotations"] if row["image_id"] == image.id]
    assert [[b.x, b.y, b.width, b.height] for b in image.truth] == [[round(v, 1) for v in box] for box in truth]
    records = [row for row in json.loads(case.before.read_text()) if row["image_id"] == image.id]
    bar = report.galleries.scores[0]  # type: ignore[union-attr]
    sure = [[round(v, 1) for v in row["bbox"]] for row in records if row["score"] >= bar]
    everything = [[round(v, 1) for v in row["bbox"]] for row in records]
    drawn = [([b.x, b.y, b.width, b.height], b.hit) for b in image.before]
    assert all(box in everything for box, _ in drawn)
    assert all(box in [other for other, _ in drawn] for box in sure)
    assert all(box in sure for box, hit in drawn if not hit)
    assert any(hit for _, hit in drawn)


def test_the_same_input_gives_the_same_bytes(report: Report, case: Case):
    assert make_report(case.before, case.after, case.ann, case.images, resamples=20).html == report.html


def test_without_images_the_page_says_so(case: Case):
    made = make_report(case.before, case.before, case.ann, resamples=0)
    assert made.galleries is None
    assert "No folder of images was given" in made.html
    assert "No difference" in made.html
    json.dumps(made.to_dict(), allow_nan=False)


def test_a_missing_package_names_the_extra(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match=r"The report needs jinja2.*iou-refiner\[report\]"):
        make_report(case.before, case.after, case.ann)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            cli.main(["report", *map(str, words), "--bootstrap", "10"])
        out, err = capsys.readouterr()
        return done.value.code, out, err

    return call


def test_the_command_writes_one_file_and_says_the_gain(case: Case, run):
    status, out, err = run(case.before, case.after, "--ann", case.ann, "--images", case.images)
    assert status == 0
    assert out.startswith("AP ")
    assert "report.html: " in err
    assert [path.name for path in Path().iterdir()] == ["report.html"]
    assert "<!doctype html>" in Path("report.html").read_text()[:200]


def test_the_command_gives_its_numbers_as_json(case: Case, run):
    status, out, err = run(case.before, case.after, "--ann", case.ann, "--json")
    assert status == 0
    assert json.loads(out)["galleries"] is None
    assert "Without --images" in err


def test_wrong_input_ends_as_it_does_in_eval(case: Case, run):
    rows = json.loads(case.after.read_text())
    Path("other.json").write_text(json.dumps([{**row, "image_id": 10_000 + row["image_id"]} for row in rows]))
    status, _, err = run(case.before, "other.json", "--ann", case.ann)
    assert status == 3
    assert "other.json does not pass" in err
    assert run(case.before, "none.json", "--ann", case.ann)[0] == 3
    assert run(case.before, case.after, "--ann", case.ann, "--images", "nowhere")[0] == 3
    assert run(case.before, case.after, "--ann", case.ann, "-o", case.before)[0] == 2
    Path("report.html").write_text("mine")
    assert run(case.before, case.after, "--ann", case.ann)[0] == 2
    assert Path("report.html").read_text() == "mine"
