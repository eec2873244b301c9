"""Ordered prefetch: later results are computed in threads while the caller uses an earlier one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Threads = int | Literal["auto"]  # that read ahead; auto: as many as this process has for it
CPU_THREADS = 2  # of a process whose worker has no GPU, or that nobody gave a number

_threads_here = CPU_THREADS


def set_threads_here(threads: int) -> None:
    """How many threads of this process read ahead where `auto` was asked for."""
    global _threads_here
    _threads_here = threads


def threads_here(asked: Threads) -> int:
    """As many threads as were asked for, or as this process has for reading."""
    return _threads_here if asked == "auto" else asked


class Prefetched(Generic[Result]):
    """Results in the order of their items, and whether the next one is there already."""

    def __init__(self, results: Generator[Result, None, None], ahead: deque[Future[Result]]) -> None:
        self._results, self._ahead = results, ahead

    def __iter__(self) -> Prefetched[Result]:
        return self

    def __next__(self) -> Result:
        return next(self._results)

    def ready(self) -> bool:
        """Whether the next result is there: taking it neither waits nor raises."""
        return bool(self._ahead) and self._ahead[0].done() and self._ahead[0].exception() is None

    def close(self) -> None:
        """Ends the threads, where they are its own; what has begun is waited for."""
        self._results.close()


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    depth: int,
    start_thread: Callable[[], object] = lambda: None,
) -> Prefetched[Result]:
    """function(item) of every item, in their order, by a new pool of threads; closing it ends them.

    Args:
        depth: as of `prefetch_with`.
        start_thread: called once in each thread.
    """
    ahead: deque[Future[Result]] = deque()

    def results() -> Generator[Result, None, None]:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch", initializer=start_thread)
        try:
            yield from _in_order(lambda item: pool.submit(function, item), items, depth, ahead)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # who gives up waits for what has begun, and no more

    return Prefetched(results(), ahead)


def prefetch_with(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Prefetched[Result]:
    """function(item) of every item, in their order, by the threads of a pool.

    Args:
        depth: results under way or waiting to be taken, at most, beside the one that the caller has.
    """
    ahead: deque[Future[Result]] = deque()
    return Prefetched(_in_order(lambda item: pool.submit(function, item), items, depth, ahead), ahead)


def _in_order(
    begin: Callable[[Item], Future[Result]], items: Iterable[Item], depth: int, ahead: deque[Future[Result]]
) -> Generator[Result, None, None]:
    left = iter(items)
    ahead.extend(map(begin, islice(left, depth)))
    while ahead:
        result = ahead.popleft().result()
        ahead.extend(map(begin, islice(left, 1)))
        yield result
        del result  # or it would be kept here while the next one is awaited
