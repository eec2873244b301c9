"""Seconds of wall clock and of CPU, peak memory, and the order in which sides take turns.

A command line that says what is wrong with it in one line, and the checks that commands share.

The arithmetic limit of a device: what it reaches in one large matrix product, measured and not read off a sheet.

What a measurement ran on, without which its numbers say nothing.

Workers for a measurement: real processes of this machine with one thread each, joined by gloo.

Rows to measure on: drawn ones that are shaped like features of images, or real ones from .npy files.

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

from benchmarks.faiss_baselines import faiss_version
from grappa_dist.distributed.collectives import Comm, process_group
from grappa_dist.distributed.sharded_rows import Rows
from grappa_dist.search.fixed_point import to_grid


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side: names to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    name, *numbers = widths
    padded = ([line[0].ljust(name), *map(str.rjust, line[1:], numbers)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def aligned_header(header: dict[str, str]) -> str:
    width = max(len(name) for name in header)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in header.items())


TASKS, CLASSES, SUBCLASSES = 8, 60, 8  # of all, of a task, of a class
_SHARES = (0.2, 0.2, 0.2, 0.15, 0.25)  # of a row's energy: what all rows share, its task, class, sub-class, itself
SHARD_ROWS = 1000  # of a shard that make_shards.py writes by default
_BLOCK = 8192


def drawn_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """Unit grid rows (P, D) float32: a mixture in a mixture in a mixture, with classes of uneven sizes.

    The spectrum decays as a power law, and is turned so that no algorithm finds the large directions first in memory.
    """
    draws = np.random.default_rng(seed)
    spectrum = (1.0 + np.arange(dim)) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    turn = np.linalg.qr(draws.standard_normal((dim, dim)))[0]
    mean, task, kind, sub, own = (share**0.5 * spectrum for share in _SHARES)
    num_kinds = TASKS * CLASSES
    tasks = mean * draws.standard_normal(dim) + task * draws.standard_normal((TASKS, dim))
    kinds = np.repeat(tasks, CLASSES, axis=0) + kind * draws.standard_normal((num_kinds, dim))
    subs = np.repeat(kinds, SUBCLASSES, axis=0) + sub * draws.standard_normal((num_kinds * SUBCLASSES, dim))
    sizes = draws.permutation((1.0 + np.arange(len(subs))) ** -0.5)
    rows = np.empty((num_rows, dim), dtype=np.float32)
    for start in range(0, num_rows, _BLOCK):
        out = rows[start : start + _BLOCK]
        picked = draws.choice(len(subs), size=len(out), p=sizes / sizes.sum())
        x = (subs[picked] + own * draws.standard_normal((len(out), dim))) @ turn
        out[:] = _on_grid(x / np.linalg.norm(x, axis=1, keepdims=True))
    return rows


def read_rows(source: Path, limit: int | None) -> tuple[np.ndarray, str]:
    """Unit grid rows (P, D) of one .npy file or of all under a folder, in order of their names, and what they are.

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
    """All sides are given these values, so none gains by rounding."""
    return to_grid(torch.from_numpy(rows)).numpy()


def in_shards(rows: np.ndarray, shard_rows: int = SHARD_ROWS) -> Rows:
    """The rows as a run holds them: in shards, none of them bad."""
    shards = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    return Rows(shards, [np.ones(len(shard), dtype=bool) for shard in shards])


def squared_error(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> float:
    """Sum of the squared distances of rows to the centroids of their labels, in float64: the common objective."""
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        own = centroids[labels[start : start + _BLOCK]].astype(np.float64)
        total += float(np.square(rows[start : start + _BLOCK] - own).sum())
    return total


_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit the parent's threads and memory


def run_workers(work: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `work(comm, *args)` returns on each worker, in rank order; the first that fails ends the others."""
    address = _free_address()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    workers = [
        _CONTEXT.Process(target=_run, args=(writer, rank, size, address, work, args), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        with _interrupts_ignored():  # a child inherits that: Ctrl-C ends this process, and this one ends them
            for worker in workers:
                worker.start()
        for _, writer in pipes:
            writer.close()  # so that a worker that dies in silence is seen as the end of its pipe
        return _collect([reader for reader, _ in pipes])
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()  # on success it has said all it had to say
                worker.join()


def _collect(readers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        for ready in wait([reader for rank, reader in enumerate(readers) if rank not in results]):
            rank = next(r for r, reader in enumerate(readers) if reader is ready)
            try:
                ok, value = readers[rank].recv()
            except EOFError:
                raise RuntimeError(f"worker {rank} of {len(readers)} died without a word") from None
            if not ok:
                raise RuntimeError(f"worker {rank} of {len(readers)} failed: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _run(  # one argument per thing that a spawned process is given
    writer: Connection, rank: int, size: int, address: str, *job: Any
) -> None:
    work, args = job
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
def group_of_one(device: torch.device) -> Iterator[Comm]:
    """A process group of this process alone, which the training engine wants."""
    with process_group(0, 1, _free_address(), backend="nccl" if device.type == "cuda" else "gloo") as comm:
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


def machine(threads: int, *libraries: str) -> dict[str, str]:
    """The lines of a header, by name; `libraries` whose versions are told instead of faiss's."""
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
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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


_LARGE = {"cpu": 2048, "cuda": 8192}  # side of the product
_RUNS = 5


def arithmetic_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second, a multiplication and an addition being two; the fastest of a few runs."""
    side = _LARGE[device.type]
    a = torch.ones(side, side, device=device, dtype=dtype)

    def product() -> None:
        a @ a
        wait_for(device)

    product()  # compiles or loads what it needs
    return 2.0 * side**3 / min(timed(product)[1].seconds for _ in range(_RUNS))


def wait_for(device: torch.device) -> None:
    """Until what it was asked to compute is there: a GPU is asked ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error, which hides the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def check_least(settings: Any, **least: int) -> None:
    """Raises a ValueError that names the flag of a setting below its least value; None, not given, is none."""
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
