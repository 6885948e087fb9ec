"""What cannot teach is refused, and what a head was trained on is recorded."""

from __future__ import annotations

import pytest

from iou_refiner import DataError
from iou_refiner.head.config import TrainedCategory
from iou_refiner.training.before import check_objects, trained_categories
from tests.kit.scenes import make_truth

BOX, FLAT = (1, 1, 5, 5), (1, 1, 0, 5)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "no annotated objects in its 1 images"),
        ([(1, 0, BOX, True), (1, 0, BOX, True)], "All 2 objects of the training annotation are crowds"),
        ([(1, 0, FLAT, False)], "No object of the training annotation has a box with width and height"),
    ],
)
def test_data_without_objects_is_refused(annotations, message):
    with pytest.raises(DataError, match=message):
        check_objects(make_truth([1], [0], annotations), "training")
    check_objects(make_truth([1], [0], [*annotations, (1, 0, BOX, False)]), "training")


def test_an_annotation_without_images_is_refused():
    with pytest.raises(DataError, match="The validation annotation lists no images"):
        check_objects(make_truth([], [0]), "validation")


def test_only_categories_with_objects_count_as_trained():
    rows = [(1, 3, BOX, False), (1, 5, BOX, True), (1, 8, FLAT, False), (1, 9, BOX, False)]
    truth = make_truth([1], [3, 5, 7, 8, 9], rows)
    assert trained_categories({0: 3, 1: 5, 2: 7, 3: 8, 4: 9}, truth) == (
        TrainedCategory(3, "thing 3", 0), TrainedCategory(9, "thing 9", 4),
    )  # fmt: skip
    assert [category.label for category in trained_categories(None, truth)] == [3, 9]
    with pytest.raises(DataError, match="None of the categories that the detector knows has an object in the training"):
        trained_categories({0: 5, 1: 7}, truth)
    with pytest.raises(DataError, match="share no category"):
        trained_categories({0: 70}, truth)
