"""Ordered prefetch by new threads and by those of a pool."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from grappa_dist.prefetch import prefetch, prefetch_with


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def test_results_keep_the_order_of_the_items_and_every_thread_is_started_once() -> None:
    started: list[str] = []
    found = prefetch(
        slow_square, range(20), threads=3, depth=5, start_thread=lambda: started.append(threading.current_thread().name)
    )
    assert list(found) == [number * number for number in range(20)]
    assert 1 <= len(started) == len(set(started)) <= 3


def test_a_pool_may_serve_several_and_outlives_them() -> None:
    with ThreadPoolExecutor(2) as pool:
        pairs = zip(
            prefetch_with(pool, slow_square, range(10), depth=2),
            prefetch_with(pool, str, range(10), depth=3),
            strict=True,
        )
        assert list(pairs) == [(number * number, str(number)) for number in range(10)]
        assert pool.submit(slow_square, 3).result() == 9


def test_no_item_is_taken_before_it_is_within_the_depth() -> None:
    taken: list[int] = []

    def record(number: int) -> int:
        taken.append(number)
        return number

    results = prefetch(record, range(6), threads=1, depth=2)
    assert next(results) == 0
    time.sleep(0.05)
    assert max(taken) <= 2  # two ahead of the one that was taken
    assert list(results) == [1, 2, 3, 4, 5]
