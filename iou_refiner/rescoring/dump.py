"""A detector's candidates before suppression, as COCO results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from iou_refiner.coco import GroundTruth, Image, Results
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.rescoring.records import category_map, clipped, has_size
from iou_refiner.stage.summary import dropped_in_words


@dataclass
class DumpSummary:
    """What became of a detector's candidates in a dump: every one of them is counted.

    Law: ``candidates == records + sum(dropped.values())``.

    Attributes:
        images: number of images.
        candidates: boxes that the detector had before suppression.
        records: boxes that were kept.
        other_categories: boxes dropped since the annotation does not have their category.
        not_finite: boxes dropped since a coordinate or the score is not finite.
        beyond: boxes dropped since their image has more than ``top``.
        empty: boxes dropped since they have no width or no height.
        outside: boxes dropped since they lie outside of their image.
    """

    images: int = 0
    candidates: int = 0
    records: int = 0
    other_categories: int = 0
    not_finite: int = 0
    beyond: int = 0
    empty: int = 0
    outside: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Boxes that were not kept, by the reason."""
        reasons = {"of other categories": self.other_categories, "not finite": self.not_finite}
        return reasons | {"beyond top": self.beyond, "empty": self.empty, "outside the image": self.outside}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: asdict(self)[name] for name in ("images", "candidates", "records")} | {"dropped": self.dropped}

    def __str__(self) -> str:
        parts = [f"{self.images:,} images", f"{self.candidates:,} candidates", f"{self.records:,} kept"]
        return "; ".join(parts + dropped_in_words(self.dropped))


def dump_candidates(
    source: FeatureSource,
    category_ids: Mapping[int, int] | None,
    ground_truth: GroundTruth,
    *,
    top: int = 1000,
    images: Iterable[Image] | None = None,
    summary: DumpSummary | None = None,
) -> Iterator[Results]:
    """A detector's candidates before suppression as COCO results, one image at a time.

    Only finite candidates of the annotation's categories are kept, and of each image the ``top`` of them by score.

    Args:
        source: of the features.
        category_ids: of the adapter.
        ground_truth: the annotation; only its images and categories are read.
        top: candidates per image.
        images: those to dump; default all of the annotation.
        summary: where to count what is kept and what is dropped.
    """
    shared = category_map(category_ids, ground_truth)
    labels = torch.tensor(sorted(shared), dtype=torch.int64)
    counts = summary or DumpSummary()
    for image in ground_truth.images if images is None else images:
        extraction = source(image)
        candidates = extraction.candidates.to("cpu")
        known = candidates[torch.isin(candidates.labels, labels)]
        finite = known[torch.isfinite(known.boxes).all(1) & torch.isfinite(known.scores)]
        best = finite[finite.scores.argsort(descending=True, stable=True)[:top]]
        results = clipped(image, extraction, best, shared)
        mask = has_size(results)
        empty = int((~mask & (best.boxes[:, 2:] <= best.boxes[:, :2]).any(1).numpy()).sum())
        counts.images += 1
        counts.candidates += len(candidates)
        counts.other_categories += len(candidates) - len(known)
        counts.not_finite += len(known) - len(finite)
        counts.beyond += len(finite) - len(best)
        counts.empty += empty
        counts.outside += int((~mask).sum()) - empty
        counts.records += int(mask.sum())
        yield results[mask]
