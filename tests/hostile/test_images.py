"""Image files: the picture that the annotation was made for, or an error that names image, file and cure."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner import DataError
from iou_refiner.coco import Image
from iou_refiner.detector.images import FORMATS, ImageFolder, open_image

W, H = 7, 5
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), np.uint8)
GREY = RNG.integers(0, 256, (H, W), np.uint8)
DEEP = RNG.integers(0, 65536, (H, W), np.uint16)


def saved(picture: PIL.Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    picture = picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture)
    stream = BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def with_orientation(orientation: int, pixels: np.ndarray, format: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    return saved(pixels, format, exif=exif, **options)


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG of a header (width, height, bits, colours, 0, 0, 0) and its uncompressed rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(colours: int, channels: int) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in RNG.integers(0, 4096, (H, W * channels)).astype(">u2"))
    return png(struct.pack(">IIBBBBB", W, H, 16, colours, 0, 0, 0), rows)


def palette(transparency: bytes | int | None = None) -> bytes:
    picture = PIL.Image.fromarray(RGB).quantize(8)
    return saved(picture, **({} if transparency is None else {"transparency": transparency}))


def tiff(pixels: np.ndarray, **tags: tuple[int, ...]) -> bytes:
    """A TIFF of one strip; ``tags`` ``t258=(16,)`` and the like replace what follows from the pixels (SHORTs)."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = pixels.dtype.itemsize * 8
    fields = {256: (W,), 257: (H,), 258: (bits,) * channels, 259: (1,), 262: (2 if channels > 1 else 1,), 273: (8,),
              277: (channels,), 278: (H,), 279: (pixels.nbytes,)}  # fmt: skip
    fields |= {int(name[1:]): value for name, value in tags.items()}
    body = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    start, entries, extra = 8 + len(body), b"", b""
    after = start + 2 + 12 * len(fields) + 4
    for tag, value in sorted(fields.items()):
        packed = struct.pack(f"<{len(value)}H", *value)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack("<I", after + len(extra))
        entries += struct.pack("<HHI", tag, 3, len(value)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(fields)) + entries + bytes(4) + extra


def animation(format: str) -> bytes:
    first, second = PIL.Image.fromarray(RGB), PIL.Image.fromarray(255 - RGB)
    return saved(first, format, save_all=True, append_images=[second])


def composed(mode: str) -> np.ndarray:
    """The picture in a mode, as PIL makes RGB of it."""
    return np.asarray(PIL.Image.fromarray(RGB).convert(mode).convert("RGB"))


TRANSPARENT = np.dstack([RGB, GREY])
TRANSPARENT[0, 0, 3] = 0
GREY3 = np.repeat(GREY[:, :, None], 3, 2)
PALETTE = np.asarray(PIL.Image.fromarray(RGB).quantize(8).convert("RGB"))

# --- what is read, and as what ---------------------------------------------------------------------------------------

