"""A Dataset becomes files that say the same; what cannot be what it should be is refused by its position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from iou_refiner import DataError
from iou_refiner.coco import read_ground_truth
from iou_refiner.verbs.datasets import write_dataset

BOX = torch.tensor([[2.0, 3, 12, 9]])
PICTURE = torch.zeros(3, 20, 30, dtype=torch.uint8)


def target(**more: Any) -> dict[str, Any]:
    return {"boxes": BOX, "labels": torch.tensor([4]), **more}


@given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(["floats", "bytes", "array", "PIL", "grey"]))
def test_every_pixel_and_box_survives(seed: int, form: str, tmp_path_factory: pytest.TempPathFactory):
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (*rng.integers(3, 40, 2), 3)).astype(np.uint8)
    if form == "grey":
        rgb[..., 1:] = rgb[..., :1]
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    picture = {
        "floats": tensor.float() / 255, "bytes": tensor, "array": rgb, "PIL": PIL.fromarray(rgb), "grey": tensor[:1],
    }[form]  # fmt: skip
    corner = rng.uniform(1.5, 3, (3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.5, 9, (3, 2))], 1)
    labels = rng.integers(1, 5, 3)
    folder = tmp_path_factory.mktemp("dataset")
    truth = write_dataset([(picture, {"boxes": torch.from_numpy(boxes), "labels": labels.tolist()})], folder)
    (image,) = truth.images
    np.testing.assert_array_equal(np.asarray(PIL.open(folder / image.file_name).convert("RGB")), rgb)
    assert (image.height, image.width) == rgb.shape[:2]
    np.testing.assert_allclose(truth.bbox[:, :2] + truth.bbox[:, 2:], boxes[:, 2:])
    np.testing.assert_array_equal(truth.category_id, labels)
    again = read_ground_truth(folder / "annotation.json")
    np.testing.assert_array_equal(again.bbox, truth.bbox)
    assert again.images == truth.images


def test_labels_of_the_detector_become_category_ids_and_crowds_stay(tmp_path: Path):
    boxes = BOX.repeat(2, 1)
    item = (PICTURE, {"boxes": boxes, "labels": torch.tensor([0, 1]), "iscrowd": torch.tensor([1, 0])})
    truth = write_dataset([item], tmp_path, category_ids={0: 7, 1: 9})
    assert truth.category_id.tolist() == [7, 9]
    assert truth.iscrowd.tolist() == [True, False]


def test_image_ids_are_the_targets_where_all_have_one(tmp_path: Path):
    items = [(PICTURE, target(image_id=torch.tensor([5]))), (PICTURE, target(image_id=3))]
    assert [image.id for image in write_dataset(items, tmp_path).images] == [5, 3]
    assert [image.id for image in write_dataset([*items, (PICTURE, target())], tmp_path).images] == [1, 2, 3]
    with pytest.raises(DataError, match="same `image_id`"):
        write_dataset([items[0], items[0]], tmp_path)


def test_an_image_without_objects_is_one(tmp_path: Path):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    truth = write_dataset([(PICTURE, empty), (PICTURE, []), (PICTURE, target())], tmp_path)
    assert [len(rows) for rows in truth.by_image().values()] == [0, 0, 1]


@pytest.mark.parametrize(
    ("item", "error", "match"),
    [
        ((PICTURE.float() - 0.5, target()), DataError, r"item 1 go from -0\.5 .*Leave out the normalisation"),
        ((PICTURE.int(), target()), TypeError, "item 1 is int32"),
        ((PICTURE[:2], target()), TypeError, "item 1 must have three channels"),
        ((PICTURE, target(boxes=BOX / 30)), DataError, "item 1 look like shares"),
        ((PICTURE, target(boxes=BOX[:, [2, 3, 0, 1]])), DataError, "item 1 must be finite rows"),
        ((PICTURE, target(labels=torch.tensor([1, 2]))), DataError, "Item 1 .* 1 boxes and 2 labels"),
        ((PICTURE, {"boxes": BOX}), TypeError, "item 1 must have `boxes` and `labels`; it has boxes"),
        ((PICTURE, 3), TypeError, "item 1 must be a dict"),
        (PICTURE[0], TypeError, "Item 1 of the Dataset is no pair"),
    ],
)
def test_what_cannot_be_is_refused_by_position(item: Any, error: type, match: str, tmp_path: Path):
    with pytest.raises(error, match=match):
        write_dataset([(PICTURE, target()), item], tmp_path)


def test_boxes_that_say_another_format_are_refused(tmp_path: Path):
    from torchvision.tv_tensors import BoundingBoxes

    boxes = BoundingBoxes(BOX, format="XYWH", canvas_size=(20, 30))
    with pytest.raises(DataError, match="Convert them to XYXY"):
        write_dataset([(PICTURE, target(boxes=boxes))], tmp_path)
    exact = BoundingBoxes(BOX, format="XYXY", canvas_size=(20, 30))
    assert write_dataset([(PICTURE, target(boxes=exact))], tmp_path).bbox.tolist() == [[2, 3, 10, 6]]


def test_a_stream_without_length_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="must have a length"):
        write_dataset((item for item in ()), tmp_path)


def test_floats_between_two_greys_become_the_nearer(tmp_path: Path):
    picture = torch.tensor([[[10.4, 10.6], [0.0, 255.0]]]) / 255
    (image,) = write_dataset([(picture, [])], tmp_path).images
    assert np.asarray(PIL.open(tmp_path / image.file_name))[..., 0].tolist() == [[10, 11], [0, 255]]
