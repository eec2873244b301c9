"""What the benchmarks share: the command line, timing, memory, the machine's limits, rows to measure on, and workers.

Shapes: P rows, D dimensions, C classes of all tasks.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.faiss_baselines import faiss_version
from grappa_dist.distributed.collectives import Comm, process_group
from grappa_dist.distributed.sharded_rows import Rows
from grappa_dist.search.fixed_point import to_grid

T = TypeVar("T")
Log = Callable[[str], None]  # takes one line of progress

MIB = 2**20
CAN_WATCH_MEMORY = sys.platform == "linux"  # memory is read from /proc
SHARD_ROWS = 1000  # of a shard that make_shards.py writes by default
TASKS, CLASSES, SUBCLASSES = 8, 60, 8  # of drawn rows: in all, in a task, in a class
_VARIANCE_SHARES = (0.2, 0.2, 0.2, 0.15, 0.25)  # of a drawn row: common mean, task, class, sub-class, the row itself
_BLOCK = 8192  # rows that are computed at once
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that give the arithmetic limit
_PRODUCT_RUNS = 5
_CONTEXT = multiprocessing.get_context("spawn")  # of workers: a fork would inherit the parent's threads and memory


# The command line


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def check_least(settings: Any, **least: int) -> None:
    """Raises a ValueError that names the flag of a setting below its least value; None (not given) passes."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")


def check_positive(settings: Any, *names: str) -> None:
    """The same for settings that are at least 1."""
    check_least(settings, **dict.fromkeys(names, 1))


def check_device(device: str) -> None:
    """Raises a ValueError where a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")


# The header and the tables of a report


def machine(threads: int, *libraries: str) -> dict[str, str]:
    """The lines of a header by name: command, processor, threads and versions (of `libraries`, by default of faiss)."""
    load = os.getloadavg()[0]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": f"{_processor()}, {cores()} cores, load {load:.1f} at the start",
        "threads": f"{threads} per process",
        "versions": ", ".join(
            [
                f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
                *([f"{name} {version(name)}" for name in libraries] or [faiss_version()]),
            ]
        ),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column aligned to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    first, *others = widths
    padded = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def aligned_header(header: dict[str, str]) -> str:
    width = max(len(name) for name in header)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in header.items())


# Time


@dataclass(frozen=True)
class Timing:
    """Wall clock and CPU seconds of several runs of the same work. `+` appends runs."""

    runs: tuple[float, ...]  # seconds of each
    cpu_runs: tuple[float, ...]  # CPU seconds of each, over all threads

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.runs)

    @property
    def cpu(self) -> float:
        """The median. Over `seconds` it is the number of cores in use, which shows too many threads, or waiting."""
        return statistics.median(self.cpu_runs)

    @property
    def fastest(self) -> float:
        return min(self.runs)

    @property
    def fastest_cpu(self) -> float:
        return min(self.cpu_runs)

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.runs + other.runs, self.cpu_runs + other.cpu_runs)


def timed(work: Callable[[], T]) -> tuple[T, Timing]:
    """The result and one run; its CPU seconds include child processes that the work started and waited for."""
    wall, cpu = time.perf_counter(), _cpu_s()
    result = work()
    return result, Timing((time.perf_counter() - wall,), (_cpu_s() - cpu,))


def _cpu_s() -> float:
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


def over_ranks(timings: Sequence[Timing]) -> Timing:
    """The same runs on several ranks as one timing: seconds of the slowest rank, CPU seconds of all ranks."""
    runs = zip(*(timing.runs for timing in timings), strict=True)
    cpu_runs = zip(*(timing.cpu_runs for timing in timings), strict=True)
    return Timing(tuple(map(max, runs)), tuple(map(sum, cpu_runs)))


def in_turns(sides: Mapping[str, Callable[[], T]], repeats: int, log: Log) -> tuple[dict[str, T], dict[str, Timing]]:
    """Runs all sides in alternating order; each side's last result and all of its runs."""
    results, timings = dict[str, T](), dict[str, Timing]()
    for repeat, order in enumerate(turns(list(sides), repeats)):
        for name in order:
            log(f"run {repeat + 1} of {repeats}: {name}")
            results[name], timing = timed(sides[name])
            add_run(timings, name, timing)
    return results, timings


