"""Wrong annotations: what `validate` and `eval` end with and name, what `--fix` repairs, and that they agree."""

from __future__ import annotations

import copy
import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.checks import DataError
from iou_refiner.coco import opening, read_ground_truth, read_images
from tests.hostile.files import (
    SETTINGS,
    Call,
    Truth,
    boxes,
    caller,
    change_row,
    changed,
    every,
    put,
    right_rows,
    right_truth,
    whole,
)


def annotation(**change: Any) -> Callable[[Truth], Any]:
    return lambda truth: truth["annotations"][7].update(change)


def image(**change: Any) -> Callable[[Truth], Any]:
    return lambda truth: truth["images"][2].update(change)


def lacking(section: str, key: str) -> Callable[[Truth], Any]:
    return lambda truth: [truth[section][1].pop(key)]


def text(old: str, new: str) -> Callable[[Truth], str]:
    def apply(truth: Truth) -> str:
        before = json.dumps(truth)
        assert old in before
        return before.replace(old, new, 1)

    return apply


def twice(section: str) -> Callable[[Truth], Any]:
    return lambda truth: truth[section].append(truth[section][0])


# What is done to a right annotation -> code of the finding, and what both commands name.
ERRORS: dict[str, tuple[Callable[[Truth], Any], str, tuple[str, ...]]] = {
    # the file
    "empty": (lambda _: b"", "E102", ("the file is empty", "images")),
    "list": (lambda _: b"[]", "E101", ("expected an object with images, annotations and categories", "not a results")),
    "results": (lambda _: json.dumps(right_rows()), "E101", ("not a results file",)),
    "html": (lambda _: b"<html>", "E101", ("<html>",)),
    "cut": (whole(lambda data: data[:-9]), "E102", ("is not whole JSON",)),
    "gzip without name": (whole(gzip.compress), "E102", ("Rename it to end in .json.gz",)),
    "BOM": (whole(lambda data: b"\xef\xbb\xbf" + data), "E102", ("byte order mark",)),
    "deep": (text('"info": ', '"info": ' + "[" * 99999 + "]" * 99999 + ', "more": '), "E102", ("is not whole JSON",)),
    "not UTF-8": (whole(lambda data: data.replace(b'"cat"', b'"c\xfft"', 1)), "E102", ("is not whole JSON",)),
    "surrogate": (text('"cat"', r'"\ud800"'), "E102", ("half a surrogate pair", r"\ud800")),
    "NaN": (annotation(area=math.nan), "E103", ("NaN", "at byte")),
    "NaN elsewhere": (annotation(note=math.nan), "E103", ("NaN",)),
    "Infinity": (annotation(bbox=[1, 1, math.inf, 2]), "E103", ("Infinity",)),
    # keys and types
    "empty object": (lambda _: b"{}", "E201", ("misses the key 'images'",)),
    "no categories": (lambda t: t.pop("categories"), "E201", ("misses the key 'categories'",)),
    "no images": (lambda t: t.pop("images"), "E201", ("misses the key 'images'",)),
    "annotations null": (lambda t: t.update(annotations=None), "E202", ("annotations", "null")),
    "annotations of numbers": (lambda t: t.update(annotations=[1]), "E202", ("annotations, entry 1",)),
    "no box": (lacking("annotations", "bbox"), "E201", ("annotations, entry 2", "'bbox'")),
    "no id": (lacking("annotations", "id"), "E201", ("annotations, entry 2", "'id'")),
    "no image id": (lacking("annotations", "image_id"), "E201", ("'image_id'",)),
    "no category id": (lacking("annotations", "category_id"), "E201", ("'category_id'",)),
    "no width": (lacking("images", "width"), "E201", ("images, entry 2", "'width'")),
    "no file name": (lacking("images", "file_name"), "E201", ("images, entry 2", "'file_name'",)),
    "no name": (lacking("categories", "name"), "E201", ("categories, entry 2", "'name'")),
    "three numbers": (annotation(bbox=[1, 2, 3]), "E203", ("annotations, entry 8", "length 4")),
    "null box": (annotation(bbox=None), "E203", ("annotations, entry 8", "null")),
    "box of strings": (annotation(bbox=["1", "2", "3", "4"]), "E203", ("entry 8",)),
    "float id": (annotation(id=8.0), "E202", ("entry 8", "--fix OUT")),
    "float width": (image(width=160.0), "E202", ("images, entry 3", "width", "--fix OUT")),
    "half width": (image(width=160.5), "E202", ("images, entry 3", "width")),
    "string id": (annotation(image_id="3"), "E202", ("entry 8 counting from 1, image_id",)),
    "boolean crowd": (annotation(iscrowd=True), "E202", ("entry 8 counting from 1, iscrowd",)),
    "string area": (annotation(area="20"), "E202", ("entry 8 counting from 1, area",)),
    "width of 400 digits": (image(width=10**400), "E202", ("images, entry 3",)),
    "1e999 area": (text('"area": ', '"area": 1e999, "was": '), "E204", ("entry 1", "No float holds", "drop the entry")),
    "1e999 box": (text('"bbox": [', '"bbox": [1e999, 1, 2, 3], "was": ['), "E204", ("entry 1", "No float holds")),
    # keys twice
    "own key twice": (text('"images": [', '"images": [], "images": ['), "E104", ("the file's own keys", "'images'")),
    "box twice": (text('"bbox": [', '"bbox": [1, 1, 2, 2], "bbox": ['), "E104", ("annotations, entry 1", "'bbox'")),
    "crowd twice": (text('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0'), "E104", ("entry 1 counting", "each key once")),
    "last id twice": (
        lambda t: '"id": 72, "id": 7'.join(json.dumps(t).rsplit('"id": 72', 1)), "E104", ("entry 72", "'id' stands")
    ),
    "id twice, escaped": (text('"bbox"', r'"image\u005fid": 3, "bbox"'), "E104", ("entry 1", "'image_id' stands")),
    "key with quotes twice": (
        text('"bbox"', r'"\u0022": 1, "\"": 1, "bbox"'), "E104", ("annotations, entry 1", "more than once")
    ),
    "own key twice in it": (text('"bbox"', '"x": {"a": "b"}, "x": [], "bbox"'), "E104", ("entry 1", "'x' stands")),
    "size twice": (text('"width"', '"width": 9, "width"'), "E104", ("images, entry 1", "'width'")),
    "name twice": (text('"name"', '"name": "dog", "name"'), "E104", ("categories, entry 1", "'name'")),
    # what it says
    "unlisted image": (annotation(image_id=999), "E301", ("entry 8", "image 999 is not listed", "List it")),
    "unlisted category": (annotation(category_id=77), "E302", ("entry 8", "category 77 is not listed")),
    "image twice": (twice("images"), "E401", ("image ids must be unique", "[3]")),
    "category twice": (twice("categories"), "E401", ("category ids must be unique", "[1]")),
    "negative width": (annotation(bbox=[9, 9, -5, 5]), "E403", ("annotation 8 (entry 8", "negative width or height")),
    "negative both": (annotation(bbox=[9, 9, -5, -5]), "E403", ("negative width or height",)),
    "outside": (annotation(bbox=[5000, 5000, 5, 5]), "E404", ("annotation 8", "outside of their images", "Drop them")),
    "left of its image": (annotation(bbox=[-50, 5, 5, 5]), "E404", ("annotation 8", "outside of their images")),
    "beyond all numbers": (annotation(bbox=[1e308, 0, 1e308, 5]), "E204", ("annotation 8", "beyond all numbers")),
    "corners": (boxes(lambda b: [*b[:2], *(b[:2] + b[2:])]), "E405", ("[x1, y1, x2, y2]", "subtract")),
    "normalised": (boxes(lambda b: b / 700), "E406", ("normalised", "Multiply")),
    "crowd 2": (annotation(iscrowd=2), "E407", ("iscrowd", "2", "Set 1 for regions")),
    "crowd -1": (annotation(iscrowd=-1), "E407", ("iscrowd", "-1")),
    "crowd of 30 digits": (annotation(iscrowd=10**30), "E407", ("iscrowd",)),
    "area -5": (annotation(area=-5), "E408", ("annotation 8", "area -5", "leaves such objects out")),
    "area 1e300": (annotation(area=1e300), "E408", ("annotation 8", "area 1e+300")),
    "width 0": (image(width=0), "E410", ("image 8", "0 x 500")),
    "height -1": (image(height=-1), "E410", ("image 8", "333 x -1")),
    "width 1e9": (image(width=10**9), "E410", ("image 8", "1000000000 x 500", "square pixels")),
}  # fmt: skip

