"""Work ahead in threads is the same as work without, in the same order, and there is never much of it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.detector.ahead import ahead
from iou_refiner.detector.loading import Loading


@settings(max_examples=40)
@given(st.lists(st.integers(), max_size=30), st.integers(0, 5))
def test_the_results_are_those_of_map(items, workers):
    assert list(ahead(lambda x: x * 2 + 1, iter(items), workers)) == [x * 2 + 1 for x in items]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_is_begun_than_is_soon_needed(workers):
    begun, lock = [], threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    results = ahead(work, range(1000), workers)
    for done in range(1, 50):
        assert next(results) == done - 1
        assert len(begun) <= done + max(2 * workers - 1, 0)
    results.close()
    assert len(begun) <= 50 + 2 * workers


def test_threads_really_work_at_the_same_time():
    both = threading.Barrier(2, timeout=60)
    assert [number >= 0 for number in ahead(lambda _: both.wait(), range(4), 2)] == [True] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_place(workers):
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = ahead(work, range(6), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"workers": 1.5}, {"batch_images": 0}, {"workers": True}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
        Loading(**wrong)