def add_run(timings: dict[str, Timing], side: str, timing: Timing) -> None:
    timings[side] = timings[side] + timing if side in timings else timing


def turns(sides: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The order of each round: forwards, backwards, ..., so that a machine that slows down slows all sides alike."""
    for repeat in range(repeats):
        yield list(sides) if repeat % 2 == 0 else list(reversed(sides))


# Memory


def anonymous_bytes() -> int:
    """Resident memory of this process without pages of mapped files, which the kernel may drop."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def held_bytes() -> int:
    """`anonymous_bytes` after the allocator returned its freed memory, where it has a call for that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    return anonymous_bytes()


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The peak of `anonymous_bytes` so far, as the one entry of a list, sampled every millisecond."""
    peak, over = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def memory_growth(work: Callable[[], T]) -> tuple[T, int]:
    """The result, and the bytes by which this process grew at most while the work ran."""
    held = held_bytes()
    with watched_memory() as peak:
        result = work()
    return result, peak[0] - held


# The arithmetic limit


def arithmetic_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in one large matrix product, a multiplication and an addition being two.

    Measured rather than read off a data sheet: the fastest of a few runs.
    """
    side = _PRODUCT_SIDE[device.type]
    a = random_square(side, device, dtype)

    def product() -> None:
        a @ a
        wait_for(device)

    product()  # compiles or loads what it needs
    return 2.0 * side**3 / min(timed(product)[1].seconds for _ in range(_PRODUCT_RUNS))


def random_square(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A matrix of normal numbers. A GPU multiplies ones, which switch fewer of its bits, at a higher clock rate."""
    return torch.randn(side, side, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has finished the work in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Rows to measure on


def rows_to_measure(
    features: Path | None, limit: int | None, drawn: tuple[int, int], seed: int
) -> tuple[np.ndarray, str]:
    """Unit grid rows (P, D) and a line about them: at most `limit` of `features`, else `drawn` = (P, D) random ones."""
    if features is not None:
        return read_rows(features, limit)
    tree = f"{TASKS} tasks > {CLASSES} classes > {SUBCLASSES} sub-classes"
    return drawn_rows(*drawn, seed), f"drawn: {drawn[0]} rows, {tree}, seed {seed}"


def drawn_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """Random unit grid rows (P, D) float32, shaped like features of images; a function of the arguments.

    A mixture of three levels (tasks, classes, sub-classes of uneven sizes). The spectrum decays as a power law and is
    rotated, so that the large directions are not the first ones in memory.
    """
    rng = np.random.default_rng(seed)
    spectrum = (1.0 + np.arange(dim)) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    of_mean, of_task, of_class, of_sub, of_row = (share**0.5 * spectrum for share in _VARIANCE_SHARES)
    num_classes = TASKS * CLASSES
    tasks = of_mean * rng.standard_normal(dim) + of_task * rng.standard_normal((TASKS, dim))
    classes = np.repeat(tasks, CLASSES, axis=0) + of_class * rng.standard_normal((num_classes, dim))
    subs = np.repeat(classes, SUBCLASSES, axis=0) + of_sub * rng.standard_normal((num_classes * SUBCLASSES, dim))
    sizes = rng.permutation((1.0 + np.arange(len(subs))) ** -0.5)
    rows = np.empty((num_rows, dim), dtype=np.float32)
    for start in range(0, num_rows, _BLOCK):
        out = rows[start : start + _BLOCK]
        picked = rng.choice(len(subs), size=len(out), p=sizes / sizes.sum())
        x = (subs[picked] + of_row * rng.standard_normal((len(out), dim))) @ rotation
        out[:] = _on_grid(x / np.linalg.norm(x, axis=1, keepdims=True))
    return rows


def read_rows(source: Path, limit: int | None) -> tuple[np.ndarray, str]:
    """Unit grid rows (P, D) of one .npy file or of all under a folder, in order of their names, and a line about them.

    Rows that are all zero stand for images that did not decode, and are left out.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.npy"))
    if not files:
        raise ValueError(f"--features: {source} is no .npy file and no folder with any; expected float32 rows")
    parts: list[np.ndarray] = []
    for file in files:
        if limit is not None and sum(len(part) for part in parts) >= limit:
            break
        parts.append(_read(file, parts[0].shape[1] if parts else None))
    rows = np.concatenate(parts)[:limit]
    return rows, f"real: {len(rows)} rows of {len(parts)} file{'s' * (len(parts) > 1)} in {source.name}"


def _read(file: Path, dim: int | None) -> np.ndarray:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--features: {file} is not a readable .npy file ({error})") from None
    if rows.ndim != 2 or rows.dtype != np.float32 or (dim is not None and rows.shape[1] != dim):
        expected = f"(rows, {dim or 'dimensions'}) float32"
        raise ValueError(f"--features: {file} has {rows.shape} {rows.dtype}, expected {expected}")
    norms = np.linalg.norm(rows, axis=1)
    rows, norms = rows[norms != 0], norms[norms != 0]
    if not np.all(np.abs(norms - 1) < 2**-7):
        raise ValueError(f"--features: {file} has rows of norm {norms.min():.4g} to {norms.max():.4g}, expected 1")
    return _on_grid(rows)


def _on_grid(rows: np.ndarray) -> np.ndarray:
    """Rounded to the grid of exact scores before anything is measured: no side gains by rounding."""
    return to_grid(torch.from_numpy(rows)).numpy()


def in_shards(rows: np.ndarray, shard_rows: int = SHARD_ROWS) -> Rows:
    """The rows in shards, as in a run, none of them bad."""
    shards = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    return Rows(shards, [np.ones(len(shard), dtype=bool) for shard in shards])


def squared_error(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> float:
    """Sum of the squared distances of rows to the centroids of their labels, in float64: the common objective."""
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        own = centroids[labels[start : start + _BLOCK]].astype(np.float64)
        total += float(np.square(rows[start : start + _BLOCK] - own).sum())
    return total


# Workers: processes of this machine with one thread each, joined by gloo


def run_workers(work: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Results of `work(comm, *args)` on every worker, in rank order; if one fails, all are ended."""
    address = _free_address()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    workers = [
        _CONTEXT.Process(target=_run_worker, args=(writer, (rank, size, address), work, args), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        with _interrupts_ignored():  # inherited by the children: on Ctrl-C this process ends them
            for worker in workers:
                worker.start()
        for _, writer in pipes:
            writer.close()  # so that the death of a worker shows as the end of its pipe
        return _results([reader for reader, _ in pipes])
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()  # after success its result is already here
                worker.join()


def _results(readers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        for ready in wait([reader for rank, reader in enumerate(readers) if rank not in results]):
            rank = next(r for r, reader in enumerate(readers) if reader is ready)
            try:
                ok, value = readers[rank].recv()
            except EOFError:
                raise RuntimeError(f"worker {rank} of {len(readers)} died without an error message") from None
            if not ok:
                raise RuntimeError(f"worker {rank} of {len(readers)} failed: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _run_worker(
    writer: Connection, place: tuple[int, int, str], work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One worker at `place` = (rank, size, address); sends (True, result) or (False, error)."""
    rank, size, address = place
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        if size == 1:
            result = work(Comm(), *args)
        else:
            with process_group(rank, size, address) as comm:
                result = work(comm, *args)
        writer.send((True, result))
    except Exception:
        writer.send((False, traceback.format_exc().strip().splitlines()[-1]))


@contextmanager
def single_process_group(device: torch.device) -> Iterator[Comm]:
    """A process group of this process alone; the training engine needs one."""
    with process_group(0, 1, _free_address(), device=device) as comm:
        yield comm


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