# The same, for what is worth a word and no more: eval measures it.
WARNINGS: dict[str, tuple[Callable[[Truth], Any], str, tuple[str, ...]]] = {
    "id 0": (annotation(id=0), "W401", ("annotation 0 (entry 8", "pycocotools")),
    "ids twice": (annotation(id=1), "W401", ("occur twice", "here they are numbered anew")),
    "no crowd": (lacking("annotations", "iscrowd"), "W402", ("entry 2", "no iscrowd", "stops pycocotools")),
    "no area": (lacking("annotations", "area"), "W402", ("entry 2", "no area")),
    "null area": (annotation(area=None), "W402", ("entry 8", "no area")),
    "zero width": (annotation(bbox=[5, 5, 0, 9], area=0), "W403", ("annotation 8", "nothing can match")),
    "zero both": (annotation(bbox=[5, 5, 0, 0], area=0), "W403", ("annotation 8",)),
    "beyond its edge": (annotation(bbox=[400, 5, 600, 9], area=5400), "W404", ("annotation 8", "Clip them")),
    "area 0": (annotation(area=0), "W408", ("annotation 8", "area 0")),
    "area too large": (annotation(area=1e6), "W408", ("annotation 8", "area 1e+06")),
    "all crowd": (every(lambda row: {"iscrowd": 1}), "W409", ("every annotation is a crowd", "measured")),
    "no objects": (lambda t: t.update(annotations=[]), "W409", ("there is no annotation", "AP cannot be measured")),
    "duplicates": (lambda t: t["annotations"].append({**t["annotations"][3], "id": 999}), "W411",
                   ("annotation 999 (entry 73", "exact duplicates")),
    "ignore": (annotation(ignore=1), "W240", ("annotation 8", "Set iscrowd to 1")),
}  # fmt: skip


