"""A gate on the machine code that ships: what the run-time compiler makes of the kernels, for every architecture.

It needs no GPU, but the compiler and the disassemblers at the versions of setup.cfg. A tool that is missing fails here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.cuda_kernels import Variant
from tests.pooling.cuda_host import cubin
from tests.pooling.cuda_host.cubin import ARCHITECTURES, Code, compile_cubin, inspect
from tests.pooling.cuda_host.host import planted, variants

# Registers per thread: what leaves room for 4, 3 and 4 blocks of 256 threads on a multiprocessor.
REGISTERS = {"prroi_forward": 64, "prroi_backward_boxes": 80, "prroi_backward_table": 64}
SHARED_BYTES = 4096  # at 7 bins, with the 1024 that newer architectures keep for themselves
PLAIN = Variant(torch.float32, 7, 4)


def faults_of(code: dict[str, Code]) -> list[str]:
    """What breaks the promises of the kernels, in words."""
    faults = []
    if code.keys() != REGISTERS.keys():
        faults.append(f"kernels are {sorted(code)}")
    for name, used in code.items():
        found = {
            "registers": used.registers > REGISTERS.get(name, 0),
            "shared": used.shared > SHARED_BYTES,
            **{field: getattr(used, field) > 0 for field in ("stack", "local", "fp64", "atomics", "spills")},
        }
        faults += [f"{name}: {getattr(used, field)} {field}" for field, bad in found.items() if bad]
    return faults


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", variants(7), ids=lambda v: f"{str(v.dtype)[6:]}x{v.lanes}")
def test_machine_code_keeps_its_promises(variant: Variant, architecture: int) -> None:
    assert faults_of(inspect(compile_cubin(variant, architecture))) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("output_size", [1, 3, 5, 14])
def test_other_output_sizes_compile_without_a_warning(output_size: int, architecture: int) -> None:
    for variant in variants(output_size):
        compile_cubin(variant, architecture)


def test_the_largest_output_keeps_its_promises() -> None:
    assert faults_of(inspect(compile_cubin(Variant(torch.float16, 14, 8), 90))) == []


LOCAL_ARRAY = "float edge[4] = {}, heap[64]; heap[packs & 63] = shift; edge[maps & 3] = heap[maps & 63];"
ATOMIC_STORE = "if (maps < 0) atomicAdd(grad_boxes, sum); grad_boxes[4 * box + threadIdx.x] = sum"


@pytest.mark.parametrize(
    ("place", "fault", "found"),
    [
        ("inner = 0.f;", "inner = tx * 1e-3;", "fp64"),
        ("grad_boxes[4 * box + threadIdx.x] = sum", ATOMIC_STORE, "atomics"),
        ("float edge[4] = {};", LOCAL_ARRAY, "stack"),
        ("__launch_bounds__(PRROI_THREADS, 3)", "__launch_bounds__(PRROI_THREADS, 8)", "spills"),
        ("prroi_backward_table(", "prroi_backward_tables(", "kernels are"),
        ("__shared__ Slope slopes[2][BINS];", "__shared__ Slope slopes[20][BINS];", "shared"),
    ],
)
def test_a_planted_fault_is_found(place: str, fault: str, found: str) -> None:
    code = inspect(compile_cubin(PLAIN, 90, planted(cuda_kernels.source(), {place: fault})))
    assert any(found in message for message in faults_of(code))


def test_too_many_registers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = inspect(compile_cubin(PLAIN, 90))
    used = code["prroi_forward"].registers
    monkeypatch.setitem(REGISTERS, "prroi_forward", used - 1)
    assert faults_of(code) == [f"prroi_forward: {used} registers"]


def test_a_warning_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"the compiler warns:\n.*never referenced"):
        compile_cubin(
            PLAIN, 90, planted(cuda_kernels.source(), {"float edge[4] = {};": "float edge[4] = {}; int unused;"})
        )


def test_an_error_shows_the_log() -> None:
    with pytest.raises(RuntimeError, match=r"sm_90: NVRTC_ERROR_COMPILATION.*\n.*error:"):
        compile_cubin(PLAIN, 90, "nonsense")


def test_code_that_is_cut_short_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cuobjdump"):
        inspect(compile_cubin(PLAIN, 90)[:-1])


def test_a_missing_tool_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cubin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-cuobjdump"):
        inspect(b"")
