"""Time prroi_pool against torchvision's roi_align, interleaved in one run.

Command: python scripts/bench_pooling.py --device cuda   (or cpu)
Needs: pip install -e ".[torchvision]", for --device cuda also the extra cuda12 or cuda13.
Time: some seconds on a GPU, about a minute on a CPU.
Expect: a table of medians and of their ratios. roi_align has no gradient to the boxes, so backward compares
prroi_pool to boxes and to features with roi_align to features. The table of features is made once, as a refiner does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import roi_align

from iou_refiner import FeatureMaps, FeaturePyramid, kernels, prroi_pool

STRIDE, BINS = 8.0, 7


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def medians(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, called in turns so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 3):
        for name, function in functions.items():
            elapsed = time_once(function, device)
            if round_ >= 3:  # the first rounds compile and warm up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def scene(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A feature map of a 1600 x 2672 input at stride 8, and boxes of 14 to 28 cells on it."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, args.channels, 200, 334, generator=generator).to(args.device, dtype)
    sides = (14 + 14 * torch.rand(args.boxes, 2, generator=generator)) * STRIDE
    low = torch.rand(args.boxes, 2, generator=generator) * (torch.tensor([2672.0, 1600.0]) - sides)
    return feature, torch.cat([low, low + sides], 1).to(args.device)


def contestants(feature: Tensor, boxes: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    pyramid = FeaturePyramid.from_maps(FeatureMaps((feature,), (STRIDE,), ((1600, 2672),)))
    moving, learning = boxes.clone().requires_grad_(), feature.clone().requires_grad_()
    maps = FeaturePyramid.from_maps(FeatureMaps((learning,), (STRIDE,), ((1600, 2672),)))
    like_feature = boxes.to(feature.dtype)

    def align(source: Tensor) -> Tensor:
        return roi_align(source, [like_feature], BINS, 1 / STRIDE, sampling_ratio=2, aligned=True)

    moved, learned, aligned = prroi_pool(pyramid, moving), prroi_pool(maps, boxes), align(learning)
    upstream = torch.ones_like(aligned)
    return {
        "roi_align forward": lambda: align(feature),
        "prroi_pool forward": lambda: prroi_pool(pyramid, boxes),
        "roi_align backward to features": lambda: torch.autograd.grad(aligned, learning, upstream, retain_graph=True),
        "prroi_pool backward to boxes": lambda: torch.autograd.grad(moved, moving, upstream, retain_graph=True),
        "prroi_pool backward to features": lambda: torch.autograd.grad(learned, learning, upstream, retain_graph=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    parser.add_argument("--boxes", default=500, type=int)
    parser.add_argument("--channels", default=256, type=int)
    parser.add_argument("--repeats", default=15, type=int)
    args = parser.parse_args()
    path = "CuPy kernels" if kernels.is_available(args.device) else "the portable path"
    print(f"{args.boxes} boxes, {args.channels} channels, {args.device}, {torch.get_num_threads()} threads, {path}")
    # Half precision is a matter of the GPU.
    for dtype in (torch.float32, torch.float16) if args.device.type == "cuda" else (torch.float32,):
        print(f"\n| {dtype} | median ms | ratio to roi_align |\n|---|---|---|")
        times = medians(contestants(*scene(args, dtype)), args.device, args.repeats)
        for name, median in times.items():
            base = times["roi_align forward" if name.endswith("forward") else "roi_align backward to features"]
            print(f"| {name} | {median:.2f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