def test_a_right_annotation_passes_with_and_without_results(call: Call) -> None:
    put(Path("a.json"), right_truth())
    status, out, _ = call("validate", "--ann", "a.json", "--json")
    assert (status, json.loads(out)["findings"], json.loads(out)["annotations"]) == (0, [], 72)
    status, out, _ = call("validate", "--ann", "a.json")
    assert out.startswith("72 annotations, 12 images, 3 categories: 0 kinds of error, 0 of warning")
    assert call("eval", "d.json", "--ann", "a.json")[0] == 0


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_ends_with_3_and_is_named_by_all(call: Call, name: str) -> None:
    change, code, words = ERRORS[name]
    put(Path("a.json"), changed(right_truth(), change))
    for command in (("validate", "d.json", "--ann", "a.json"), ("validate", "--ann", "a.json")):
        status, out, _ = call(*command)
        assert status == 3
        assert f"{code} error" in out
        for word in words:
            assert word in out
    status, out, err = call("eval", "d.json", "--ann", "a.json")
    assert (status, out) == (3, "")
    for word in words:
        assert word in err


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_odd_is_named_and_measured(call: Call, name: str) -> None:
    change, code, words = WARNINGS[name]
    put(Path("a.json"), changed(right_truth(), change))
    status, out, _ = call("validate", "--ann", "a.json")
    assert status == 0
    assert f"{code} warning" in out
    for word in words:
        assert word in out
    status, out, _ = call("eval", "d.json", "--ann", "a.json", "--json")
    assert status == 0
    json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize("more", [{}, {"info": {"annotations": "none"}}])
def test_a_list_of_images_is_one_for_validate_and_none_for_eval(call: Call, more: Truth) -> None:
    truth = {key: value for key, value in right_truth().items() if key != "annotations"} | more
    put(Path("images.json"), truth)
    for command in (("validate", "--ann", "images.json"), ("validate", "d.json", "--ann", "images.json")):
        status, out, _ = call(*command)
        assert status == 0
        assert "W412 warning" in out
        assert "dump and rescore take such a list of images; eval and train refuse it" in out
    status, out, err = call("eval", "d.json", "--ann", "images.json")
    assert (status, out) == (3, "")
    assert "misses the key 'annotations'" in err
    assert "do for dump and rescore" in err
    truth["images"].append(truth["images"][0])
    put(Path("images.json"), truth)
    assert "image ids must be unique" in call("validate", "--ann", "images.json")[1]


def test_keys_that_look_repeated_and_are_not(call: Call) -> None:
    truth = right_truth()
    truth["annotations"][0] |= {"a": {"id": 1, "b": [{"id": 2}]}, '"': 1, "id ": 3, "note": 'says "id": 5, "id": 6'}
    truth["images"][0]['q"x'] = 1
    for content in (truth, json.dumps(truth).replace(r'"\""', r'"\u0022"')):
        put(Path("a.json"), content)
        status, out, _ = call("validate", "--ann", "a.json", "--json")
        assert (status, json.loads(out)["findings"]) == (0, [])


