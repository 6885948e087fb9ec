"""From the bytes of an image file to 8-bit RGB in the orientation that the annotation's size tells, or a refusal.

The rules are stated in :mod:`iou_refiner.detector.images`.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np

from iou_refiner.checks import DataError
from iou_refiner.coco import Image

#: What is read, by PIL's names.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_DEEP_CURE = (
    "Which value is white is not written in it, so it is not scaled here. Save it with 8 bits a channel, scaled as the "
    "images were that the detector was trained on."
)
_ORIENTATION = 274  # the tag, in EXIF and in TIFF
# PIL's names of the turns that make each orientation upright, and of those that undo them.
_TURNS = {
    2: ("FLIP_LEFT_RIGHT", "FLIP_LEFT_RIGHT"), 3: ("ROTATE_180", "ROTATE_180"), 4: ("FLIP_TOP_BOTTOM",) * 2,
    5: ("TRANSPOSE", "TRANSPOSE"), 6: ("ROTATE_270", "ROTATE_90"), 7: ("TRANSVERSE",) * 2,
    8: ("ROTATE_90", "ROTATE_270"),
}  # fmt: skip


def decode(pil: Any, data: bytes, image: Image) -> tuple[np.ndarray, bool]:
    """Decode an image file.

    Args:
        pil: the module ``PIL.Image``.
        data: the file.
        image: its entry in the annotation.

    Returns:
        Pixels (H, W, 3) uint8, and whether the file asks to be turned while the annotation's size fits either way.

    Raises:
        DataError: it is refused; the message goes on after the name of the file.
        Exception: whatever PIL raises at damaged files, which is much.
    """
    pil.init()
    with pil.open(BytesIO(data), formats=[name for name in FORMATS if name in pil.OPEN]) as file:
        expected = (image.width, image.height)
        if file.size not in (expected, expected[::-1]):
            raise _wrong_size(file.size, image)
        _check_depth(file, data)
        if getattr(file, "is_animated", False) and file.format != "MPO":
            raise DataError(
                "holds several pictures, and nothing says which of them was annotated. Save that one as a file of its "
                "own."
            )
        picture, undecided = _upright(pil, file, image)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # as PIL wants it; the colours are the same
        return np.asarray(picture.convert("RGB")), undecided


def _wrong_size(size: tuple[int, int], image: Image) -> DataError:
    return DataError(
        f"is {size[0]} x {size[1]} pixels, its annotation says {image.width} x {image.height}. The boxes would not "
        "fit; use the images the annotation was made for."
    )


def _check_depth(file: Any, data: bytes) -> None:
    """Raise DataError unless the file, opened but not decoded, has modes and bits that become 8-bit RGB for sure."""
    if file.mode not in _MODES:
        deep = file.mode in ("I", "F") or file.mode.startswith("I;16")
        cure = _DEEP_CURE if deep else "Save it as RGB."
        raise DataError(f"has pixels of mode {file.mode}, which are not 8-bit RGB or grey. {cure}")
    bits, signed = 8, False
    if file.format == "TIFF":
        bits = max(file.tag_v2.get(258, (1,)))
        signed = set(file.tag_v2.get(339, (1,))) - {1, 4} != set()  # sample format: unsigned, or not said
    elif file.format == "JPEG2000":
        bits, signed = _jpeg2000_depth(data)
    elif file.format == "PPM":
        arguments = file.tile[0][3]
        bits = arguments[-1].bit_length() if isinstance(arguments, tuple) else 8  # (mode, largest value)
    elif file.format == "PNG":
        bits = 16 if any(";16" in str(tile[3]) for tile in file.tile) else 8
    if bits > 8 or signed:
        kind = "signed" if signed else f"{bits} bits a channel in {file.mode}"
        raise DataError(f"has {kind} pixels. {_DEEP_CURE}")


def _jpeg2000_depth(data: bytes) -> tuple[int, bool]:
    """Most bits of a component, and whether one is signed, from the marker SIZ of the codestream (ISO 15444-1, A.5)."""
    start = data.index(b"\xff\x4f\xff\x51")
    count = int.from_bytes(data[start + 40 : start + 42], "big")
    depths = data[start + 42 : start + 42 + 3 * count : 3]
    return max((depth & 0x7F) + 1 for depth in depths), any(depth & 0x80 for depth in depths)


def _orientation(file: Any) -> int:
    value = file.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and value in _TURNS else 1


def _upright(pil: Any, file: Any, image: Image) -> tuple[Any, bool]:
    """The picture in the orientation that the annotation's size tells, and whether it tells none."""
    orientation = _orientation(file)
    file.load()
    picture, expected = file, (image.width, image.height)
    if orientation == 1:
        if file.size != expected:
            raise _wrong_size(file.size, image)
        return picture, False
    turn, back = (pil.Transpose[name] for name in _TURNS[orientation])
    if _orientation(file) == 1:  # PIL turns a TIFF while it decodes it
        picture = picture.transpose(back)
    across = orientation >= 5  # width and height change places
    turned_size = picture.size[::-1] if across else picture.size
    if picture.size == expected:
        return picture, turned_size == expected
    if turned_size == expected:
        return picture.transpose(turn), False
    raise _wrong_size(picture.size, image)
