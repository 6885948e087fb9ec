"""What is claimed of the GPU kernels, measured without a GPU: accuracy, loads, registers.

    python -m scripts.bench.kernel_report

Needs: pip install -e ".[dev]" and g++. About one minute on one core. Expected: forward errors below 1e-5 on features in
[-4, 4], maps of ones within 1e-6, box gradients within 1e-5 whatever the size of the box; at most half the loads of the
kernel of 2018 on boxes of 14 cells and more; a box beyond all bounds costs no more than one that covers the map; no
stack, no spills.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.cuda_kernels import Variant
from tests.pooling.cuda_host import measure
from tests.pooling.cuda_host.cubin import ARCHITECTURES, compile_cubin, inspect
from tests.pooling.cuda_host.host import CONTRACT, COUNT_LOADS, NO_CONTRACT, Library, variants


def print_accuracy() -> None:
    print("\nErrors against float64, 40 boxes each\n")
    print("| box (cells) | forward | map of ones | box gradient, relative |\n|---|---|---|---|")
    for size in (30, 7, 0.7, 0.05, 0.01):
        errors = measure.accuracy(size)
        print(f"| {size} | {errors.forward:.1e} | {errors.constant:.1e} | {errors.gradient:.1e} |")


def loads_of(library: Library, boxes: torch.Tensor) -> int:
    table = torch.zeros(measure.HEIGHT * measure.WIDTH, 4)
    library.take_loads()
    cuda_kernels.forward(measure.one_map(table, boxes), measure.BINS)
    return library.take_loads()


def print_loads(library: Library) -> None:
    print("\nFeatures loaded per output and channel, 7 x 7 bins\n")
    print("| box (cells) | here | kernel of 2018 | ratio |\n|---|---|---|---|")
    for size in (7, 14, 20, 28):
        boxes = measure.boxes_of(size, 40, np.random.default_rng(0))
        outputs = len(boxes) * measure.BINS**2
        here, before = loads_of(library, boxes) / outputs, measure.loads_of_2018(boxes) / outputs
        print(f"| {size} | {here:.1f} | {before:.1f} | {here / before:.2f} |")
    print("\nFeatures loaded per channel for one box\n")
    width, height = measure.WIDTH * measure.STRIDE, measure.HEIGHT * measure.STRIDE
    for name, box in (
        ("the whole map", [0.0, 0.0, width, height]),
        ("1e6 pixels", [-1e6, -1e6, 1e6, 1e6]),
        ("1e30 pixels", [-1e30, -1e30, 1e30, 1e30]),
        ("infinite", [-np.inf, -np.inf, np.inf, np.inf]),
        ("not a number", [np.nan, 0.0, 1.0, 1.0]),
    ):
        print(f"- {name}: {loads_of(library, torch.tensor([box]))}")


def print_code() -> None:
    print("\nRegisters per thread and bytes of shared memory per block, 7 x 7 bins; the worst stack and spills\n")
    names = ("prroi_forward", "prroi_backward_boxes", "prroi_backward_table")
    print("| variant | sm |", " | ".join(names), "| stack, spills |\n|---|---|---|---|---|---|")
    for variant in variants(measure.BINS):
        for architecture in ARCHITECTURES:
            code = inspect(compile_cubin(variant, architecture))
            cells = " | ".join(f"{code[name].registers}, {code[name].shared}" for name in names)
            worst = f"{max(c.stack for c in code.values())}, {max(c.spills for c in code.values())}"
            print(f"| {str(variant.dtype)[6:]} x {variant.lanes} | {architecture} | {cells} | {worst} |")


def main() -> None:
    for flags in (CONTRACT, NO_CONTRACT):
        with tempfile.TemporaryDirectory() as folder:
            library = Library(Path(folder), [Variant(torch.float32, 7, 4)], flags=flags, faults=COUNT_LOADS)
            print(f"\n{' '.join(flags)}")
            with library.installed():
                print_accuracy()
                if flags == CONTRACT:
                    print_loads(library)
    print_code()


if __name__ == "__main__":
    main()
