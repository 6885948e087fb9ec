"""Several processes of one run, as torchrun starts them, without its agent: quick, and each with its own output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.kit.paths import ROOT

# Longer than any of them takes, on any machine: what hangs is an error, not a wait.
_LONGEST = 300


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def start(count: int, words: Sequence[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Start ``python *words`` ``count`` times in ``folder``, as the processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=common | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(running: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for all of them. Those that are left, should one hang, are ended."""
    try:
        outputs = [process.communicate(timeout=_LONGEST) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.wait(), *output) for process, output in zip(running, outputs, strict=True)]


def run(count: int, words: Sequence[str], folder: Path) -> list[Ended]:
    """Start them and wait; none may fail."""
    ended = finish(start(count, words, folder))
    assert [process.code for process in ended] == [0] * count, "\n".join(process.err for process in ended)
    return ended
