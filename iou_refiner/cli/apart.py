"""Standard output for results alone: whatever else is printed while a command runs goes to standard error."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def stdout_apart() -> Iterator[TextIO]:
    """What detectors and their libraries print in here, also from C, goes to stderr; yields what stdout was."""
    python_stdout = sys.stdout
    try:
        descriptor, beside = python_stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by something in memory, which C cannot reach
        sys.stdout = sys.stderr
        try:
            yield python_stdout
        finally:
            sys.stdout = python_stdout
        return
    python_stdout.flush()
    own = os.dup(descriptor)
    os.dup2(beside, descriptor)
    sys.stdout = sys.stderr
    try:
        with os.fdopen(os.dup(own), "w", encoding=python_stdout.encoding, errors="backslashreplace") as stream:
            yield stream
    finally:
        with suppress(OSError, AttributeError, TypeError):  # what C has printed and still holds back
            ctypes.CDLL(None).fflush(None)
        os.dup2(own, descriptor)
        os.close(own)
        sys.stdout = python_stdout
