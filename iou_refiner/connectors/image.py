"""The boxes of one image, from and to: arrays, the dicts of torchvision, ``supervision.Detections``, our own.

Whatever form they come in, what is asked for comes out. Only :func:`to_detections` loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import require

if TYPE_CHECKING:
    from iou_refiner.structures import Detections

_NAMES = ("boxes", "scores", "labels", "ious")


def to_numpy(image: Any) -> dict[str, NDArray[Any]]:
    """The boxes of one image as arrays.

    Args:
        image: :class:`Detections`; a dict of ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) and perhaps
            ``ious`` (N,), tensors, arrays or lists, as detectors and :class:`IoURefiner` return them; or
            ``supervision.Detections``, whose predicted IoU is ``data["iou"]``.

    Returns:
        ``boxes`` (N, 4) float64 xyxy, ``scores`` (N,) float64, ``labels`` (N,) int64, and ``ious`` (N,) float64 where
        there are some.

    Raises:
        TypeError: it is none of these, or a column is missing.
        ValueError: the columns are not of one length, boxes are not (N, 4), or labels are no whole numbers.
    """
    columns = {name: _array(value) for name, value in _columns(image).items() if value is not None}
    boxes = columns["boxes"].astype(np.float64).reshape(-1, 4) if not columns["boxes"].size else columns["boxes"]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"`boxes` must have shape (N, 4), rows (x1, y1, x2, y2), got {boxes.shape}.")
    for name, values in columns.items():
        if name != "boxes" and values.shape != (len(boxes),):
            raise ValueError(f"`{name}` must have shape ({len(boxes)},) to match `boxes`, got {values.shape}.")
    labels = columns["labels"]
    if not np.array_equal(labels, labels.astype(np.int64)):
        raise ValueError("`labels` must be whole numbers, the detector's numbers of its classes.")
    return {
        name: values.astype(np.int64 if name == "labels" else np.float64)
        for name, values in {**columns, "boxes": boxes}.items()
    }


def to_detections(image: Any) -> Detections:
    """The boxes of one image as :class:`Detections`: float32, the form that the functions of this package take.

    Args, Raises: as :func:`to_numpy`.
    """
    import torch

    from iou_refiner.structures import Detections

    columns = {name: torch.from_numpy(values.copy()) for name, values in to_numpy(image).items()}
    return Detections(**{name: v if name == "labels" else v.float() for name, v in columns.items()})


def to_supervision(image: Any, class_names: Sequence[str] | Mapping[int, str] | None = None) -> Any:
    """The boxes of one image as ``supervision.Detections``, with the predicted IoU of each in ``data["iou"]``.

    Args:
        image: as for :func:`to_numpy`.
        class_names: the name of each label, for ``data["class_name"]``, which supervision's annotators show.

    Raises:
        MissingPackageError: supervision is not installed. TypeError, ValueError: as :func:`to_numpy`.
    """
    kind = require("supervision", extra="supervision", purpose="Detections of supervision").Detections
    columns = to_numpy(image)
    data: dict[str, NDArray[Any]] = {}
    if "ious" in columns:
        data["iou"] = columns["ious"].astype(np.float32)
    if class_names is not None:
        named = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
        data["class_name"] = np.array([named.get(label, str(label)) for label in columns["labels"].tolist()], np.str_)
    return kind(
        xyxy=columns["boxes"].astype(np.float32),
        confidence=columns["scores"].astype(np.float32),
        class_id=columns["labels"],
        data=data,
    )


def _columns(image: Any) -> dict[str, Any]:
    """Boxes, scores, labels, and IoUs or None, as they are."""
    if isinstance(image, Mapping):
        missing = [name for name in _NAMES[:3] if name not in image]
        if missing:
            raise TypeError(f"The boxes of an image must have {', '.join(_NAMES[:3])}; {', '.join(missing)} missing.")
        return {name: image.get(name) for name in _NAMES}
    if hasattr(image, "xyxy") and hasattr(image, "class_id"):
        if image.confidence is None or image.class_id is None:
            lacking = "confidence" if image.confidence is None else "class_id"
            raise TypeError(f"`{lacking}` of these supervision.Detections is None, and is needed: scores and labels.")
        return {
            "boxes": image.xyxy, "scores": image.confidence, "labels": image.class_id, "ious": image.data.get("iou"),
        }  # fmt: skip
    if all(hasattr(image, name) for name in _NAMES):
        return {"boxes": image.boxes, "scores": image.scores, "labels": image.labels, "ious": image.ious}
    raise TypeError(
        "The boxes of an image must be Detections, a dict of boxes, scores and labels, or supervision.Detections, got "
        f"{type(image).__name__}."
    )


def _array(values: Any) -> NDArray[Any]:
    """An array of a tensor, wherever it is, of an array, or of a list."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
