"""The processes of one run, as torchrun starts them: which one this is, and what they tell each other.

Work is dealt out like cards: the item at position p belongs to process p mod W, nothing is dealt twice, and nothing is
added to make the piles equal. What the processes made is put back in the order of the positions, and sums are taken in
that order. So one process and many come to the same bytes, on CPUs of one kind and with the same number of threads
each; on a GPU, sums are left to NCCL, and the last bits differ.

A process alone is a group of one, for which none of this costs anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# While one process works alone, as when settings are chosen, the others wait. That a process is gone is noticed at
# once, by its closed connection and by torchrun: this is not the time that takes.
_LONGEST_WAIT = timedelta(days=1)


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run.

    Args:
        rank: which, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are dealt to this process, in order."""
        return items[self.rank :: self.count]

    def share(self, parts: Sequence[Tensor], total: int, like: Tensor) -> list[Tensor]:
        """What all processes made of ``total`` items, in the order of the items; the same in every process.

        Args:
            parts: this process's, one tensor (n, ...) for each of its items; n may differ.
            total: number of items of all processes.
            like: an empty tensor (0, ...) of the parts' kind, shape and device, which a process without items needs.

        Raises:
            LostProcessError: another process is gone.
        """
        if self.count == 1:
            return list(parts)
        each = -(-total // self.count)  # the largest pile
        sizes = torch.zeros(each, dtype=torch.int64)
        sizes[: len(parts)] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        all_sizes = self._gather(sizes)
        longest = max(int(sizes.sum()) for sizes in all_sizes)
        padded = like.new_zeros((longest, *like.shape[1:]))
        if parts:
            padded[: int(sizes.sum())] = torch.cat(list(parts))
        piles = [
            pile.split([*sizes.tolist(), longest - int(sizes.sum())])
            for pile, sizes in zip(self._gather(padded), all_sizes, strict=True)
        ]
        return [piles[position % self.count][position // self.count] for position in range(total)]

    def add_up(self, parts: Iterable[Tensor], total: int, like: Tensor) -> Tensor:
        """The sum of one tensor for each of ``total`` items, added in the order of the items.

        Args:
            parts: this process's, each of the shape of ``like``; asked for one by one, so that few are in memory.
            total: number of items of all processes.
            like: a tensor of the parts' kind, shape and device.

        Raises:
            LostProcessError: another process is gone.
        """
        sum_of_all, own = torch.zeros_like(like), iter(parts)
        if self.count == 1 or like.device.type != "cpu":
            for part in own:
                sum_of_all += part
            if self.count > 1:
                with _noticing_loss():
                    dist.all_reduce(sum_of_all)
            return sum_of_all
        for start in range(0, total, self.count):
            for part in self._gather(next(own, torch.zeros_like(like)))[: total - start]:
                sum_of_all += part
        return sum_of_all

    def from_first(self, values: Tensor) -> Tensor:
        """The tensor that the first process has, in all of them; the others give one of the same shape and kind."""
        if self.count > 1:
            values = values.contiguous()
            with _noticing_loss():
                dist.broadcast(values, 0)
        return values

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            LostProcessError: another process is gone.
        """
        if self.count > 1:
            self._gather(torch.zeros(1))

    def _gather(self, values: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(values) for _ in range(self.count)]
        with _noticing_loss():
            dist.all_gather(everyone, values.contiguous())
        return everyone


def current() -> Ranks:
    """This process among those of its group; alone outside of :func:`joined`."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """In here the processes that torchrun started are one group; a process that it did not start is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_LONGEST_WAIT)
    ranks = current()
    try:
        yield ranks
    except Exception:
        # The group is left as it is: others may wait for this process, which has to end for them to notice.
        print(f"Process {ranks.rank} of {ranks.count} ends with an error:", file=sys.stderr, flush=True)
        raise
    dist.destroy_process_group()


def device_of_this_process(device: str) -> str:
    """``device``, or where torchrun started several processes on a machine with GPUs, the one GPU that is this one's.

    Raises:
        ValueError: there are more processes on this machine than GPUs.
    """
    local = os.environ.get("LOCAL_RANK")
    gpus = torch.cuda.device_count()
    if local is None or device not in ("auto", "cuda") or not gpus:
        return device
    if int(local) >= gpus:
        raise ValueError(
            f"Process {local} of this machine has no GPU of its own: there are {gpus}. Start at most that many "
            f"processes a machine (torchrun --nproc-per-node {gpus}), or add --device cpu."
        )
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = current()
        # Without the file and line of gloo's code, and what it guesses.
        why = (str(error).splitlines() or [""])[0].split("] ", 1)[-1].split(". ")[0]
        raise LostProcessError(
            f"Process {ranks.rank} of {ranks.count} waits for another one in vain ({why}). See what that one says, and "
            "start the same command again with --resume: it does what is missing, with any number of processes."
        ) from None
