"""The wording of argument errors and of missing-package errors, in one place so that all of them read alike.

Every message names the argument, what was expected, what came, and where possible the cure.
This module imports neither torch nor numpy, so that the command line can use it before either is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class DataError(ValueError):
    """Input data (a file, a record) breaks its format. The command line ends with exit code 3."""


class MissingPackageError(ImportError):
    """An optional package is not importable. The command line ends with exit code 5."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional ``module``, or say in one sentence what needs it and how to install it.

    Raises:
        MissingPackageError: the module cannot be imported; the message ends with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs {module}, which is not importable ({error}). {how_to_install(extra)}"
        ) from error


def how_to_install(extra: str) -> str:
    """The pip lines of an optional extra: from a checkout, and from a package index that has it."""
    return f'In a checkout: pip install -e ".[{extra}]", elsewhere: pip install "iou-refiner[{extra}]"'


def shown(text: str, limit: int = 80) -> str:
    """Text from a file for a message: what does not print (control characters, terminal codes) escaped, length bounded.

    Args:
        text: a file name, the name of a category, a key.
        limit: characters from which on it is cut, before escaping.
    """
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known`` words, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.{did_you_mean(str(value), choices)}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and above zero."""
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value!r}.")


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number (with ``whole``, an integer) in [``low``, ``high``]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, got {value!r}.")
    if not low <= float(value) <= high:
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}], got {value!r}.")


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless ``boxes`` is a floating point tensor of shape (N, 4)."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"`{name}` must have shape (N, 4), rows (x1, y1, x2, y2), got {tuple(boxes.shape)}.")
    if not boxes.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {boxes.dtype}. Convert with .float().")


def check_vector(name: str, values: Tensor, length: int, *, like: str) -> None:
    """Raise unless ``values`` has shape (length,), the length of the argument called ``like``."""
    if tuple(values.shape) != (length,):
        raise ValueError(f"`{name}` must have shape ({length},) to match `{like}`, got {tuple(values.shape)}.")


def check_same_device(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Raise unless two tensors live on one device."""
    if value.device != reference.device:
        raise ValueError(
            f"`{name}` is on {value.device} but `{other}` is on {reference.device}. Move both to one device with .to()."
        )