RIGHT: dict[str, tuple[bytes, np.ndarray]] = {
    "RGB": (saved(RGB), RGB),
    "RGB as BMP": (saved(RGB, "BMP"), RGB),
    "RGB as TIFF": (saved(RGB, "TIFF"), RGB),
    "RGB as compressed TIFF": (saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "RGB as TIFF by hand": (tiff(RGB), RGB),
    "RGB as PPM": (saved(RGB, "PPM"), RGB),
    "RGB as WebP": (saved(RGB, "WEBP", lossless=True), RGB),
    "RGB as JPEG 2000": (saved(RGB, "JPEG2000"), RGB),
    "grey": (saved(GREY), GREY3),
    "grey as PGM": (saved(GREY, "PPM"), GREY3),
    "grey as TIFF": (tiff(GREY), GREY3),
    "grey as TIFF, white is zero": (tiff(255 - GREY, t262=(0,)), GREY3),
    "grey of 4 bits": (png(struct.pack(">IIBBBBB", W, H, 4, 0, 0, 0, 0), b"\0\x0f\x0f\x0f\x0f" * H),
                       np.repeat(np.tile(np.array([0, 255] * 4, np.uint8)[:W], (H, 1))[:, :, None], 3, 2)),
    "grey and alpha: the grey under it": (saved(np.dstack([GREY, 255 - GREY])), GREY3),
    "RGB and alpha: the colours under it": (saved(TRANSPARENT), RGB),
    "RGB and alpha as TIFF": (saved(TRANSPARENT, "TIFF"), RGB),
    "RGB with a transparent colour": (saved(RGB, transparency=tuple(RGB[0, 0].tolist())), RGB),
    "black and white": (saved(PIL.Image.fromarray(GREY > 127)), np.where(GREY3 > 127, 255, 0).astype(np.uint8)),
    "palette": (palette(), PALETTE),
    "palette with a transparent entry": (palette(3), PALETTE),
    "palette with transparencies": (palette(bytes([0, 128, 255])), PALETTE),
    "palette as GIF": (saved(PIL.Image.fromarray(RGB).quantize(8), "GIF"), PALETTE),
    "CMYK as TIFF": (saved(PIL.Image.fromarray(RGB).convert("CMYK"), "TIFF"), composed("CMYK")),
    "YCbCr as TIFF": (saved(PIL.Image.fromarray(RGB).convert("YCbCr"), "TIFF"), composed("YCbCr")),
}  # fmt: skip


@pytest.mark.parametrize(("data", "pixels"), RIGHT.values(), ids=RIGHT)
def test_what_is_sure_is_read(tmp_path: Path, data: bytes, pixels: np.ndarray):
    (tmp_path / "a").write_bytes(data)
    picture = ImageFolder(tmp_path).open(Image(3, "a", W, H))
    assert picture.rgb.dtype == np.uint8
    np.testing.assert_array_equal(picture.rgb, pixels)
    assert not picture.undecided


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_read_as_pil_reads_it(tmp_path: Path, mode: str):
    data = saved(PIL.Image.fromarray(RGB).convert(mode), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.asarray(PIL.Image.open(BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(open_image(tmp_path, Image(3, "a.jpg", W, H)), expected)


def test_the_first_picture_of_a_telephone_is_read(tmp_path: Path):
    first = PIL.Image.fromarray(RGB)
    data = saved(first, "MPO", save_all=True, append_images=[PIL.Image.fromarray(255 - RGB)])
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.asarray(PIL.Image.open(BytesIO(saved(first, "JPEG"))).convert("RGB"))
    np.testing.assert_array_equal(open_image(tmp_path, Image(3, "a.jpg", W, H)), expected)


# --- what is refused, and what the message names ---------------------------------------------------------------------

DEEP_CURE = "Save it with 8 bits"
BROKEN = "damaged or cut off: copy it again"
NO_FORMAT = r"no image of a format read here \(JPEG, PNG, .*\)\. Save it as PNG, or copy it again"

WRONG: dict[str, tuple[bytes, str]] = {
    "16-bit grey PNG": (saved(DEEP), f"mode I;16.*{DEEP_CURE}"),
    "16-bit grey PNG of 12 bits": (deep_png(0, 1), f"mode I;16.*{DEEP_CURE}"),
    "16-bit grey and alpha": (deep_png(4, 2), f"16 bits.*{DEEP_CURE}"),
    "16-bit RGB PNG": (deep_png(2, 3), f"16 bits.*{DEEP_CURE}"),
    "16-bit RGBA PNG": (deep_png(6, 4), f"16 bits.*{DEEP_CURE}"),
    "16-bit grey TIFF": (saved(DEEP, "TIFF"), f"mode I;16.*{DEEP_CURE}"),
    "16-bit RGB TIFF": (tiff(np.dstack([DEEP] * 3)), f"16 bits.*{DEEP_CURE}"),
    "big-endian 16-bit TIFF": (saved(PIL.Image.frombytes("I;16B", (W, H), DEEP.tobytes()), "TIFF"),
                               f"mode I;16B?.*{DEEP_CURE}"),
    "signed 16-bit TIFF": (tiff(DEEP.view(np.int16), t339=(2,)), f"mode I,.*{DEEP_CURE}"),
    "signed 8-bit TIFF": (tiff(GREY, t339=(2,)), f"signed.*{DEEP_CURE}"),
    "int32 TIFF": (saved(DEEP.astype(np.int32), "TIFF"), f"mode I,.*{DEEP_CURE}"),
    "float TIFF": (saved((GREY / 255).astype(np.float32), "TIFF"), f"mode F,.*{DEEP_CURE}"),
    "16-bit PGM": (b"P5 7 5 65535\n" + DEEP.tobytes(), f"mode I(;16B?)?,.*{DEEP_CURE}"),
    "16-bit PPM": (b"P6 7 5 65535\n" + np.dstack([DEEP] * 3).tobytes(), f"16 bits.*{DEEP_CURE}"),
    "16-bit plain PPM": (b"P3 7 5 65535\n" + b"40000 " * (3 * W * H), f"16 bits.*{DEEP_CURE}"),
    "float PFM": (b"Pf\n7 5\n-1.0\n" + GREY.astype(np.float32).tobytes(), f"mode F,.*{DEEP_CURE}"),
    "16-bit JPEG 2000": (saved(DEEP, "JPEG2000"), f"mode I;16.*{DEEP_CURE}"),
    "LAB": (saved(PIL.Image.frombytes("LAB", (W, H), RGB.tobytes()), "TIFF"), "mode LAB.*Save it as RGB"),
    "an animated GIF": (animation("GIF"), "several pictures.*Save that one"),
    "an animated PNG": (animation("PNG"), "several pictures.*Save that one"),
    "an animated WebP": (animation("WEBP"), "several pictures.*Save that one"),
    "a stack of TIFF pages": (animation("TIFF"), "several pictures.*Save that one"),
    "nothing": (b"", r"is empty \(0 bytes\)\. Copy it again"),
    "text": (b"no such file", NO_FORMAT),
    "the page of an error": (b"<!DOCTYPE html><title>404</title>", NO_FORMAT),
    "zeros": (bytes(1000), NO_FORMAT),
    "PostScript, which PIL runs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n", NO_FORMAT),
    "an icon": (saved(RGB, "ICO"), NO_FORMAT),
    "a PNG of its signature alone": (b"\x89PNG\r\n\x1a\n", f"{NO_FORMAT}|{BROKEN}"),
    "half a PNG": (saved(RGB)[:60], BROKEN),
    "half a JPEG": (saved(RGB, "JPEG")[:-30], BROKEN),
    "half a BMP": (saved(RGB, "BMP")[:80], BROKEN),
    "half a TIFF": (tiff(RGB)[:60], f"{NO_FORMAT}|{BROKEN}"),
    "half a JPEG 2000": (saved(RGB, "JPEG2000")[:-20], BROKEN),
    "half a WebP": (saved(RGB, "WEBP")[:-10], f"{NO_FORMAT}|{BROKEN}"),
    "a PNG whose rows are no rows": (png(struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0), b"\xff" * 10), BROKEN),
    "other sizes": (saved(np.zeros((H, W + 1, 3), np.uint8)), r"is 8 x 5 pixels, its annotation says 7 x 5"),
    "sides changed": (saved(np.zeros((W, H, 3), np.uint8)), r"is 5 x 7 pixels, its annotation says 7 x 5"),
    "a bomb of 10 gigapixels": (png(struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), b""),
                                r"too large \(.*10000000000 pixels.*\)\. Its annotation says 7 x 5"),
    "a small bomb": (png(struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0), b""), "is 9000 x 9000 pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "names"), WRONG.values(), ids=WRONG)
def test_what_is_not_sure_is_refused_by_name(tmp_path: Path, data: bytes, names: str):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"^Image 3: .*a\.png .*({names})"):
        open_image(tmp_path, Image(3, "a.png", W, H))


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(saved(np.zeros((400, 300, 3), np.uint8)))
    monkeypatch.setattr(PIL.Image.Image, "convert", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(DataError, match="is 300 x 400 pixels, its annotation says 7 x 5"):
        open_image(tmp_path, Image(3, "a.png", W, H))


# --- names and files -------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    held = socket.socket(socket.AF_UNIX)
    held.bind(os.path.relpath(path))
    held.close()


NAMES: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "missing": ("a.png", None, r"/a\.png does not exist\. Check --images"),
    "below a file": ("b/a.png", lambda p: p.parent.write_bytes(b"x"), "does not exist"),
    "a folder": ("a.png", Path.mkdir, "is a folder, a pipe or a device"),
    "a pipe that nobody writes to": ("a.png", pipe, "is a folder, a pipe or a device"),
    "a link to an endless device": ("a.png", lambda p: p.symlink_to("/dev/zero"), "is a folder, a pipe or a device"),
    "a link to itself": ("a.png", lambda p: p.symlink_to(p), "cannot be read .*links"),
    "a link to nothing": ("a.png", lambda p: p.symlink_to("nothing"), "does not exist"),
    "a socket": ("a.png", unix_socket, "cannot be read|is a folder, a pipe or a device"),
    "no name": ("", None, "file_name is '', which names no file"),
    "blanks": ("  ", None, "file_name is '  ', which names no file"),
    "NUL": ("a\0.png", None, r"file_name is 'a\\x00\.png', which names no file"),
    "the folder": (".", None, "is a folder"),
    "a folder up": ("../a.png", None, "'../a.png' leaves the folder .*Write names relative to it"),
    "up in the middle": ("b/../../a.png", None, "leaves the folder"),
    "absolute": ("/images/a.png", None, "'/images/a.png' leaves the folder"),
    "longer than names can be": ("a" * 5000, None, "cannot be read .*name"),
    "a lone surrogate": ("\ud800.png", None, "a name that no file can have"),
    "terminal codes": ("\x1b[2J.png", None, r"'[^\x1b]*\\x1b\[2J\.png' does not exist"),
    "a line end": ("a\nb.png", None, r"a\\nb\.png' does not exist"),
}


@pytest.mark.parametrize(("name", "make", "names"), NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("what", ["open", "content"])
def test_names_that_name_no_file(tmp_path: Path, monkeypatch, name: str, make, names: str, what: str):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(saved(RGB))  # which ../a.png would read
    if make:
        make(folder / name)
    with pytest.raises(DataError, match=rf"^Image 3: .*({names})") as raised:
        getattr(ImageFolder(folder), what)(Image(3, name, W, H))
    assert "\x1b" not in str(raised.value)


def test_names_that_are_right(tmp_path: Path):
    (tmp_path / "train").mkdir()
    for name in ("train/ä b.png", "..png", "C:a.png", "train/…[1].png"):
        (tmp_path / name).write_bytes(saved(RGB))
        np.testing.assert_array_equal(open_image(tmp_path, Image(3, name, W, H)), RGB)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "train")
    np.testing.assert_array_equal(open_image(tmp_path, Image(3, "elsewhere/ä b.png", W, H)), RGB)


@pytest.mark.parametrize(
    ("size", "names"),
    [
        ((0, H), "says 0 x 5 pixels. Write the size"),
        ((W, -5), "says 7 x -5 pixels. Write the size"),
        ((10**9, 10**9), r"more than the [\d,]+ that are read here .*Cut the image into tiles"),
        ((2**62, 1), "more than the"),
        ((W + 1, H), "is 7 x 5 pixels, its annotation says 8 x 5"),
    ],
)
def test_sizes_that_no_image_has(tmp_path: Path, size: tuple[int, int], names: str):
    (tmp_path / "a.png").write_bytes(saved(RGB))
    with pytest.raises(DataError, match=f"^Image 3: .*{names}"):
        open_image(tmp_path, Image(3, "a.png", *size))


def test_a_file_too_large_for_its_annotation_is_not_read_to_its_end(tmp_path: Path):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(saved(RGB))
        file.truncate(1 << 40)  # sparse
    with pytest.raises(DataError, match=r"Image 3: .*a\.png is larger than [\d,]+ bytes, too much"):
        open_image(tmp_path, Image(3, "a.png", W, H))


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_where_the_annotation_was_made_for_the_turned_one(tmp_path, format, orientation):
    data = with_orientation(orientation, RGB, format)
    (tmp_path / "a").write_bytes(data)
    folder, across = ImageFolder(tmp_path), orientation >= 5
    stored = folder.open(Image(1, "a", W, H))
    np.testing.assert_array_equal(stored.rgb, RGB)
    assert stored.undecided == (orientation in (2, 3, 4))  # either way as wide and high
    if across:
        from PIL.ImageOps import exif_transpose

        turned = folder.open(Image(2, "a", H, W))
        np.testing.assert_array_equal(turned.rgb, np.asarray(exif_transpose(PIL.Image.open(BytesIO(data)))))
        assert not turned.undecided
    else:
        with pytest.raises(DataError, match="is 7 x 5 pixels, its annotation says 5 x 7"):
            folder.open(Image(2, "a", H, W))
    with pytest.raises(DataError, match="its annotation says 7 x 7"):
        folder.open(Image(2, "a", W, W))


def test_where_the_first_pixel_goes(tmp_path: Path):
    """By the standard's words (EXIF 2.32, 4.6.5.1): on which sides the first row and column are to be seen."""
    pixels = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
    expected = {5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}
    expected[7] = np.rot90(pixels, 2).transpose(1, 0, 2)
    for orientation, turned in expected.items():
        for format in ("PNG", "TIFF"):
            (tmp_path / "a").write_bytes(with_orientation(orientation, pixels, format))
            np.testing.assert_array_equal(open_image(tmp_path, Image(1, "a", H, W)), turned)


@pytest.mark.parametrize("orientation", [2, 6, 8])
def test_a_square_is_taken_as_stored_and_says_so(tmp_path: Path, orientation: int):
    square = RGB[:, :H]
    (tmp_path / "a.png").write_bytes(with_orientation(orientation, square, "PNG"))
    picture = ImageFolder(tmp_path).open(Image(1, "a.png", H, H))
    np.testing.assert_array_equal(picture.rgb, square)
    assert picture.undecided


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, orientation: int):
    (tmp_path / "a.png").write_bytes(with_orientation(orientation, RGB, "PNG"))
    picture = ImageFolder(tmp_path).open(Image(1, "a.png", W, H))
    np.testing.assert_array_equal(picture.rgb, RGB)
    assert not picture.undecided


