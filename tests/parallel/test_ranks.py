"""What processes tell each other: everything once, in the order of the items, and sums to the last bit."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.parallel import ranks
from iou_refiner.parallel.ranks import Ranks, current, device_of_this_process, joined
from tests.kit.processes import finish, run, start

# In each of three processes: `part(position)` is what an item is made to, ragged and of sizes that do not add exactly.
PRELUDE = """
import functools, operator, sys, torch
from iou_refiner.parallel.ranks import current, joined

def part(position):
    generator = torch.Generator().manual_seed(position)
    return torch.randn(position % 3, 2, generator=generator) * 10.0 ** (position % 7)
"""
LAWS = """
with joined() as ranks:
    for total in range(9):
        mine = ranks.mine(range(total))
        shared = ranks.share([part(p) for p in mine], total, torch.zeros(0, 2))
        assert len(shared) == total
        assert all(torch.equal(a, part(p)) for p, a in enumerate(shared))
        like = torch.zeros(5)
        vectors = [torch.randn(5, generator=torch.Generator().manual_seed(p)) * 10.0 ** (p % 5) for p in range(total)]
        added = ranks.add_up((vectors[p] for p in mine), total, like)
        assert torch.equal(added, functools.reduce(operator.add, vectors, like)), total
    labels = ranks.share([torch.tensor([ranks.rank])], ranks.count, torch.zeros(0, dtype=torch.int64))
    assert torch.cat(labels).tolist() == [0, 1, 2]
    assert ranks.from_first(torch.tensor([ranks.rank + 5.0])).item() == 5
    ranks.wait()
    assert current() == ranks
print("fine", ranks.rank)
"""
LOSS = """
import os, signal
with joined() as ranks:
    ranks.wait()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(100):
        ranks.wait()
"""


def test_three_processes_share_and_add_as_one_would(tmp_path: Path):
    assert [ended.out.split() for ended in run(3, ["-c", PRELUDE + LAWS], tmp_path)] == [
        ["fine", str(rank)] for rank in range(3)
    ]


def test_a_process_that_is_gone_is_noticed_and_the_cure_said(tmp_path: Path):
    first, killed, third = finish(start(3, ["-c", PRELUDE + LOSS], tmp_path))
    assert killed.code == -9
    for rank, ended in ((0, first), (2, third)):
        assert ended.code == 1
        assert f"Process {rank} of 3 ends with an error:" in ended.err
        assert f"LostProcessError: Process {rank} of 3 waits for another one in vain" in ended.err
        assert "with --resume" in ended.err


parts = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), max_size=8)


@given(parts)
def test_a_process_alone_shares_with_itself_and_adds_in_order(values):
    tensors = [torch.tensor(row) for row in values]
    assert current() == Ranks(0, 1)
    assert all(a is b for a, b in zip(Ranks().share(tensors, len(tensors), torch.zeros(0)), tensors, strict=True))
    like = torch.zeros(3)
    assert torch.equal(Ranks().add_up(iter(tensors), len(tensors), like), functools.reduce(operator.add, tensors, like))


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_every_item_is_dealt_once(items, count):
    dealt = [Ranks(rank, count).mine(items) for rank in range(count)]
    assert sorted(item for pile in dealt for item in pile) == sorted(items)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as alone:
        assert alone == Ranks(0, 1)
        assert alone.first
    assert device_of_this_process("auto") == "auto"


@pytest.mark.parametrize(
    ("local", "device", "gpus", "expected"),
    [("1", "auto", 4, "cuda:1"), ("3", "cuda", 4, "cuda:3"), ("1", "cpu", 4, "cpu"), ("1", "cuda:0", 4, "cuda:0"),
     ("1", "auto", 0, "auto")],
)  # fmt: skip
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, local, device, gpus, expected):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ranks.torch.cuda, "set_device", chosen.append)
    assert device_of_this_process(device) == expected
    assert chosen == ([int(local)] if expected.startswith("cuda:") and expected != device else [])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"there are 2\. Start at most that many .*--nproc-per-node 2\), or add --dev"):
        device_of_this_process("auto")
