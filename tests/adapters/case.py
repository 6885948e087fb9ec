"""What the adapter contract asks of each framework: an adapter, images, and the framework's own answer to them."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import ops

from iou_refiner import Detections, FeatureMaps
from tests.kit.paths import ROOT, SHARED

#: Every case built in this run, by name.
MEASURED: dict[str, Case] = {}


class Case:
    """An adapter with images as its detector takes them, and the detector's own suppression as a stage.

    The methods fit torchvision; a framework that is called otherwise, or answers in another form, overrides them.
    """

    #: Largest difference from the detector's own result, in pixels and scores; 0 is bit for bit.
    tolerance = 0.0
    #: What of the framework the adapter replaces, for the table at the end of the run.
    replaced = "postprocess_detections"
    #: The distribution the framework comes in, and what was measured of this case.
    package, measured = "torchvision", {}

    def __init__(self, adapter: Any, rgb: list[np.ndarray]):
        self.adapter, self.rgb = adapter, rgb
        self.measured = {}
        self.images = [adapter.prepare(pixels)[0] for pixels in rgb]

    def ask(self, detector: Any, images: Any) -> Any:
        """Call a detector, or what stands in its place, as the framework does."""
        with torch.no_grad():
            return detector(images)

    def own(self) -> Any:
        """The detector's own result for all images, without any of our code."""
        return self.ask(self.adapter.detector, self.images)

    def own_one(self) -> Any:
        """The same for the first image alone."""
        return self.ask(self.adapter.detector, self.images[:1])

    def call(self, stage: Any, images: Any) -> Any:
        """The adapter's call with ``stage`` in place of the suppression."""
        return self.adapter.run(stage, images)

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """The detector's own suppression, written as a stage."""
        own = getattr(self.adapter.detector, "roi_heads", self.adapter.detector)
        keep = [ops.batched_nms(c.boxes, c.scores, c.labels, own.nms_thresh) for c in candidates]
        return [c[rows[: own.detections_per_img]] for c, rows in zip(candidates, keep, strict=True)]

    def read(self, results: Any) -> list[dict[str, Tensor]]:
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


def largest_difference(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """Between the boxes and scores of two results of the same form."""
    gaps = [
        (one[key].double() - other[key].double()).abs().max().item()
        for one, other in zip(found, expected, strict=True)
        for key in ("boxes", "scores")
    ]
    return max(gaps)


def noise(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Images of seeded noise, of the ``(height, width)`` given."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def photographs() -> list[np.ndarray]:
    """Two photographs of people, of different shapes."""
    image = pytest.importorskip("PIL.Image")
    folder = SHARED / "data" / "coco-person"
    listed = json.loads((folder / "instances_val.json").read_text())["images"]
    wide = next(found for found in listed if found["width"] > found["height"])
    tall = next(found for found in listed if found["width"] < found["height"])
    return [np.array(image.open(folder / "images" / found["file_name"]).convert("RGB")) for found in (wide, tall)]


def example(name: str) -> Any:
    """A trained detector of examples/small_detectors.py; a skip where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no trained detectors: {SHARED} is not there (IOU_REFINER_SHARED names another place)")
    if name == "faster_rcnn":
        pytest.importorskip("efficientnet_lite_pytorch", reason="its backbone needs efficientnet-lite-pytorch")
    spec = importlib.util.spec_from_file_location("small_detectors", ROOT / "examples" / "small_detectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], tolerance: float = 0.0) -> None:
    """The same keys, dtypes and shapes, and values no further apart than ``tolerance``."""
    assert [sorted(result) for result in found] == [sorted(result) for result in expected]
    for one, other in zip(found, expected, strict=True):
        for key in one:
            torch.testing.assert_close(
                one[key], other[key], atol=tolerance, rtol=0, msg=lambda text, k=key: f"{k}: {text}"
            )


def keep_all(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A stage that suppresses nothing."""
    return candidates


def keep_none(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A stage that finds nothing."""
    return [found[:0] for found in candidates]
