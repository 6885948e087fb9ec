"""Compile the kernels as CuPy does at run time, for any architecture and without a GPU, and read the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.cuda_kernels import Variant

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# What CuPy adds to the options it is given; flushing denormals is the one that changes numbers.
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

_FP64 = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX)|[A-Z0-9]+(?:\.[A-Z0-9]+)*\.F64)\b")
_ATOMIC = re.compile(r"\b(?:ATOM|ATOMS|ATOMG|RED|REDG|REDAS)\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel uses."""

    registers: int
    stack: int
    local: int
    shared: int
    fp64: int  # instructions
    atomics: int
    spills: int


def compile_cubin(variant: Variant, architecture: int, source: str | None = None) -> bytes:
    """Machine code of a variant.

    Raises:
        RuntimeError: the compiler has anything to say, be it a warning.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(cuda_kernels.source() if source is None else source, "prroi_pool.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*variant.options, f"-arch=sm_{architecture}", *_CUPY_OPTIONS])
        if log := nvrtc.getProgramLog(program).strip("\0\n "):
            raise RuntimeError(f"{variant} for sm_{architecture}: the compiler warns:\n{log}")
        return bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy's call leaves out the last byte
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{variant} for sm_{architecture}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _tool(name: str) -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob(f"*/bin/{name}*")):
            return path
    raise FileNotFoundError(f"{name} is missing. pip install nvidia-cuda-{name}")


def inspect(cubin: bytes) -> dict[str, Code]:
    """Disassemble: per kernel, what its code uses.

    Raises:
        FileNotFoundError: a tool is missing.
        RuntimeError: the disassembler fails, or a kernel lacks its code or its resources.
    """
    dump, disassembler = _tool("cuobjdump"), _tool("nvdisasm")
    environment = {**os.environ, "PATH": f"{disassembler.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        command = [str(dump), "-sass", "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or "error" in done.stderr:
        raise RuntimeError(f"cuobjdump failed:\n{done.stdout[-500:]}\n{done.stderr}")
    usage = {
        name: [int(value) for value in numbers]
        for name, *numbers in re.findall(
            r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout
        )
    }
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\n\s*\.{6,}|\Z)", done.stdout, re.DOTALL))
    if usage.keys() != bodies.keys() or not all("EXIT" in body for body in bodies.values()):
        raise RuntimeError(f"cuobjdump shows code of {sorted(bodies)} but resources of {sorted(usage)}.")
    return {
        name: Code(
            *(registers, stack, local, shared),
            *(len(pattern.findall(bodies[name])) for pattern in (_FP64, _ATOMIC, _LOCAL)),
        )
        for name, (registers, stack, shared, local) in usage.items()
    }
