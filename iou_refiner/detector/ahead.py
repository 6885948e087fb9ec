"""Work that is done ahead of its use, in threads: images are opened while the detector runs on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

# How many results wait for each thread: enough that none is idle, and few, as each is an image.
_AHEAD = 2


def ahead(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """``map(function, items)`` with ``workers`` threads at work on the next items.

    The results come in the order of the items, whatever the number of threads; an error comes in the place of the
    result that it prevented. No more than ``2 * workers`` results are in memory. Without workers it is ``map`` itself.
    """
    if not workers:
        yield from map(function, items)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # where the caller stops early, nothing more is begun
                future.cancel()
