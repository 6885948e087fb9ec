"""What is noticed of images and caches on the way, until it is told."""

from __future__ import annotations

from iou_refiner.detector.features import Extraction


class Noticed:
    """What was noticed of images.

    Attributes:
        stale: entries of a cache that turned out to be of other images.
    """

    def __init__(self) -> None:
        self.stale = 0
        self._undecided: set[int] = set()
        self._told: set[int] = set()

    def add(self, extraction: Extraction) -> None:
        """Take note of an extraction that is handed out."""
        if extraction.undecided and extraction.image_id not in self._told:
            self._undecided.add(extraction.image_id)

    def notes(self) -> list[str]:
        """What the user should know since this was last called, a sentence each."""
        told = []
        if self.stale == 1:
            told.append("1 entry of the cache was of another image and was extracted anew.")
        elif self.stale:
            told.append(f"{self.stale:,} entries of the cache were of other images and were extracted anew.")
        if self._undecided:
            told.append(
                "EXIF orientation is not applied, as in COCO, where the annotation's size fits either way: "
                f"{len(self._undecided):,} of the images (first: {min(self._undecided)})."
            )
        self._told |= self._undecided
        self.stale, self._undecided = 0, set()
        return told
