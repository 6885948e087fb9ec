"""The file of a head: what was saved is loaded, the same head gives the same bytes, and what is no head is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.checks import DataError
from iou_refiner.detector.fingerprint import fingerprint
from iou_refiner.head.checkpoint import describe_head, load_head, save_head
from iou_refiner.head.config import HeadConfig, HeadMetadata, TrainedCategory
from iou_refiner.head.iou_head import IoUHead
from tests.kit.heads import make_boxes, make_features, make_head

FORMAT = "iou-refiner head 6"

CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_classes": 4, "levels": 1, "aligned": False, "objective": "smooth_l1", "ranking": False},
    {"hidden": (), "output_size": 5, "deltas": False, "mix": 0},
]
METADATA = HeadMetadata(
    detector_name="FasterRCNN",
    fingerprint="abc",
    recommended={"nms": "greedy", "rank_alpha": 0.25},
    training={"epochs": 2, "lr": 1e-3},
    metrics={"pearson": 0.5},
    trials=({"rank_alpha": 0.25, "AP": 0.3}, {"rank_alpha": 0.5, "AP": 0.2}),
)


@pytest.mark.parametrize("metadata", [HeadMetadata(), METADATA])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_was_saved_is_loaded(tmp_path: Path, config: dict[str, Any], metadata: HeadMetadata) -> None:
    head, path = make_head(**config), tmp_path / "head.safetensors"
    head.metadata = metadata
    save_head(head, path)
    loaded = load_head(path)
    assert fingerprint(loaded) == fingerprint(head)
    assert loaded.config == head.config
    assert loaded.metadata == metadata
    for name in ("channels", "strides", "num_classes"):
        assert getattr(loaded, name) == getattr(head, name)
    assert not loaded.training
    boxes, image = make_boxes()
    labels = torch.zeros(9, dtype=torch.int64)
    features = make_features()
    predictions = [each.predict(each.encode(features), boxes, image, labels) for each in (head, loaded)]
    assert all(map(torch.equal, *predictions))
    before = path.read_bytes()
    save_head(loaded, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
mappings = st.dictionaries(st.text(max_size=6), values, max_size=3)


@given(
    config=st.builds(
        HeadConfig,
        width=st.integers(1, 4),
        mix=st.integers(0, 3),
        hidden=st.lists(st.integers(1, 4), max_size=2),
        output_size=st.integers(1, 3),
        context=st.floats(0.5, 3),
        levels=st.integers(1, 4),
        aligned=st.booleans(),
        ranking=st.booleans(),
        deltas=st.booleans(),
        objective=st.sampled_from(["bce", "smooth_l1"]),
    ),
    metadata=st.builds(
        HeadMetadata,
        detector_name=st.text(max_size=8),
        fingerprint=st.text(max_size=8),
        recommended=mappings,
        training=mappings,
        metrics=mappings,
        trials=st.lists(mappings, max_size=2).map(tuple),
    ),
    num_classes=st.integers(0, 3),
)
def test_any_configuration_and_any_metadata_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, config: HeadConfig, metadata: HeadMetadata, num_classes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    head = IoUHead((2, 3), (4, 8), config, num_classes=num_classes, metadata=metadata)
    save_head(head, path)
    loaded = load_head(path)
    assert (loaded.config, loaded.metadata, loaded.num_classes) == (config, metadata, num_classes)
    assert fingerprint(loaded) == fingerprint(head)


def test_a_head_describes_itself_without_its_weights(tmp_path: Path) -> None:
    head, path = make_head(num_classes=2), tmp_path / "head.safetensors"
    head.metadata = METADATA
    save_head(head, path)
    about = describe_head(path)
    assert about["format"] == FORMAT
    assert about["architecture"].keys() == {"channels", "strides", "num_classes", "config", "siblings"}
    assert about["kind"] == "iou"
    assert about["architecture"]["config"] == {**asdict(head.config), "hidden": [16]}
    assert about["architecture"]["siblings"] is None
    assert about["metadata"] == {**asdict(METADATA), "trials": list(METADATA.trials), "categories": []}


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "head.safetensors"
    save_head(make_head(), path)
    before = path.read_bytes()

    def full(*_: object) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_head(make_head(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_head_gives_the_same_bytes(tmp_path: Path) -> None:
    head = make_head()
    head.metadata = METADATA
    files = {name: tmp_path / name for name in ("a", "b", "c")}
    for path in files.values():
        save_head(head, path)
    assert len({path.read_bytes() for path in files.values()}) == 1
    assert describe_head(files["a"])["metadata"]["metrics"] == {"pearson": 0.5}
    head.metadata = replace(METADATA, metrics={"pearson": 0.6})
    save_head(head, files["b"])
    assert files["a"].read_bytes() != files["b"].read_bytes()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    head, path = make_head(), tmp_path / "head.safetensors"
    head.metadata = replace(METADATA, metrics={"pearson": float("nan"), "mae": [float("inf"), 0.5]})
    save_head(head, path)
    assert b"NaN" not in path.read_bytes()
    assert describe_head(path)["metadata"]["metrics"] == {"pearson": None, "mae": [None, 0.5]}


def test_what_it_was_trained_on_survives_the_file(tmp_path: Path) -> None:
    head, path = make_head(), tmp_path / "head.safetensors"
    head.metadata = replace(METADATA, categories=(TrainedCategory(1, "person", 0), TrainedCategory(3, "car", 2)))
    save_head(head, path)
    assert load_head(path).metadata == head.metadata


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.safetensors: no such file. Train a head with: iou-refiner train"):
        load_head(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a head", b"\xff" * 64, "truncated"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "head.safetensors"
    save_head(make_head(), path)
    path.write_bytes(path.read_bytes()[:-7] if isinstance(content, str) else content)
    with pytest.raises(DataError, match=r"head.safetensors: not a readable safetensors file"):
        load_head(path)


def test_a_folder_is_no_head(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_head(tmp_path)


def written_by_hand(path: Path, about: Any, weights: dict[str, Tensor]) -> None:
    path.write_bytes(
        safetensors.torch.save(weights, {"iou_refiner": about if isinstance(about, str) else json.dumps(about)})
    )


FOREIGN = [{"format": "iou-refiner head 0"}, {"format": "iou-refiner head 4"}, {"format": "pt"}, {}, []]


@pytest.mark.parametrize("about", FOREIGN)
def test_a_foreign_file_is_named(tmp_path: Path, about: Any) -> None:
    path = tmp_path / "other.safetensors"
    written_by_hand(path, about, {"weight": torch.zeros(2)})
    with pytest.raises(
        DataError, match=r"not a head of this version \(format (None|'.*'), need 'iou-refiner head 6'\)"
    ):
        load_head(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_safetensors_file_of_another_program_is_named(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}, metadata))
    with pytest.raises(DataError, match=r"other.safetensors: not a head of this version"):
        load_head(path)


def test_a_description_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    written_by_hand(path, "{", {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"head.safetensors: not a readable"):
        load_head(path)


def described(head: IoUHead) -> dict[str, Any]:
    architecture = {"channels": head.channels, "strides": head.strides, "num_classes": head.num_classes}
    architecture |= {"config": asdict(head.config), "siblings": None}
    about = {"format": FORMAT, "kind": "iou", "architecture": architecture, "metadata": asdict(head.metadata)}
    return json.loads(json.dumps(about))


BROKEN: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("architecture", "config"), {"hidden": [99]}),
    (("architecture", "config"), {"colour": "red"}),
    (("architecture", "config"), {"levels": 0}),
    (("architecture", "config"), {"levels": "some"}),
    (("architecture", "config"), {"context": -1}),
    (("architecture", "config"), {"aligned": 1}),
    (("architecture", "config"), {"objective": "l2"}),
    (("architecture",), {"channels": None}),
    (("architecture",), {"strides": [8.0]}),
    (("architecture",), {"num_classes": 7}),
    (("architecture",), {"colour": "red"}),
    (("architecture",), {"siblings": {}}),
    (("architecture",), {"siblings": 3}),
    ((), {"kind": "siblings"}),
    ((), {"kind": "other"}),
    ((), {"kind": None}),
    (("metadata",), {"colour": "red"}),
    (("metadata",), {"candidates": 3}),
    (("metadata",), {"trials": 3}),
    (("metadata",), {"detector_name": None}),
]


@pytest.mark.parametrize(("where", "change"), BROKEN)
def test_a_description_that_does_not_fit_the_weights_is_named(
    tmp_path: Path, where: tuple[str, ...], change: dict[str, Any]
) -> None:
    path, head = tmp_path / "head.safetensors", make_head()
    about = described(head)
    written_by_hand(path, about, dict(head.state_dict()))
    load_head(path)
    section = about
    for name in where:
        section = section[name]
    section.update(change)
    written_by_hand(path, about, dict(head.state_dict()))
    with pytest.raises(DataError, match=r"head.safetensors: description and weights do not make a head"):
        load_head(path)


@pytest.mark.parametrize(
    "about", [{}, {"architecture": []}, {"architecture": None}, {"architecture": {}}, {"metadata": {}}]
)
def test_a_head_without_a_description_is_named(tmp_path: Path, about: dict[str, Any]) -> None:
    path = tmp_path / "head.safetensors"
    written_by_hand(path, {"format": FORMAT, **about}, {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match="description and weights do not make a head"):
        load_head(path)


def test_what_describes_a_head_needs_no_torch() -> None:
    code = "import sys, iou_refiner.head.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
