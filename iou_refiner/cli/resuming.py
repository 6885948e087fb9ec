"""How `dump` and `rescore` write: image by image, and where a run was stopped the same command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iou_refiner import __version__
from iou_refiner.cli.console import Console
from iou_refiner.cli.inputs import detector_files
from iou_refiner.files import content_hash

if TYPE_CHECKING:
    from iou_refiner.coco import Image
    from iou_refiner.coco.resumable import PartialResults
    from iou_refiner.detector.adapter import Adapter


def run_identity(
    adapter: Adapter, spec: str, images: Sequence[Image], console: Console, *, cached: bool, **more: Any
) -> dict[str, str]:
    """All that decides the bytes of an output, by name, but for the images' content, which is looked at one by one.

    Args:
        adapter, spec: the detector, and what the command line calls it: one file may have several, of the same weights.
        images: those that are done, in this order.
        console: of the command, for seed and device.
        cached: whether features go through a cache, which rounds them.
        more: of the command; a Path stands for the file's content, all else for itself.
    """
    import torch

    about = {
        "version": __version__,
        "torch": str(torch.__version__),
        "seed": console.seed,
        "device": console.torch_device().type,
        "detector": spec,
        "detector's weights": adapter.fingerprint(),
        "detector's settings": [adapter.settings(), sorted((adapter.category_ids or {}).items())],
        "detector's code": [content_hash(path) for path in detector_files(spec) if path.suffix == ".py"],
        "images": hashlib.sha256(json.dumps([image.id for image in images]).encode()).hexdigest(),
        "precision": "float16" if cached else "float32",
    }
    contents = {name: content_hash(value) if isinstance(value, Path) else value for name, value in more.items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in (about | contents).items()}


@contextmanager
def resuming(
    output: Path,
    folder: Path,
    images: Sequence[Image],
    identity: Mapping[str, str],
    counts: Mapping[str, int],
    console: Console,
    cache: Path | None,
) -> Iterator[PartialResults]:
    """The output as it is so far; once all of its ``todo`` is added it is written, else what is done is kept, and said.

    Args:
        output: the file to write.
        folder: of the images.
        images, identity, counts: as for :class:`PartialResults`.
        console: for notes, and for what an interrupt says.
        cache: where features are kept, if they are.

    Raises:
        UsageError: another process writes the same output, or a foreign file is in the way.
    """
    from iou_refiner.coco.resumable import PartialResults
    from iou_refiner.detector.images import ImageFolder

    with console.usage():
        partial = PartialResults(output, identity, images, ImageFolder(folder).content, counts)
    with partial:
        if partial.note:
            console.note(partial.note)
        try:
            yield partial
            partial.finish()
        except BaseException as error:
            features = f" The features of the images done are kept in {cache}." if cache else ""
            console.after_interrupt = partial.left() + features
            if partial.done and isinstance(error, Exception):
                console.note(console.after_interrupt)
            raise