def test_a_key_twice_with_one_value_is_dropped_once_and_named(call: Call) -> None:
    put(Path("a.json"), text('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0')(right_truth()))
    status, out, _ = call("validate", "--ann", "a.json", "--fix", "fixed.json", "--json")
    assert status == 0
    (repair,) = json.loads(out)["repairs"]
    assert (repair["kind"], repair["record"]) == ("a key twice with one value, once dropped", 1)
    assert "'iscrowd'" in repair["reason"]
    assert json.loads(Path("fixed.json").read_bytes()) == right_truth()


@pytest.mark.parametrize("name", ["corners", "normalised", "area -5", "area 1e300", "outside", "width 0", "width 1e9"])
def test_what_can_be_measured_is_measured_without_the_check(call: Call, name: str) -> None:
    put(Path("a.json"), changed(right_truth(), ERRORS[name][0]))
    assert "--no-check" in call("eval", "d.json", "--ann", "a.json")[2]
    status, out, _ = call("eval", "d.json", "--ann", "a.json", "--no-check", "--json")
    assert status == 0
    json.loads(out, parse_constant=pytest.fail)


class TestImagesAlone:
    """What `dump` and `rescore` read: an annotation whose objects are not used."""

    def test_annotations_may_be_missing_or_wrong(self, call: Call) -> None:
        truth = right_truth()
        expected = read_ground_truth(put(Path("a.json"), truth))
        for other in (..., [], None, [{"bbox": "wrong"}], "nothing"):
            content = {key: value for key, value in truth.items() if key != "annotations"}
            if other is not ...:
                content["annotations"] = other
            images = read_images(put(Path("images.json"), content))
            assert (images.images, images.categories) == (expected.images, expected.categories)
            assert len(images) == 0

    @pytest.mark.parametrize("name", ["no images", "no categories", "float width", "image twice", "category twice"])
    def test_images_and_categories_are_checked_all_the_same(self, call: Call, name: str) -> None:
        change, _, words = ERRORS[name]
        with pytest.raises(DataError, match=re.escape(words[0])):
            read_images(put(Path("a.json"), changed(right_truth(), change)))


def test_what_unpacks_beyond_bounds_stops_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    inner = opening.Source.read

    def counted(self: opening.Source, size: int = opening.WINDOW) -> bytes:
        nonlocal read
        block = inner(self, size)
        read += len(block)
        return block

    monkeypatch.setattr(opening.Source, "read", counted)
    put(Path("bomb.json.gz"), gzip.compress(b'{"images": [' + b" " * (256 << 20), 1))
    status, _, err = call("eval", "d.json", "--ann", "bomb.json.gz")
    assert status == 3
    assert "unpacks to more than" in err
    assert read <= (128 << 20)


# What is done to a right annotation -> exit code of the copy, kinds of repair with their number, annotations left.
REPAIRS: dict[str, tuple[Callable[[Truth], Any], int, dict[str, int], int]] = {
    "nothing": (lambda truth: None, 0, {}, 72),
    "float width": (image(width=333.0), 0, {"whole numbers written as 1.0": 1}, 72),
    "float ids": (
        every(lambda r: {k: float(r[k]) for k in ("id", "image_id", "category_id", "iscrowd")}),
        0, {"whole numbers written as 1.0": 288}, 72,
    ),
    "float ids of images": (
        lambda t: [entry.update(id=float(entry["id"])) for entry in t["images"] + t["categories"]],
        0, {"whole numbers written as 1.0": 15}, 72,
    ),
    "negative": (annotation(bbox=[9, 9, -5, 5]), 0, {"negative width or height, dropped": 1}, 71),
    "NaN box": (annotation(bbox=[9, 9, math.nan, 5]), 0, {"boxes that are not finite, dropped": 1}, 71),
    "NaN area": (annotation(area=math.nan), 0, {"area filled with that of the box": 1}, 72),
    "no crowd": (annotation(iscrowd=None), 0, {"missing iscrowd filled with 0": 1}, 72),
    "id 0": (annotation(id=0), 0, {"ids that were 0 or taken": 1}, 72),
    "ids twice": (annotation(id=1), 0, {"ids that were 0 or taken": 1}, 72),
    "duplicates": (
        lambda t: t["annotations"].append({**t["annotations"][3], "id": 999}), 0, {"exact duplicates, dropped": 1}, 72
    ),
    "corners": (boxes(lambda b: [*b[:2], *(b[:2] + b[2:])]), 0, {"boxes were corners": 72}, 72),
    "digits": (annotation(image_id="3"), 3, {}, 72),
    "half width": (image(width=160.5), 3, {}, 72),
    "crowd 2": (annotation(iscrowd=2), 3, {}, 72),
    "area -5": (annotation(area=-5), 3, {}, 72),
    "outside": (annotation(bbox=[5000, 5000, 5, 5]), 3, {}, 72),
    "unlisted image": (annotation(image_id=999), 3, {}, 72),
    "three numbers": (annotation(bbox=[1, 2, 3]), 3, {}, 72),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRS)
