"""Every speed the project promises, side by side with what it is measured against, in one run.

    python -m scripts.bench --json bench.json          (2 to 3 minutes on 2 idle CPU cores; --only nms for some rows)
    python -m scripts.bench --device cuda

Needs: pip install -e ".[torchvision]" ensemble-boxes. Rows whose peer is not installed are named and left out. Ours and
theirs are called in turns, so both meet the same machine; a ratio is the median over the rounds of the ratio of one
round, its spread the 10th to 90th percentile. Every result is checked before it is timed. --clock cpu times the process
instead of the wall: for a busy machine. Models and features are random. No detector is downloaded: what a stage costs
depends on shapes, not on weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from iou_refiner.files import write_whole
from iou_refiner.pooling import cuda_kernels
from scripts.bench.rows import GROUPS, rows


@dataclass
class Row:
    """One line of the table; milliseconds are medians."""

    name: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    low: float
    high: float
    limit: float
    rounds: int


def clock(device: torch.device, kind: str) -> Callable[[], float]:
    """Seconds, once the device is idle."""
    read = time.process_time if kind == "cpu" else time.perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return now


def race(
    ours: Callable[[], Any], peer: Callable[[], Any], now: Callable[[], float], seconds: float
) -> list[list[float]]:
    """Seconds of both in each round, after one to warm up, for about ``seconds`` and at least 3 rounds."""
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < 4 or (time.perf_counter() - begin < seconds and len(rounds) < 200):
        lap = []
        for function in (ours, peer):
            start = now()
            function()
            lap.append(now() - start)
        rounds.append(lap)
    return rounds[1:]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    now = clock(args.device, args.clock)
    for work in rows(args.device, args.only):
        work.check()
        laps = race(work.ours, work.theirs, now, args.seconds)
        ours, theirs = (statistics.median(column) for column in zip(*laps, strict=True))
        ratios = sorted(one / other for one, other in laps)
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        yield Row(
            work.name, work.peer, ours * 1e3, theirs * 1e3, statistics.median(ratios), low, high, work.limit, len(laps)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--seconds", default=8.0, type=float, help="about how long each row is raced")
    parser.add_argument("--only", default="", help=f"groups with this word in their name: {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, help="write the rows there, too, as they are measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = "CuPy kernels" if cuda_kernels.is_available(args.device) else "portable path"
    load = [round(value, 1) for value in os.getloadavg()]
    about = f"{args.device}, {path}, {args.threads} threads of {os.cpu_count()} cores, {args.clock} clock, load {load}"
    table = Table("work", "against", "ours ms", "theirs ms", "ratio", "10-90 %", "limit", "rounds", title=about)
    measured: list[dict[str, Any]] = []
    for row in measure(args):
        measured.append(asdict(row))
        if args.json:
            write_whole(args.json, json.dumps({"about": about, "rows": measured}, indent=1).encode() + b"\n")
        met = "green" if row.ratio <= row.limit else "red"
        table.add_row(
            row.name, row.peer, f"{row.ours_ms:.2f}", f"{row.peer_ms:.2f}", f"[{met}]{row.ratio:.3f}[/]",
            f"{row.low:.3f}-{row.high:.3f}", f"{row.limit:g}", str(row.rounds),
        )  # fmt: skip
        print(f"{row.name}: {row.ratio:.3f} (limit {row.limit:g})", file=sys.stderr)
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
