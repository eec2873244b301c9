"""Ordered prefetch: later results are computed in threads while the caller uses an earlier one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    depth: int,
    start_thread: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """function(item) of every item, in their order, by a new pool of threads; closing it ends them.

    Args:
        depth: as of `prefetch_with`.
        start_thread: called once in each thread.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch", initializer=start_thread)
    try:
        yield from prefetch_with(pool, function, items, depth=depth)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # a caller that gives up waits for what has begun, and no more


def prefetch_with(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Generator[Result, None, None]:
    """function(item) of every item, in their order, by the threads of a pool.

    Args:
        depth: results under way or waiting to be taken, at most, beside the one that the caller has.
    """
    left = iter(items)
    ahead: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(left, depth))
    while ahead:
        result = ahead.popleft().result()
        ahead.extend(pool.submit(function, item) for item in islice(left, 1))
        yield result
        del result  # or it would be kept here while the next one is awaited
