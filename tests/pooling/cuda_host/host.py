"""Compile the CUDA kernels for the host and run them in place of a GPU.

``Library.launch`` has the signature of ``iou_refiner.pooling.cuda_kernels._launch``. Put in its place, it carries the
whole launcher, its checks, grids and argument packing, to kernels that run on the CPU. Shared by the tests of this
folder and scripts/bench/kernel_report.py.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.cuda_kernels import Variant

_HERE = Path(__file__).resolve().parent
_STRICT = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fmax-errors=3", f"-I{_HERE}")
# The hardware's multiply-add on, in every expression where the language allows it; or off.
CONTRACT = ("-ffp-contract=fast", *(("-mfma",) if platform.machine() in ("x86_64", "AMD64") else ()))
NO_CONTRACT = ("-ffp-contract=off",)

# A replacement in the text of the kernels that makes them count their loads from the table.
COUNT_LOADS = {"Pack value = *source;": "Pack value = (++host::loads, *source);"}


def variants(*sizes: int) -> list[Variant]:
    """All variants of some output sizes: every storage type, wide and single loads."""
    return [
        Variant(dtype, size, lanes)
        for dtype in sorted(cuda_kernels.DTYPES, key=str)
        for size in sizes
        for lanes in (1, 16 // dtype.itemsize)
    ]


def _name(variant: Variant) -> str:
    return f"{str(variant.dtype).removeprefix('torch.')}_{variant.output_size}_{variant.lanes}"


def planted(text: str, faults: Mapping[str, str]) -> str:
    """``text`` with each key replaced by its value. A key that is not there would make its test pass for nothing."""
    for old, new in faults.items():
        if old not in text:
            raise ValueError(f"The kernels no longer contain {old!r}; choose another place for the fault.")
        text = text.replace(old, new)
    return text


def _write(folder: Path, variants: Iterable[Variant], faults: Mapping[str, str], ending: str) -> Path:
    (folder / "kernels.cu").write_text(planted(cuda_kernels.source(), faults), encoding="utf-8")
    lines = ['#include "cuda_host.h"', '#define HOST_SOURCE "kernels.cu"']
    for variant in variants:
        macros = [option.removeprefix("-D").replace("=", " ") for option in variant.options if option.startswith("-D")]
        macros.append(f"HOST_VARIANT {_name(variant)}")
        lines += [f"#define {macro}" for macro in macros]
        lines.append('#include "variant.h"')
        lines += [f"#undef {macro.split()[0]}" for macro in macros]
    program = folder / "program.cpp"
    program.write_text("\n".join([*lines, ending, ""]), encoding="utf-8")
    return program


def _compile(program: Path, target: Path, flags: tuple[str, ...]) -> Path:
    done = subprocess.run(
        ["g++", *_STRICT, f"-I{program.parent}", *flags, str(program), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr}")
    return target


def build_program(folder: Path, variants: list[Variant], flags: tuple[str, ...], faults: Mapping[str, str]) -> Path:
    """An executable that runs all kernels of ``variants`` on boxes of every kind, one real thread per CUDA thread."""
    calls = [
        "host::exercise({"
        + ", ".join(
            f"{_name(v)}::prroi_{kernel}_on_{_name(v)}" for kernel in ("forward", "backward_boxes", "backward_table")
        )
        + f", {v.output_size}, {v.lanes}, {v.dtype.itemsize}}});"
        for v in variants
    ]
    ending = '#include "sanitize.h"\nint main() {\n' + "\n".join(calls) + "\n}"
    program = _write(folder, variants, faults, ending)
    return _compile(program, folder / "program", ("-O1", "-g", "-pthread", "-DHOST_THREADS", *flags))


class Library:
    """The kernels of some variants as a shared library.

    Args:
        folder: an empty directory to build in.
        variants: what to compile.
        flags: further flags of the compiler.
        faults: replacements in the text of the kernels.
    """

    def __init__(
        self,
        folder: Path,
        variants: Iterable[Variant],
        *,
        flags: tuple[str, ...] = CONTRACT,
        faults: Mapping[str, str] | None = None,
    ) -> None:
        counter = 'extern "C" unsigned long long take_loads() { return std::exchange(host::loads, 0); }'
        program = _write(folder, variants, faults or {}, counter)
        self._library = ctypes.CDLL(str(_compile(program, folder / "kernels.so", ("-O1", "-shared", "-fPIC", *flags))))
        self._library.take_loads.restype = ctypes.c_ulonglong

    def take_loads(self) -> int:
        """What the kernels have counted since the last call; they count only where a fault tells them to."""
        return int(self._library.take_loads())

    def launch(
        self,
        name: str,
        variant: Variant,
        device: torch.device,
        grid: tuple[int, int],
        threads: int,
        arguments: tuple[Tensor | np.generic, ...],
    ) -> None:
        """Run a kernel on host tensors."""
        if device.type != "cpu":
            raise ValueError(f"The host runs kernels on CPU tensors, got {device}.")
        values = [np.uint64(item.data_ptr()) if isinstance(item, Tensor) else item for item in arguments]
        buffers = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in values]
        addresses = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        sizes = (ctypes.c_int * len(buffers))(*(value.nbytes for value in values))
        call = getattr(self._library, f"{name}_on_{_name(variant)}")
        call.restype = ctypes.c_char_p
        problem = call(*grid, threads, addresses, sizes, len(buffers))
        if problem:
            raise RuntimeError(f"{name}: {problem.decode()}")

    @contextmanager
    def installed(self) -> Iterator[Library]:
        """Within it the functions of ``iou_refiner.pooling.cuda_kernels`` take CPU tensors and run here."""
        original = cuda_kernels._launch
        cuda_kernels._launch = self.launch
        try:
            yield self
        finally:
            cuda_kernels._launch = original
