"""Images of a data set: the pixels that an annotation was made for, or an error that says why there are none.

A wrong picture is worse than none, so what is not sure is refused by name:

- **Names** are relative to the folder of the images and stay in it; links inside the folder may lead anywhere.
- **Files** are plain files: a folder, a pipe or a device is refused, and none of them is waited for.
- **Formats** are those of photographs (``FORMATS``). PIL knows more, among them some that start other programs.
- **Sizes**: the file's header is compared with the annotation before pixels are decoded, and both with a bound, PIL's.
- **Colours** are as stored. Grey is repeated, a palette looked up, CMYK and YCbCr converted as PIL does, without colour
  profiles; transparency is dropped and what lies under it stays, as COCO's own tools have it.
- **Depth**: 8 bits a channel, or fewer. With 16 bits, 32 bits or floats, nothing in the file says which value is white
  (many microscopes use 12 of 16 bits), so they are refused: black or white pictures would come out.
- **Several pictures** in one file (animations, stacks of pages) are refused, as nothing says which was annotated. A
  telephone's JPEG with a preview or depth map behind the picture (MPO) is that picture.
- **Orientation** (EXIF): where the annotation's width and height are those of the picture as turned, it is turned;
  where they are those of the stored pixels, it is not. Where both fit, as with squares and half turns, the pixels are
  as stored, as in COCO, and :attr:`Picture.undecided` says so.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iou_refiner.checks import DataError, require
from iou_refiner.coco import Image
from iou_refiner.detector.decoding import FORMATS, decode


class Picture(NamedTuple):
    """An image of a data set, read.

    Attributes:
        rgb: (H, W, 3) uint8.
        content: SHA-256 of the file.
        undecided: whether the file asks to be turned, and the annotation's size fits the pixels either way.
    """

    rgb: np.ndarray
    content: str
    undecided: bool


class ImageFolder:
    """The images of a data set.

    Args:
        folder: the one that the names of the annotation start from.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._contents: dict[Path, tuple[tuple[int, ...], str]] = {}

    def open(self, image: Image) -> Picture:
        """Read an image.

        Raises:
            DataError: it is missing, unreadable, not of the size the annotation gives, or one of what this module
                refuses; names image and file.
        """
        pil = require("PIL.Image", extra="torchvision", purpose="Reading images")
        path = self.path(image)
        data = _read(path, image)
        try:
            rgb, undecided = decode(pil, data, image)
        except DataError as error:
            raise _refused(image, path, str(error)) from None
        except pil.UnidentifiedImageError:
            raise _refused(
                image,
                path,
                f"is no image of a format read here ({', '.join(FORMATS)}). Save it as PNG, or copy it again.",
            ) from None
        except pil.DecompressionBombError as error:
            raise _refused(image, path, f"is too large ({error}). Its annotation says {_size(image)}.") from None
        except Exception as error:  # a damaged file has a hundred ways to fail
            what = f"cannot be read ({type(error).__name__}: {error}). It is damaged or cut off: copy it again."
            raise _refused(image, path, what) from None
        return Picture(rgb, hashlib.sha256(data).hexdigest(), undecided)

    def content(self, image: Image) -> str:
        """SHA-256 of the file of an image. It is read once, and again only where its time or size have changed.

        Raises:
            DataError: as :meth:`open`, as far as it does not come to decoding.
        """
        path = self.path(image)
        try:
            about = path.stat()
        except (OSError, ValueError):
            return hashlib.sha256(_read(path, image)).hexdigest()  # which says what is wrong
        state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        before, content = self._contents.get(path, ((), ""))
        if state != before:
            content = hashlib.sha256(_read(path, image)).hexdigest()
            self._contents[path] = state, content
        return content

    def path(self, image: Image) -> Path:
        """Where the file of an image is.

        Raises:
            DataError: the name is none, or leaves the folder; or the annotation's size is none that an image can have.
        """
        _check_size(image)
        name = image.file_name
        if not name.strip() or "\0" in name:
            raise DataError(
                f"Image {image.id}: its file_name is {name!r}, which names no file. Name it in the annotation."
            )
        relative = Path(name)
        if relative.anchor or ".." in relative.parts:
            raise DataError(
                f"Image {image.id}: its file_name {name!r} leaves the folder of the images. Write names relative to "
                "it, or name the folder above with --images."
            )
        return self.folder / relative


def open_image(folder: str | Path, image: Image) -> np.ndarray:
    """The pixels (H, W, 3) uint8 RGB of an image of a data set: :meth:`ImageFolder.open`."""
    return ImageFolder(folder).open(image).rgb


def _refused(image: Image, path: Path, what: str) -> DataError:
    name = str(path)
    return DataError(f"Image {image.id}: {name if name.isprintable() else repr(name)} {what}")


def _size(image: Image) -> str:
    return f"{image.width} x {image.height}"


def _check_size(image: Image) -> None:
    """Raise DataError unless the annotation's size is one that an image can have."""
    if image.width < 1 or image.height < 1:
        raise DataError(
            f"Image {image.id}: its annotation says {_size(image)} pixels. Write the size of the image file."
        )
    pil = require("PIL.Image", extra="torchvision", purpose="Reading images")
    most = 2 * (pil.MAX_IMAGE_PIXELS or 2**62)  # above which PIL refuses too
    if image.width * image.height > most:
        raise DataError(
            f"Image {image.id}: its annotation says {_size(image)} pixels, more than the {most:,} that are read here "
            "(PIL.Image.MAX_IMAGE_PIXELS, twice). Cut the image into tiles, and annotate those."
        )


def _read(path: Path, image: Image) -> bytes:
    """The bytes of a plain file, at most as many as a picture of the annotation's size can need; never waits."""
    most = (64 << 20) + 16 * image.width * image.height
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            os.close(descriptor)
            raise _refused(image, path, "is a folder, a pipe or a device. Name an image file in the annotation.")
        with os.fdopen(descriptor, "rb") as stream:
            data = stream.read(min(most, about.st_size) + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise _refused(image, path, "does not exist. Check --images.") from None
    except OSError as error:
        raise _refused(
            image, path, f"cannot be read ({error.strerror}). Check its name, links and permissions."
        ) from None
    except UnicodeError:
        raise _refused(image, path, "is a name that no file can have. Write it anew in the annotation.") from None
    if not data:
        raise _refused(image, path, "is empty (0 bytes). Copy it again.")
    if len(data) > most:
        raise _refused(
            image, path, f"is larger than {most:,} bytes, too much for the annotation's {_size(image)} pixels."
        )
    return data
