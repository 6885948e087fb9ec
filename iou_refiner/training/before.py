"""What keeps a training from teaching anything, said before the detector has run for hours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth
from iou_refiner.head.config import TrainedCategory
from iou_refiner.rescoring import category_map

#: With fewer validation images, the choice of settings is a matter of luck.
FEW_VAL_IMAGES = 100


def check_objects(ground_truth: GroundTruth, what: str) -> None:
    """Raise DataError unless the annotation has images, and objects to learn from.

    Args:
        ground_truth: the annotation.
        what: which it is, for the message.
    """
    if not ground_truth.images:
        raise DataError(f"The {what} annotation lists no images. Give one with `images` and their `annotations`.")
    if not len(ground_truth):
        raise DataError(
            f"The {what} annotation has no annotated objects in its {len(ground_truth.images):,} images: "
            "there is nothing to learn from. Is it the right file?"
        )
    if ground_truth.iscrowd.all():
        raise DataError(
            f"All {len(ground_truth):,} objects of the {what} annotation are crowds (iscrowd 1), whose boxes are no "
            "single objects: there is nothing to learn from. Set iscrowd to 0 where a box is one object."
        )
    if not _boxes(ground_truth).any():
        raise DataError(
            f"No object of the {what} annotation has a box with width and height. See: iou-refiner validate"
        )


def trained_categories(
    category_ids: Mapping[int, int] | None, ground_truth: GroundTruth, what: str = "training"
) -> tuple[TrainedCategory, ...]:
    """The categories with objects to learn from, by the detector's label.

    Args:
        category_ids: of the adapter.
        ground_truth: the annotation.
        what: which it is, for the message.

    Raises:
        DataError: detector and annotation share no category, or none of those shared has an object.
    """
    shared = category_map(category_ids, ground_truth)
    names = {category.id: category.name for category in ground_truth.categories}
    present = set(np.unique(ground_truth.category_id[~ground_truth.iscrowd & _boxes(ground_truth)]).tolist())
    trained = [TrainedCategory(category, names[category], label) for label, category in sorted(shared.items())]
    trained = [category for category in trained if category.id in present]
    if not trained:
        known = ", ".join(str(category) for category in sorted(present)[:5])
        raise DataError(
            f"None of the categories that the detector knows has an object in the {what} annotation; its objects are "
            f"of {known}. Give the adapter `category_ids`, a dict from its labels to these ids."
        )
    return tuple(trained)


def _boxes(ground_truth: GroundTruth) -> NDArray[np.bool_]:
    return np.asarray((ground_truth.bbox[:, 2:] > 0).all(1), np.bool_)