# --- right files made wrong ------------------------------------------------------------------------------------------

BASES = [
    saved(RGB), saved(RGB, "JPEG"), saved(RGB, "BMP"), saved(TRANSPARENT, "TIFF"), palette(bytes([0, 128])),
    saved(RGB, "TIFF", compression="tiff_lzw"), saved(PIL.Image.fromarray(RGB).quantize(8), "GIF"), saved(RGB, "PPM"),
    saved(RGB, "WEBP", lossless=True), saved(RGB, "JPEG2000"), deep_png(2, 3), animation("GIF"), animation("TIFF"),
]  # fmt: skip
_flips = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=4)


def as_pil_reads(data: bytes) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(PIL.Image.open(BytesIO(data), formats=FORMATS).convert("RGB"))
        except Exception:
            return None


@settings(deadline=None, max_examples=400)
@given(base=st.sampled_from(BASES), flips=_flips, cut=st.none() | st.integers(0, 2000), strict=st.booleans())
def test_a_damaged_file_gives_what_pil_gives_or_an_error(tmp_path_factory, base, flips, cut, strict):
    data = bytearray(base)
    for place, change in flips:
        data[place % len(data)] ^= change
    data = bytes(data[:cut])
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")  # PIL warns of much of this
        try:
            rgb, said = open_image(path.parent, Image(3, "damaged", W, H)), ""
        except DataError as error:
            rgb, said = None, str(error)
    if rgb is None:
        assert said.startswith(f"Image 3: {path} ")
        assert len(said) < 1000
    else:
        np.testing.assert_array_equal(rgb, as_pil_reads(data))


def test_the_bases_of_the_damage_are_read_or_refused_as_they_should():
    assert sum(as_pil_reads(base) is not None for base in BASES) == len(BASES)
