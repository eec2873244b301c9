"""Seconds of wall clock and of CPU, peak memory, and the order in which sides take turns."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Name = TypeVar("Name")  # of a side, or what else tells it from others

CAN_WATCH_MEMORY = sys.platform == "linux"  # reads /proc


@dataclass(frozen=True)
class Timing:
    """One side's runs of the same work."""

    runs: tuple[float, ...]  # seconds of each
    cpu_runs: tuple[float, ...]  # CPU seconds of each, over all threads

    @property
    def seconds(self) -> float:
        return statistics.median(self.runs)

    @property
    def cpu(self) -> float:
        """Over `seconds`, how many cores it kept busy: shows what takes more threads than it was given, or waits."""
        return statistics.median(self.cpu_runs)

    def and_then(self, other: Timing) -> Timing:
        return Timing(self.runs + other.runs, self.cpu_runs + other.cpu_runs)


def timed(work: Callable[[], T]) -> tuple[T, Timing]:
    """With the CPU seconds of processes that the work started and saw the end of."""
    wall, cpu = time.perf_counter(), _cpu_s()
    result = work()
    return result, Timing((time.perf_counter() - wall,), (_cpu_s() - cpu,))


def _cpu_s() -> float:
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


def in_turns(
    sides: Mapping[str, Callable[[], T]], repeats: int, tell: Callable[[str], None]
) -> tuple[dict[str, T], dict[str, Timing]]:
    """What every side gave last, and all of its runs."""
    results, timings = dict[str, T](), dict[str, Timing]()
    for repeat, order in enumerate(turns(list(sides), repeats)):
        for name in order:
            tell(f"run {repeat + 1} of {repeats}: {name}")
            results[name], timing = timed(sides[name])
            add_run(timings, name, timing)
    return results, timings


def add_run(timings: dict[Name, Timing], side: Name, timing: Timing) -> None:
    """Adds a run to those of its side."""
    timings[side] = timings[side].and_then(timing) if side in timings else timing


def turns(sides: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """Each round's order: forwards, backwards, ..., so that a machine that slows down slows all sides alike."""
    for repeat in range(repeats):
        yield list(sides) if repeat % 2 == 0 else list(reversed(sides))


def anonymous_bytes() -> int:
    """What this process holds itself; pages of mapped files are the kernel's to drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def held_bytes() -> int:
    """`anonymous_bytes` without what the allocator keeps of freed memory, where it can be told to give that back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    return anonymous_bytes()


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The most bytes that this process has held so far, as the one entry of a list, looked at every millisecond."""
    peak, over = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
