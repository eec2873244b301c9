"""Shards written side by side by processes, which end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from grappa_dist.make_shards.filling import Filled, ShardJob, fill

_POLL_S = 0.5
_counter: Any = None  # of a worker process: images written by all, and whether to stop
_stop: Any = None


class WorkerDied(RuntimeError):
    """A worker process was killed; what it had finished is kept."""


def fill_all(
    jobs: Iterable[ShardJob], workers: int, add_images: Callable[[int], None]
) -> Generator[Filled, None, None]:
    """The filled shards as they are finished, in any order; closing it stops the rest.

    Args:
        workers: processes; 1 works in this one.
        add_images: hears of written images, and of 0 now and then.
    """
    if workers > 1:
        return _in_processes(iter(jobs), workers, add_images)
    return (fill(job, add_images, lambda: False) for job in jobs)


def _in_processes(
    jobs: Iterable[ShardJob], workers: int, add_images: Callable[[int], None]
) -> Generator[Filled, None, None]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of our threads
    counter, stop, counted = context.Value("q", 0), context.Event(), 0
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counter, stop))
    try:
        pending: set[Future[Filled]] = {pool.submit(_fill, job) for job in islice(jobs, 2 * workers)}
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            written = counter.value
            add_images(written - counted)
            counted = written
            for future in done:
                yield future.result()
            pending |= {pool.submit(_fill, job) for job in islice(jobs, len(done))}
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process was killed, for want of memory perhaps; run the same again to go on"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(counter: Any, stop: Any) -> None:
    """Makes a worker end with its parent, however that ends, and leaves Ctrl-C to the parent."""
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker waits for its parent"
    parent.join()
    os._exit(1)


def _fill(job: ShardJob) -> Filled:
    return fill(job, _count, _stop.is_set)


def _count(images: int) -> None:
    with _counter.get_lock():
        _counter.value += images
