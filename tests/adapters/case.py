"""What the adapter contract needs of each framework: an adapter, images, and the framework's own result for them."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import ops

from examples import small_detectors
from iou_refiner import Adapter, Detections, FeatureMaps
from iou_refiner.detector.adapter import Suppression
from tests.kit.needs import DEV, needs_package, needs_shared

#: Every case built in this run, by name.
MEASURED: dict[str, Case] = {}


class Case:
    """An adapter with images as its detector takes them, and the detector's own suppression as a function.

    The methods fit torchvision; a framework that is called otherwise, or returns another form, overrides them.
    """

    #: Largest difference from the detector's own result, in pixels and scores; 0 is bit for bit.
    tolerance = 0.0
    #: What of the framework the adapter replaces, for the table at the end of the run.
    replaced = "postprocess_detections"
    #: The distribution the framework comes in, and what was measured of this case.
    package, measured = "torchvision", {}
    #: What the detector is called with beside images.
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, adapter: Adapter, rgb: list[np.ndarray]):
        self.adapter, self.rgb = adapter, rgb
        self.measured = {}
        self.images = [adapter.prepare(pixels)[0] for pixels in rgb]

    def call(self, detector: Any, images: Any) -> Any:
        """Call a detector, or what stands in its place, as the framework does."""
        with torch.no_grad():
            return detector(images, **self.options)

    def own(self) -> Any:
        """The detector's own result for all images, without any of our code."""
        return self.call(self.adapter.detector, self.images)

    def own_one(self) -> Any:
        """The same for the first image alone."""
        return self.call(self.adapter.detector, self.images[:1])

    def detect(self) -> Any:
        """The same for all images, from the adapter."""
        return self.adapter.detect(self.images, **self.options)

    def run(self, suppression: Suppression, images: Any) -> Any:
        """The adapter's call with ``suppression`` in place of the detector's own."""
        return self.adapter.run(suppression, images, **self.options)

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """The detector's own suppression, written as the contract has it."""
        own = getattr(self.adapter.detector, "roi_heads", self.adapter.detector)
        keep = [ops.batched_nms(c.boxes, c.scores, c.labels, own.nms_thresh) for c in candidates]
        return [c[rows[: own.detections_per_img]] for c, rows in zip(candidates, keep, strict=True)]

    def as_dicts(self, results: Any) -> list[dict[str, Tensor]]:
        """A result of the framework as one dict per image: ``boxes`` (N, 4) xyxy in pixels of the detector's input,
        ``scores``, ``labels``, ``ious`` where there are any, and whatever else follows the boxes, N rows each."""
        return list(results)

    def state(self) -> Any:
        """Everything a run might leave behind in the detector."""
        detector = self.adapter.detector
        modules = dict(detector.named_modules()) if isinstance(detector, nn.Module) else {"": detector}
        return self.adapter.fingerprint(), {
            name: (sorted(vars(module)), list(getattr(module, "_modules", {})), getattr(module, "training", None))
            for name, module in modules.items()
        }

    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From here on the detector has no candidates."""
        own = getattr(self.adapter.detector, "roi_heads", self.adapter.detector)
        monkeypatch.setattr(own, "score_thresh", 1.0)


def largest_difference(results: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """Between the boxes and scores of two results of the same form."""
    gaps = [
        (one[key].double() - other[key].double()).abs().max().item()
        for one, other in zip(results, expected, strict=True)
        for key in ("boxes", "scores")
    ]
    return max(gaps)


def noise(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Images of seeded noise, of the ``(height, width)`` given."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def photographs() -> list[np.ndarray]:
    """Two photographs of people, of different shapes; a skip where there are none."""
    folder = needs_shared() / "data" / "coco-person"
    listed = json.loads((folder / "instances_val.json").read_text())["images"]
    wide = next(image for image in listed if image["width"] > image["height"])
    tall = next(image for image in listed if image["width"] < image["height"])
    return [np.array(Image.open(folder / "images" / image["file_name"]).convert("RGB")) for image in (wide, tall)]


def example(name: str) -> Any:
    """A trained detector of examples/small_detectors.py; a skip where there is none."""
    needs_shared()
    if name == "faster_rcnn":
        needs_package("efficientnet_lite_pytorch", install=DEV)
    return getattr(small_detectors, name)()


def assert_same(results: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], tolerance: float = 0.0) -> None:
    """The same keys, dtypes and shapes, and values no further apart than ``tolerance``."""
    assert [sorted(result) for result in results] == [sorted(result) for result in expected]
    for one, other in zip(results, expected, strict=True):
        for key in one:
            torch.testing.assert_close(
                one[key], other[key], atol=tolerance, rtol=0, msg=lambda text, k=key: f"{k}: {text}"
            )


def keep_all(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that suppresses nothing."""
    return candidates


def keep_none(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that leaves no box."""
    return [image[:0] for image in candidates]
