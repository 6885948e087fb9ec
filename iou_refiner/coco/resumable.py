"""A results file that is written image by image: a run that stops, for whatever reason, goes on where it stopped.

Until all images are done they stand in a journal beside the output, ``OUT.partial``, one block an image. Blocks are
only ever added, so a process that is killed loses no more than the image it was at. A journal of another run is not
used, nor is anything from the first block on that is damaged or whose image file has changed. At the end the records
are copied to the output, which appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from iou_refiner.checks import DataError
from iou_refiner.coco.data import Image, Results
from iou_refiner.coco.journal import MAGIC, Block, blocks, checked, open_locked, read_identity, write
from iou_refiner.coco.write import encode_records, stream_to


def partial_path(path: Path) -> Path:
    """Where the journal of an output lies."""
    return path.with_name(path.name + ".partial")


class PartialResults:
    """Results of one run, image by image; a context manager. Leaving it by an error keeps what is whole.

    Args:
        path: of the output, .json or .json.gz.
        identity: all that decides the bytes of the output, by name: what is equal goes on, what differs begins anew.
        images: those that the output is of, in its order.
        content: the hash of an image's file as it is now.
        counts: the caller's counts before the first image.

    Attributes:
        todo: the images that are still to be done.
        records: how many records the images that are done have.
        counts: the caller's counts after these images.
        note: what became of an earlier run's journal, a sentence; empty where there was none.

    Raises:
        ValueError: another process writes this output, or a foreign file has the journal's name.
        FileNotFoundError: the folder of ``path`` does not exist.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, str],
        images: Sequence[Image],
        content: Callable[[Image], str],
        counts: Mapping[str, int],
    ) -> None:
        self.path, self.partial, self.images, self._content = path, partial_path(path), images, content
        self.done, self.records, self.counts, self.note = 0, 0, dict(counts), ""
        self._journal = open_locked(self.partial)
        size = os.fstat(self._journal.fileno()).st_size
        self._end = self._start = size
        try:
            if size:
                self._resume(dict(identity))
            if not self._start:
                self._begin(dict(identity))
        except BaseException:
            with suppress(OSError):
                if not size:
                    self.partial.unlink()
            self._journal.close()
            raise

    @property
    def todo(self) -> Sequence[Image]:
        """The images that are still to be done."""
        return self.images[self.done :]

    def add(self, results: Results, counts: Mapping[str, int]) -> None:
        """The results of the next image, on disk when this returns.

        Args:
            results: of the first image of ``todo``, also where it has none.
            counts: the caller's, over all images so far.

        Raises:
            DataError: a number is not finite.
            OSError: the disk is full, or failing.
        """
        image = self.images[self.done]
        body = encode_records(results, self.path)
        block = Block(image.id, self._content(image), len(results), len(body), dict(counts))
        self._append(msgspec.json.encode(block), body)
        self.done, self.records, self.counts = self.done + 1, self.records + len(results), block.counts

    def finish(self) -> None:
        """Write the output and remove the journal.

        Raises:
            OSError: it cannot be written; the journal stays.
            DataError: the journal was damaged meanwhile.
        """
        between, images = b"", 0
        with self.partial.open("rb") as journal, stream_to(self.path) as stream:
            journal.seek(self._start)
            stream.write(b"[\n")
            for block, body in blocks(journal):
                images += 1
                if block.records:
                    stream.write(between + body)
                    between = b",\n"
            if images != self.done:
                raise DataError(
                    f"{self.partial} was damaged after image {images:,} of {self.done:,} was read back. Is the disk "
                    "failing, or did something else write there? The same command goes on from that image."
                )
            stream.write(b"\n]\n")
        if os.name == "nt":  # which removes no file that is open
            self._journal.close()
        self.partial.unlink()

    def left(self) -> str:
        """What is on disk of a run that is not through, and how to go on, in words."""
        if not self.done:
            return f"{self.path} was not written, and nothing is kept."
        return (
            f"{self.path} was not written; {self.done:,} of {len(self.images):,} images are kept in {self.partial}. "
            "The same command goes on from there."
        )

    def __enter__(self) -> PartialResults:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the journal as it is, or none where no image is done."""
        with suppress(OSError):
            if error is not None and not self.done:
                self.partial.unlink()
        self._journal.close()

    def _resume(self, identity: dict[str, str]) -> None:
        """Take over the blocks of the journal that are of this run and of the images as they are now."""
        with self.partial.open("rb") as journal:
            before = read_identity(journal)
            self._start = self._end = journal.tell() if before == identity else 0
            if before is None:
                self.note = f"{self.partial} is damaged, and is not used: begun anew."
            elif before != identity:
                differs = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
                self.note = f"{self.partial} is of another run ({', '.join(differs)} differ), and is replaced."
            else:
                for block, _ in blocks(journal):
                    if not self._is_next(block):
                        break
                    self.done, self.records, self.counts = self.done + 1, self.records + block.records, block.counts
                    self._end = journal.tell()
        self._journal.truncate(self._end)
        self._journal.seek(self._end)
        if self.done:
            self.note = f"{self.partial}: resuming after {self.done:,} of {len(self.images):,} images."

    def _is_next(self, block: Block) -> bool:
        if self.done == len(self.images) or block.counts.keys() != self.counts.keys():
            return False
        image = self.images[self.done]
        return block.image == image.id and block.content == self._content(image)

    def _begin(self, identity: dict[str, str]) -> None:
        self._end = 0
        write(self._journal, MAGIC)
        self._end = len(MAGIC)
        self._append(msgspec.json.encode(identity), b"")
        self._start = self._end

    def _append(self, line: bytes, body: bytes) -> None:
        block = checked(line + b"\n" + body + b"\n")
        write(self._journal, block)
        self._end += len(block)
