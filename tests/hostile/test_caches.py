"""Feature caches: an entry of another image, view or detector is never read, and a damaged one is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from iou_refiner import DataError
from iou_refiner.coco import Image
from iou_refiner.detector.entries import read_entry
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.detector.sources import CachedFeatures, FeatureCache, feature_source
from iou_refiner.detector.views import View
from iou_refiner.training.recipe import train
from tests.kit.paths import ROOT
from tests.kit.toys import SIZE, ToyDetector, make_dataset
from tests.training.test_recipe import CONFIG, SETTINGS


class Anything(ToyDetector):
    """The toy detector on images it does not know: one candidate, where the image is brightest."""

    def __init__(self, weight: float = 1.0, prepared: str = "none"):
        super().__init__({})
        torch.nn.init.constant_(self.weight, weight)
        self.prepared = prepared

    def settings(self) -> str:
        return self.prepared

    def _candidates(self, image: torch.Tensor):
        from iou_refiner import Detections

        y, x = divmod(int(image[0].argmax()), SIZE)
        box = torch.tensor([[x, y, x + 1.0, y + 1.0]])
        return Detections(box, torch.tensor([0.5]), torch.ones(1, dtype=torch.int64))


def put(path: Path, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> None:
    """An uncompressed image, so that all are of one size in bytes, with one time for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path, "BMP")
    os.utime(path, ns=(10**18, 10**18))


def image(id: int = 1, name: str = "a.bmp", width: int = SIZE, height: int = SIZE) -> Image:
    return Image(id, name, width, height)


