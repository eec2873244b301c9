"""What a piece of work asks of a GPU: operations, host waits, copies, collectives, FLOPs and bytes, by file and line.

An *operation* is a call of torch that computes on the device, which is at least one kernel; views and empty tensors are
none. A *wait* is a call after which the host goes on only when the device has done all that it was asked before. What a
thread beside the main one does is counted apart: it holds up nobody but itself.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BACKWARD = "(backward)"  # autograd calls operations from a thread without a line of Python
_OWN = tuple(f"{ROOT / folder}/" for folder in ("grappa_dist", "benchmarks", "tests"))
_NOT = f"{Path(__file__).parent}/"
_DEEPSPEED = "/deepspeed/"

Place = tuple[str, str]  # what, and where


@dataclass(frozen=True)
class Limits:
    """What a GPU can do at most: operations and bytes a second, and the host's time for a launch."""

    name: str
    products: Mapping[str, float]  # by type of the operands
    bytes_per_s: float
    launch_s: float

    def seconds(self, dtype: str, flops: int, moved: int) -> float:
        """The time of an operation that is bound by nothing else."""
        return max(flops / self.products.get(dtype, self.products["float32"]), moved / self.bytes_per_s)


# bf16: measured on random operands; float32 without TF32, float64 by tensor cores, and memory: the data sheet's
LIMITS = Limits("an H200", {"bfloat16": 788e12, "float32": 67e12, "float64": 67e12}, 4.8e12, 5e-6)


@dataclass
class Counts:
    """Of one piece of work."""

    operations: Counter[Place] = field(default_factory=Counter)
    waits: Counter[Place] = field(default_factory=Counter)
    background_waits: Counter[Place] = field(default_factory=Counter)
    copies: Counter[Place] = field(default_factory=Counter)  # between host and device
    collectives: Counter[Place] = field(default_factory=Counter)
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    flops: int = 0  # of products and attention
    bytes_moved: int = 0  # operands read once, results written once
    limit_s: float = 0.0  # the time of all operations, one after the other, by the limits of `Limits`

    def numbers(self) -> dict[str, Any]:
        """The totals."""
        return {
            "operations": self.operations.total(),
            "waits": self.waits.total(),
            "background_waits": self.background_waits.total(),
            "copies": self.copies.total(),
            "collectives": self.collectives.total(),
            "bytes_to_device": self.bytes_to_device,
            "bytes_to_host": self.bytes_to_host,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "limit_s": self.limit_s,
        }

    def report(self, most: int = 12) -> str:
        """The totals, and the lines that have most of each."""
        n = self.numbers()
        lines = [
            f"{n['operations']} operations, {n['waits']} waits, {n['copies']} copies "
            f"({n['bytes_to_device']:,} bytes to the device, {n['bytes_to_host']:,} to the host), "
            f"{n['collectives']} collectives",
            f"{n['flops'] / 1e9:.2f} GFLOP, {n['bytes_moved'] / 1e6:.2f} MB moved: {1e3 * n['limit_s']:.3f} ms by the "
            f"limits of {LIMITS.name}; {1e3 * LIMITS.launch_s * n['operations']:.3f} ms to launch the operations",
        ]
        if n["background_waits"]:
            lines.append(f"{n['background_waits']} waits of other threads")
        for name in ("waits", "background_waits", "copies", "collectives", "operations"):
            places: Counter[Place] = getattr(self, name)
            lines += [f"  {name}"] * bool(places)
            lines += [f"    {count:6d}  {what:40} {where}" for (what, where), count in places.most_common(most)]
        return "\n".join(lines)

    def by_file(self) -> Counter[str]:
        """Operations by file."""
        found = Counter[str]()
        for (_, where), count in self.operations.items():
            found[where.partition(":")[0]] += count
        return found

    def as_json(self) -> dict[str, Any]:
        """The totals, and where the host waits."""
        waits = {f"{what} at {where}": count for (what, where), count in self.waits.most_common()}
        return {**self.numbers(), "waits_at": waits}


class _Counting(threading.local):
    background = False  # whether this thread is one that the program started


_thread = _Counting()
_meters: list[Meter] = []
_lock = threading.Lock()


def in_background() -> None:
    """What this thread does from now on is not the main thread's."""
    _thread.background = True


class Meter:
    """What is counted, and handed out piece by piece."""

    def __init__(self) -> None:
        self.counts = Counts()

    def take(self) -> Counts:
        """What was counted since the last call."""
        with _lock:
            last, self.counts = self.counts, Counts()
        return last


@contextmanager
def counting() -> Iterator[Meter]:
    """Counts what all threads do inside."""
    meter = Meter()
    with _lock:
        _meters.append(meter)
    try:
        yield meter
    finally:
        with _lock:
            _meters.remove(meter)


def add(kind: str, what: str) -> None:
    """One of `kind`, a field of `Counts`."""
    if _meters:
        place = (what, where())
        name = "background_waits" if kind == "waits" and _thread.background else kind
        with _lock:
            for meter in _meters:
                getattr(meter.counts, name)[place] += 1


def add_number(kind: str, number: float) -> None:
    with _lock:
        for meter in _meters:
            setattr(meter.counts, kind, getattr(meter.counts, kind) + number)


def is_counting() -> bool:
    return bool(_meters)


def where() -> str:
    """The innermost line of the package, of its tests or of DeepSpeed that is being run, as file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _short(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return BACKWARD


@cache
def _short(path: str) -> str:
    """A file of the package, of its tests or of DeepSpeed as it is shown; "" for all others."""
    if path.startswith(_NOT):
        return ""
    if path.startswith(_OWN):
        return path.removeprefix(f"{ROOT}/").removeprefix("grappa_dist/")
    _, found, after = path.rpartition(_DEEPSPEED)
    return f"deepspeed/{after}" if found else ""
