"""Weights files as data: tensors, arrays and plain values are read of them; what would run code is refused in words.

PyTorch's checkpoints and the ``.pkl`` files of Detectron2 are pickles, and a pickle may call any function. PyTorch has
a reader that takes tensors and plain values only; :func:`tensors_only` makes every framework use it, whatever it asks
for. :func:`read_arrays` is the like for ``.pkl`` files of NumPy arrays.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.checks import DataError

#: The environment variable that runs the code inside weights files; only for files you trust.
TRUST = "IOU_REFINER_TRUST_PICKLES"
_FORCE, _FREE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_MOST_NAMED = 5
_MOST_SCANNED = 64 << 20  # bytes of a pickle that are searched for what it names, for a message


def trusts_pickles() -> bool:
    """Whether the user said that code inside weights files may run."""
    return os.environ.get(TRUST, "").lower() in ("1", "true", "yes")


def refusal(weights: str, holds: str = "") -> DataError:
    """The error for weights that cannot be read as data; ``holds`` is what they hold beside, where that is known."""
    what = f"hold more than tensors: {holds}" if holds else "cannot be read: damaged, or with more than tensors"
    return DataError(
        f"The weights {weights!r} {what}. To read it all, code inside the file would run. Save the tensors alone, as "
        "with torch.save(model.state_dict(), path), or as safetensors. Only if you trust the file: "
        f"{TRUST}=1 runs the code inside weights files."
    )


@contextmanager
def tensors_only(weights: str, path: str | None = None) -> Iterator[None]:
    """Within, ``torch.load`` takes tensors and plain values alone, also where a framework asks for more.

    Args:
        weights: what the user called them, for messages.
        path: the local file, which is searched for what it names. Default: ``weights``.

    Raises:
        DataError: they hold more, and the user did not say that they are trusted.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FREE)}
    os.environ[_FREE if trusts_pickles() else _FORCE] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        raise refusal(weights, _named_in(path or weights)) from None
    except RuntimeError as error:
        if "weights_only" not in str(error):
            raise
        raise refusal(weights, "an archive of TorchScript, or of a PyTorch before 1.0") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def read_arrays(path: str, weights: str) -> Any:
    """What a pickle of NumPy arrays and plain values holds; the names it may call are all in this file.

    Args:
        path: the local file.
        weights: what the user called it, for messages.

    Raises:
        DataError: it calls anything else, or is damaged.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        _check_sizes(content)
        return _unwrapped(_ArraysOnly(io.BytesIO(content), encoding="latin1").load(), {})
    except _NotAnArray as error:
        raise refusal(weights, str(error)) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"The weights {weights!r} cannot be read (not a pickle of arrays: {error}).") from None


class _NotAnArray(Exception):
    """A pickle names something that no array needs."""


class _ArraysOnly(pickle.Unpickler):
    """Knows what arrays are pickled with, under their names of NumPy 1 and 2, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ARRAYS.get((module.replace("numpy.core", "numpy._core"), name))
        if allowed is None:
            raise _NotAnArray(f"{module}.{name}")
        return allowed


class _Kind:
    """In the place of ``numpy.dtype``: numbers and text of a fixed size; no objects, no records."""

    def __init__(self, code: Any, *_: Any):
        self.dtype = np.dtype(code) if isinstance(code, str) else np.dtype("V")
        if self.dtype.kind not in "biufcSU":
            raise _NotAnArray(f"numpy.dtype {code!r}")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, data: Any, shape: Any, order: Any = "C") -> np.ndarray:
        """The array of these bytes, which Python 2 wrote as text."""
        content = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(bytearray(content), self.dtype).reshape(shape, order=order)


class _Array:
    """In the place of ``numpy.ndarray``, which is pickled as an empty one and the state it then takes."""

    def __init__(self, *_: Any):
        self.value = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        *_, shape, kind, by_columns, data = state
        self.value = kind.array(data, shape, "F" if by_columns else "C")


def _unwrapped(value: Any, done: dict[int, Any]) -> Any:
    """Arrays in the place of what stands for them, in dicts, lists and tuples; ``done`` are those seen, by identity."""
    if id(value) not in done:
        result = value.value if isinstance(value, _Array) else value
        if isinstance(value, dict):
            result = {_unwrapped(key, done): _unwrapped(part, done) for key, part in value.items()}
        elif isinstance(value, (list, tuple)):
            result = type(value)(_unwrapped(part, done) for part in value)
        done[id(value)] = result
    return done[id(value)]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """As Python 3 writes bytes for Python 2."""
    return text.encode("latin1" if encoding in ("latin1", "latin-1") else "ascii")


_ARRAYS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): lambda kind, data: kind.array(data, ())[()],
    ("numpy._core.numeric", "_frombuffer"): lambda data, kind, shape, order: kind.array(data, shape, order),
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",
    ("collections", "OrderedDict"): OrderedDict,
}


def _check_sizes(content: bytes) -> None:
    """Raise ValueError where a pickle announces more than it holds; reads it without doing what it says."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise ValueError("a place in its memo lies beyond its end")


def _named_in(path: str) -> str:
    """What the pickles in a file name, found without doing what they say; empty where that cannot be told."""
    try:
        names = list(dict.fromkeys(name for content in _pickles(path) for name in _names(content)))
    except Exception:  # for a message only, and the file may be anything
        return ""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _pickles(path: str) -> Iterator[bytes]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as stream:
            yield stream.read(_MOST_SCANNED)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.endswith(".pkl"):
                with archive.open(entry) as stream:
                    yield stream.read(_MOST_SCANNED)


def _names(content: bytes) -> Iterator[str]:
    """``module.name`` of all that the pickles in a row name, but for what tensors need."""
    stream, texts = io.BytesIO(content), [""]
    try:
        while stream.tell() < len(content):  # old checkpoints are several pickles
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    name = ".".join(texts[-2:]) if argument is None else str(argument).replace(" ", ".")
                    if not name.startswith(("torch.", "collections.OrderedDict")):
                        yield name
                elif isinstance(argument, str):
                    texts.append(argument)
    except ValueError:  # what follows the pickles of an old checkpoint is none
        return