def same(a: Extraction, b: Extraction) -> bool:
    return torch.equal(a.candidates.boxes, b.candidates.boxes) and all(
        torch.allclose(x, y, rtol=1e-3) for x, y in zip(a.features.levels, b.features.levels, strict=True)
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with ``images/a.bmp``, and its features in ``cache``."""
    put(tmp_path / "images" / "a.bmp", 0)
    features = cached(tmp_path)
    features(image())
    assert features.notes() == []
    return tmp_path


def cached(here: Path, folder: str = "images", **detector) -> CachedFeatures:
    return FeatureCache(here / "cache", Anything(**detector)).of(here / folder)


def entries(here: Path) -> list[Path]:
    return sorted((here / "cache").glob("*.safetensors"))


NOT_OF = r"1-0-\w+\.safetensors is not of image 1, of its view, or of this detector.*Remove that file"
STALE = "1 entry of the cache was of another image and was extracted anew."

# --- what must not be shared -----------------------------------------------------------------------------------------


def in_another_folder(here: Path) -> tuple[CachedFeatures, Image]:
    put(here / "val" / "a.bmp", 1)
    return cached(here, "val"), image()


def under_another_name(here: Path) -> tuple[CachedFeatures, Image]:
    put(here / "images" / "b.bmp", 1)
    return cached(here), image(name="b.bmp")


def changed_in_place(here: Path) -> tuple[CachedFeatures, Image]:
    before = (here / "images" / "a.bmp").stat()
    put(here / "images" / "a.bmp", 1)
    after = (here / "images" / "a.bmp").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return cached(here), image()


def of_another_size(here: Path) -> tuple[CachedFeatures, Image]:
    put(here / "images" / "a.bmp", 0, (SIZE + 4, SIZE))
    return cached(here), image(width=SIZE + 4)


def behind_a_link(here: Path) -> tuple[CachedFeatures, Image]:
    put(here / "b.bmp", 1)
    (here / "images" / "a.bmp").unlink()
    (here / "images" / "a.bmp").symlink_to(here / "b.bmp")
    return cached(here), image()


def turned_by_exif(here: Path) -> tuple[CachedFeatures, Image]:
    exif = PIL.Image.Exif()
    exif[274] = 6
    PIL.Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 5, 3), np.uint8)).save(
        here / "images" / "c.png", exif=exif
    )
    cached(here)(image(name="c.png", width=5, height=9))
    return cached(here), image(name="c.png", width=9, height=5)


CHANGES = [in_another_folder, under_another_name, changed_in_place, of_another_size, behind_a_link, turned_by_exif]


@pytest.mark.parametrize("change", CHANGES)
def test_an_entry_of_another_image_is_not_read_and_that_is_said(here: Path, change: Callable):
    features, other = change(here)
    assert features.missing([other]) == [other]
    with pytest.raises(DataError, match=r"Image 1 as .* has it now is not in the feature cache .*Fill it first"):
        features.load(other)
    live = extract_image(features.adapter, features.images, other)
    assert same(features(other), live)
    assert features.notes() == [STALE]
    assert features.notes() == []
    again = FeatureCache(here / "cache", Anything()).of(features.images.folder)
    assert again.missing([other]) == []
    assert same(again(other), live)
    assert again.notes() == []


@pytest.mark.parametrize("change", [in_another_folder, under_another_name])
def test_what_is_of_another_folder_stays(here: Path, change: Callable):
    features, other = change(here)
    features(other)
    assert len(entries(here)) == 2
    assert cached(here).missing([image()]) == []


def test_what_the_same_file_held_before_is_removed(here: Path):
    features, other = changed_in_place(here)
    before = entries(here)
    features(other)
    assert len(entries(here)) == 1
    assert entries(here) != before


def test_a_change_within_a_run_is_noticed(here: Path):
    features = cached(here)
    features(image())
    put(here / "images" / "a.bmp", 1)
    os.utime(here / "images" / "a.bmp")
    assert same(features(image()), extract_image(features.adapter, here / "images", image()))


def test_a_change_while_the_detector_runs_gives_no_wrong_entry(here: Path, monkeypatch: pytest.MonkeyPatch):
    put(here / "images" / "b.bmp", 1)
    features, prepare = cached(here), ToyDetector.prepare

    def changing(self, rgb: np.ndarray):
        put(here / "images" / "b.bmp", 2)
        return prepare(self, rgb)

    monkeypatch.setattr(ToyDetector, "prepare", changing)
    list(features.fill([image(name="b.bmp")]))
    monkeypatch.undo()
    os.utime(here / "images" / "b.bmp")
    assert cached(here).missing([image(name="b.bmp")])
    put(here / "images" / "b.bmp", 1)
    assert same(cached(here).load(image(name="b.bmp")), extract_image(Anything(), here / "images", image(name="b.bmp")))


@pytest.mark.parametrize("move", ["moved", "copied", "touched", "another spelling"])
def test_the_same_images_elsewhere_are_not_extracted_again(here: Path, move: str):
    folder = here / "images"
    if move == "moved":
        folder = folder.rename(here / "elsewhere")
    elif move == "copied":
        folder = Path(shutil.copytree(folder, here / "copy"))
    elif move == "touched":
        os.utime(folder / "a.bmp")
    else:
        folder = here / "cache" / ".." / "images"
    features = FeatureCache(here / "cache", Anything()).of(folder)
    assert features.missing([image()]) == []
    features.load(image())


def test_views_of_one_image_under_two_ids_are_windows_of_their_own(here: Path):
    features = cached(here)
    for id in (1, 2):
        list(features.fill([image(id)], view=2))
    assert not same(features.load(image(1), view=2), features.load(image(2), view=2))
    for id in (1, 2):
        live = extract_image(features.adapter, here / "images", image(id), view=2)
        assert same(features.load(image(id), view=2), live)


def test_one_window_of_two_sizes_is_two_entries(here: Path, monkeypatch: pytest.MonkeyPatch):
    """A picture that is turned for one annotation and not for the other may show the same window in both."""
    monkeypatch.setattr(View, "of", lambda *_: View(1, 1, 3, 3))
    sizes = [image(width=9, height=5), image(width=5, height=9)]
    assert len({cached(here)._entry(each, 2) for each in sizes}) == 2


def test_training_and_validation_that_number_alike_keep_apart(tmp_path: Path):
    """The case that was found: both annotations count from 1, the images differ."""
    from iou_refiner.coco import read_ground_truth

    path, detector = make_dataset(tmp_path / "train", 6)
    val_path, other = make_dataset(tmp_path / "val", 6, seed=1)
    detector.gt_boxes |= other.gt_boxes
    data = [(read_ground_truth(p), p.parent) for p in (path, val_path)]
    said: list[str] = []
    run = {"config": CONFIG, "settings": replace(SETTINGS, views=1, epochs=1), "note": said.append}
    cache = FeatureCache(tmp_path / "cache", detector)
    train(detector, *data, output_dir=tmp_path / "run", cache=cache.folder, **run)
    assert len(list(cache.folder.glob("*.safetensors"))) == 12
    for truth, folder in data:
        assert cache.of(folder).missing(truth.images) == []
        for each in truth.images:
            assert same(cache.of(folder).load(each), extract_image(detector, folder, each))
    assert not [text for text in said if "of the cache" in text]
    # The images of val change places: every one is noticed, counted and said, and nothing of train is.
    names = [each.file_name for each in data[1][0].images]
    turned = [
        replace(each, file_name=name) for each, name in zip(data[1][0].images, names[1:] + names[:1], strict=True)
    ]
    data[1] = (replace(data[1][0], images=tuple(turned)), data[1][1])
    train(detector, *data, output_dir=tmp_path / "again", cache=cache.folder, **run)
    assert "6 entries of the cache were of other images and were extracted anew." in said


# --- the cache as a whole --------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[dict[str, object], str]] = {
    "weights": ({"weight": 2.0}, "made with another detector"),
    "preparation": ({"prepared": "longest_side=800"}, "made with another settings"),
}


@pytest.mark.parametrize(("detector", "names"), OTHER.values(), ids=OTHER)
def test_the_cache_of_another_detector(here: Path, detector: dict, names: str):
    with pytest.raises(DataError, match=rf"cache is a feature cache {names}\. Remove the folder, or name another"):
        cached(here, **detector)
    # Not even where the label is lost: the entries themselves know.
    (here / "cache" / "cache.json").unlink()
    features = cached(here, **detector)
    assert features.missing([image()]) == [image()]
    entries(here)[0].rename(features._entry(image(), 0)[0])
    with pytest.raises(DataError, match=NOT_OF):
        features.load(image())


GOOD = {"detector": "1", "settings": "none", "dtype": "float16"}
DAMAGED = r"cache\.json is damaged, so nothing says which detector .*Remove the folder, or name another"
LABELS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", DAMAGED),
    "half of it": (json.dumps(GOOD).encode()[:20], DAMAGED),
    "a list": (b"[]", DAMAGED),
    "null": (b"null", DAMAGED),
    "no text": (b"\xff\xfe\x00", DAMAGED),
    "too deep": (b"[" * 100_000, DAMAGED),
    "an empty object": (b"{}", "of another version, and does not say which images"),
    "format 2": (json.dumps(GOOD | {"format": 2}).encode(), "of another version, and does not say which images"),
    "a format to come": (json.dumps(GOOD | {"format": 99}).encode(), "of another version"),
    "keys of other types": (json.dumps({k: [1] for k in GOOD} | {"format": 3}).encode(),
                            "made with another detector, settings, dtype"),
}  # fmt: skip


@pytest.mark.parametrize(("label", "names"), LABELS.values(), ids=LABELS)
def test_a_label_that_is_damaged_or_of_another_version(here: Path, label: bytes, names: str):
    (here / "cache" / "cache.json").write_bytes(label)
    with pytest.raises(DataError, match=rf"^{here}/cache.*{names}"):
        cached(here)
    assert (here / "cache" / "cache.json").read_bytes() == label
    assert len(entries(here)) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to(p), lambda p: p.symlink_to("nothing")])
def test_a_label_that_is_no_file(tmp_path: Path, make: Callable):
    (tmp_path / "cache").mkdir()
    make(tmp_path / "cache" / "cache.json")
    with pytest.raises(DataError, match=DAMAGED):
        cached(tmp_path)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_cache_where_a_file_is(tmp_path: Path, below: str):
    (tmp_path / "cache").write_bytes(b"mine")
    with pytest.raises(DataError, match="is a file, or lies in one"):
        feature_source(Anything(), tmp_path, f"{tmp_path}/cache{below}")
    assert (tmp_path / "cache").read_bytes() == b"mine"


# --- one entry -------------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """An entry with its description and tensors changed."""

    def rewrite(path: Path) -> None:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        change(about, tensors)
        path.write_bytes(safetensors.torch.save(tensors, {"about": json.dumps(about)}))

    return rewrite


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


IS_DAMAGED = r"Image 1 cannot be read from the feature cache: .*1-0-\w+\.safetensors is damaged .*Remove that file"
ENTRIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (cut(0), IS_DAMAGED),
    "the first bytes": (cut(5), IS_DAMAGED),
    "the description alone": (cut(900), IS_DAMAGED),
    "all but the last byte": (cut(-1), IS_DAMAGED),
    "zeros, as after a power failure": (lambda p: p.write_bytes(bytes(p.stat().st_size)), IS_DAMAGED),
    "another file": (lambda p: p.write_bytes(b"nonsense"), IS_DAMAGED),
    "a length without end": (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), IS_DAMAGED),
    "no description": (lambda p: p.write_bytes(safetensors.torch.save({"level0": torch.ones(1)})), IS_DAMAGED),
    "a description that is no JSON": (
        lambda p: p.write_bytes(safetensors.torch.save({"x": torch.ones(1)}, {"about": "{"})), IS_DAMAGED),
    "a description that is a list": (
        lambda p: p.write_bytes(safetensors.torch.save({"x": torch.ones(1)}, {"about": "[]"})), IS_DAMAGED),
    "no key": (rewritten(lambda a, t: a.pop("key")), IS_DAMAGED),
    "another key": (rewritten(lambda a, t: a.update(key="0" * 64)), NOT_OF),
    "no strides": (rewritten(lambda a, t: a.pop("strides")), IS_DAMAGED),
    "strides of zero": (rewritten(lambda a, t: a.update(strides=[0, 2])), IS_DAMAGED),
    "strides that are texts": (rewritten(lambda a, t: a.update(strides=["x", "y"])), IS_DAMAGED),
    "more strides than levels": (rewritten(lambda a, t: a.update(strides=[1, 2, 4])), IS_DAMAGED),
    "no level": (rewritten(lambda a, t: t.pop("level1")), IS_DAMAGED),
    "a flat level": (rewritten(lambda a, t: t.update(level1=torch.ones(3))), IS_DAMAGED),
    "no boxes": (rewritten(lambda a, t: t.pop("boxes")), IS_DAMAGED),
    "boxes of three numbers": (rewritten(lambda a, t: t.update(boxes=torch.ones(1, 3))), IS_DAMAGED),
    "fewer scores than boxes": (rewritten(lambda a, t: t.update(scores=torch.ones(0))), IS_DAMAGED),
    "a scale of one number": (rewritten(lambda a, t: a.update(scale=1)), IS_DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "names"), ENTRIES.values(), ids=ENTRIES)
def test_a_damaged_entry(here: Path, damage: Callable, names: str):
    (entry,) = entries(here)
    damage(entry)
    for read in (cached(here).load, cached(here)):
        with pytest.raises(DataError, match=names):
            read(image())
    entry.unlink()  # the cure
    assert same(cached(here)(image()), extract_image(Anything(), here / "images", image()))


@pytest.mark.parametrize("damage", [cut(0), rewritten(lambda about, _: about.pop("image"))])
def test_a_damaged_entry_of_before_does_no_harm(here: Path, damage: Callable):
    damage(entries(here)[0])
    features, other = changed_in_place(here)
    assert same(features(other), extract_image(features.adapter, here / "images", other))
    assert len(entries(here)) == 2


def test_a_rewritten_entry_that_is_right_is_read(here: Path):
    """So that the damage above is what is refused, not the rewriting."""
    rewritten(lambda about, tensors: None)(entries(here)[0])
    assert cached(here).load(image()).image_id == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes, str]:
    here = tmp_path_factory.mktemp("whole")
    put(here / "images" / "a.bmp", 0)
    features = cached(here)
    features(image())
    path, key = features._entry(image(), 0)
    return path, path.read_bytes(), key


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(1, 255)), max_size=3), st.none() | st.integers(0, 3000))
def test_damage_anywhere_in_the_description_is_an_error_or_changes_nothing_that_counts(whole, flips, end):
    path, data, key = whole
    damaged = bytearray(data)
    for place, change in flips:
        damaged[place] ^= change
    path.write_bytes(bytes(damaged)[:end])
    said = ""
    try:
        assert len(read_entry(path, 1, key).features) == 1
    except DataError as error:
        said = str(error)
    assert not said or (str(path) in said and "Remove that file" in said)


# --- several runs ----------------------------------------------------------------------------------------------------

FILL = """
import sys
from pathlib import Path
from tests.hostile.test_caches import cached, image
features = cached(Path(sys.argv[1]))
list(features.fill([image(id, f"{id}.bmp") for id in range(1, 13)]))
"""


def test_two_processes_fill_one_cache(tmp_path: Path):
    for id in range(1, 13):
        put(tmp_path / "images" / f"{id}.bmp", id)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [(run.communicate()[1].decode(), run.returncode) for run in runs] == [("", 0)] * 2
    images = [image(id, f"{id}.bmp") for id in range(1, 13)]
    features = cached(tmp_path)
    assert features.missing(images) == []
    for each in images:
        assert same(features.load(each), extract_image(features.adapter, tmp_path / "images", each))
    assert len(list((tmp_path / "cache").iterdir())) == 13


def test_two_threads_fill_one_cache(tmp_path: Path):
    images = [image(id, f"{id}.bmp") for id in range(1, 13)]
    for each in images:
        put(tmp_path / "images" / each.file_name, each.id)
    failures: list[Exception] = []

    def fill() -> None:
        try:
            list(cached(tmp_path).fill(images))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list((tmp_path / "cache").iterdir())) == 13


def test_what_killed_runs_left_in_the_cache_is_swept(here: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = here / "cache" / f"9-0-abc.safetensors.0011aabb.{gone.pid}.tmp"
    mine = here / "cache" / f"notes.{gone.pid}.tmp"
    for path in (left, mine):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    cached(here)(image())  # writes nothing, sweeps nothing
    assert left.exists()
    cached(here)(image(2))
    assert not left.exists()
    assert mine.exists()


def test_what_the_annotation_does_not_decide_is_counted_and_said(tmp_path: Path):
    exif = PIL.Image.Exif()
    exif[274] = 3
    (tmp_path / "images").mkdir()
    for id in (4, 2):
        PIL.Image.fromarray(np.full((SIZE, SIZE, 3), 9, np.uint8)).save(tmp_path / "images" / f"{id}.png", exif=exif)
    for source in (feature_source(Anything(), tmp_path / "images"), cached(tmp_path), cached(tmp_path)):
        for id in (4, 2, 4):
            source(image(id, f"{id}.png"))
        assert [text.rsplit(": ")[-2:] for text in source.notes()] == [["2 of the images (first", "2)."]]
        source(image(4, "4.png"))
        assert source.notes() == []