def test_fix_repairs_what_is_sure_and_names_it(call: Call, name: str) -> None:
    change, expected, kinds, left = REPAIRS[name]
    put(Path("a.json"), changed(right_truth(), change))
    before = Path("a.json").read_bytes()
    status, out, _ = call("validate", "--ann", "a.json", "--fix", "fixed.json", "--json")
    report = json.loads(out)
    assert status == expected
    assert {k: sum(r["kind"] == k for r in report["repairs"]) for k in {r["kind"] for r in report["repairs"]}} == kinds
    fixed = json.loads(Path("fixed.json").read_bytes())
    assert len(fixed["annotations"]) == left
    assert fixed["info"] == right_truth()["info"]
    assert Path("a.json").read_bytes() == before
    assert (call("eval", "d.json", "--ann", "fixed.json")[0] == 0) == (expected == 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "empty"), ("list", "expected an object"), ("cut", "whole JSON"), ("NaN elsewhere", "not finite")],
)
def test_what_is_no_annotation_is_not_repaired(call: Call, name: str, message: str) -> None:
    put(Path("a.json"), changed(right_truth(), ERRORS[name][0]))
    status, _, err = call("validate", "--ann", "a.json", "--fix", "fixed.json")
    assert status == 3
    assert message in err
    assert not list(Path().glob("fixed*"))


def test_a_key_twice_is_not_repaired_by_choosing_one(call: Call) -> None:
    put(Path("a.json"), text('"area": ', '"area": 1, "area": ')(right_truth()))
    status, _, err = call("validate", "--ann", "a.json", "--fix", "fixed.json")
    assert status == 3
    assert "'area' stands twice" in err
    assert not list(Path().glob("fixed*"))


# --- a right file made wrong at random -------------------------------------------------------------------------------

values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 50), st.floats(), st.text(max_size=4), st.just([]), st.just({"a": 1}),
    st.sampled_from([-1, 1e300, -1e300, 1e308, 2**63, 10**30, math.inf, "\ud800", [1, 2, 3, 4], [1, 2, -3, 4]]),
)  # fmt: skip
KEYS = {
    "images": ("id", "width", "height", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}


@st.composite
def wrong_annotation(draw: st.DrawFn) -> bytes:
    """A right annotation after up to four changes: fields dropped, retyped, renamed, negated; entries repeated."""
    truth: Any = copy.deepcopy(right_truth())
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(["annotations", "annotations", "images", "categories"]))
        entries, key = truth[section], draw(st.sampled_from(KEYS[section]))
        at = draw(st.integers(0, len(entries) - 1))
        change = draw(st.sampled_from(["drop", "set", "set all", "rename", "negate", "repeat", "delete", "coordinate"]))
        value = draw(values)
        for row in list(entries) if change == "set all" else [entries[at]]:
            change_row(row, change, key, value)
            if change == "repeat":
                entries.append(dict(row))
            elif change == "delete" and len(entries) > 1:
                del entries[at]
    data = json.dumps(truth).encode()
    cut = draw(st.sampled_from([len(data), draw(st.integers(0, len(data)))]))
    return data[:cut]


@SETTINGS
@given(data=wrong_annotation())
def test_what_validate_calls_an_error_is_never_measured(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    folder, call = tmp_path_factory.mktemp("wrong"), caller(capsys)
    truth, path = put(folder / "a.json", data), put(folder / "d.json", right_rows())
    status, out, _ = call("validate", path, "--ann", truth, "--json")
    assert status in (0, 3)
    json.loads(out, parse_constant=pytest.fail)
    listed = any(finding["code"] == "W412" for finding in json.loads(out)["findings"])
    measured, out, _ = call("eval", path, "--ann", truth, "--json")
    assert measured == (3 if listed else status)
    json.loads(out, parse_constant=pytest.fail)
    alone, out, _ = call("validate", "--ann", truth, "--json")
    assert alone in (0, status)
    fixed, out, _ = call("validate", "--ann", truth, "--fix", folder / "f.json", "--json")
    assert fixed in (0, 3)
    json.loads(out, parse_constant=pytest.fail)
    if alone == 0:
        assert fixed == 0
    if fixed == 0:
        assert call("validate", "--ann", folder / "f.json")[0] == 0
