"""How images reach the detector, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from iou_refiner.checks import check_number


@dataclass(frozen=True)
class Loading:
    """How images reach the detector. On a CPU none of it changes a result.

    Args:
        workers: threads that open and prepare images, or read them from a cache, ahead of their use; 0 for none.
        batch_images: images of one shape that go through the detector together, on a GPU; a CPU takes them one by one,
            which is quicker there.

    Raises:
        ValueError: a setting is out of range.
    """

    workers: int = 2
    batch_images: int = 8

    def __post_init__(self) -> None:
        check_number("workers", self.workers, 0, 256, whole=True)
        check_number("batch_images", self.batch_images, 1, 1024, whole=True)
