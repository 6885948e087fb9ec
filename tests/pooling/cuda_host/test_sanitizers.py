"""The kernels under sanitizers, one real thread per CUDA thread; and proof that each sanitizer would speak up."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from iou_refiner.pooling.cuda_kernels import Variant
from tests.pooling.cuda_host.host import build_program

MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
ONE = [Variant(torch.float32, 3, 4)]
ALL = [*ONE, Variant(torch.float16, 2, 8), Variant(torch.bfloat16, 1, 1)]

OUT_OF_BOUNDS = {"output[box * items + item] = result;": "output[box * items + item + 1] = result;"}
# Infinity less infinity for a diverged box, nothing for others.
NAN_CAST = {"static_cast<int>(first)": "static_cast<int>(first + (box[0] * box[0] - box[0] * box[0]))"}
RACE = {"    __syncthreads();\n    const int items": "    const int items"}
RACE_IN_GATHER = {"        __syncthreads();  // nobody asks": "        // nobody asks"}


def _fixed_addresses() -> None:
    # The thread sanitizer of older compilers cannot place its shadow under strong address randomisation.
    ctypes.CDLL(None).personality(0x0040000)


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program], capture_output=True, text=True, timeout=120, preexec_fn=_fixed_addresses)


@pytest.mark.parametrize(
    ("flags", "variants"), [(MEMORY, ALL), (THREADS, ONE)], ids=["address and undefined", "thread"]
)
def test_nothing_to_report(tmp_path: Path, flags: tuple[str, ...], variants: list[Variant]) -> None:
    done = run(build_program(tmp_path, variants, flags, {}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("flags", "fault", "report"),
    [
        (MEMORY, OUT_OF_BOUNDS, "AddressSanitizer: heap-buffer-overflow"),
        (MEMORY, NAN_CAST, "nan is outside the range of representable values of type 'int'"),
        (THREADS, RACE, "ThreadSanitizer: data race"),
        (THREADS, RACE_IN_GATHER, "ThreadSanitizer: data race"),
    ],
    ids=["write out of bounds", "cast of a NaN", "missing barrier", "missing barrier in the gather"],
)
def test_a_planted_fault_is_found(tmp_path: Path, flags: tuple[str, ...], fault: dict[str, str], report: str) -> None:
    done = run(build_program(tmp_path, ONE, flags, fault))
    assert done.returncode != 0
    assert report in done.stderr
    assert "kernels.cu:" in done.stderr
