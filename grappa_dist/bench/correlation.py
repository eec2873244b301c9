"""Eq. (4) over several ranks: the correlation matrix by rows, whole on every rank, and whole by plain autograd.

Plain autograd sums the matrix and its gradient over the ranks. One step is value and gradients of all pairs.

Shapes: B pairs of all ranks, D dimensions, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import CAN_WATCH_MEMORY, Timing, held_bytes, turns, watched_memory
from grappa_dist.bench.arguments import check_least
from grappa_dist.bench.processes import run_workers
from grappa_dist.bench.table import aligned
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.correlation import by_rows_penalty, whole_penalty
from grappa_dist.ops.correlation import by_rows, whole
from grappa_dist.training.barlow_twins import barlow_twins

ROWS, WHOLE, PLAIN = "by rows", "whole", "whole, plain autograd"
BETA = 0.0051
_MIB = 2**20


@dataclass(frozen=True)
class CorrelationSettings:
    """What to measure."""

    ranks: int = 2
    width: int = 4096
    pairs: int = 256
    repeats: int = 5

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_least(self, ranks=2, width=1, pairs=2, repeats=1)

    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by arithmetic."""
        sizes = self.pairs, self.width, self.ranks
        return {
            ROWS: 4 * by_rows(*sizes).sent,
            WHOLE: 4 * whole(*sizes).sent,
            PLAIN: 8 * whole(*sizes).sent,
        }


@dataclass(frozen=True)
class FoundCorrelation:
    """One way to do it."""

    name: str
    timing: Timing  # of a step: the slowest rank's seconds, the CPU seconds of all ranks
    peak: int | None  # bytes by which the rank that grew most grew in a step
    loss: float


def measure_correlation(settings: CorrelationSettings) -> list[FoundCorrelation]:
    settings.check()
    told = run_workers(_on_a_rank, settings.ranks, settings)
    found = []
    for name in (ROWS, WHOLE, PLAIN):
        runs = zip(*(rank[name]["runs"] for rank in told), strict=True)  # of every repeat, those of all ranks
        times = [(max(wall for wall, _ in ranks), sum(cpu for _, cpu in ranks)) for ranks in runs]
        peaks = [rank[name]["peak"] for rank in told]
        timing = Timing(tuple(wall for wall, _ in times), tuple(cpu for _, cpu in times))
        found.append(FoundCorrelation(name, timing, max(peaks) if CAN_WATCH_MEMORY else None, told[0][name]["loss"]))
    return found


def _on_a_rank(comm: Comm, settings: CorrelationSettings) -> dict[str, dict[str, Any]]:
    draws = torch.Generator().manual_seed(comm.rank)
    own = len(range(comm.rank, settings.pairs, comm.size))
    za, zb = (torch.randn(own, settings.width, generator=draws, requires_grad=True) for _ in range(2))
    penalties = {ROWS: by_rows_penalty(comm), WHOLE: whole_penalty(comm), PLAIN: None}

    def step(name: str) -> float:
        za.grad = zb.grad = None
        loss: Tensor = barlow_twins(za, zb, BETA, comm.allsum, penalty=penalties[name])
        loss.backward()
        return loss.item()

    found: dict[str, dict[str, Any]] = {}
    for name in penalties:
        found[name] = {"loss": step(name), "runs": []}  # a warm-up as well
        found[name]["peak"] = _peak(comm, partial(step, name))
    for order in turns(list(penalties), settings.repeats):
        for name in order:
            comm.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step(name)
            found[name]["runs"].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def _peak(comm: Comm, work: Callable[[], float]) -> int | None:
    if not CAN_WATCH_MEMORY:
        return None
    before = held_bytes()
    comm.barrier()
    with watched_memory() as peak:
        work()
    return peak[0] - before


def correlation_text(settings: CorrelationSettings, found: list[FoundCorrelation]) -> str:
    ours, sent = found[0].timing, settings.sent()
    title = f"C, D={settings.width}, B={settings.pairs}, R={settings.ranks}"
    lines = [[title, "ms", "ratio", "CPU ms of all", "ratio", "sent, MiB a rank", "peak, MiB a rank"]]
    for side in found:
        wall, cpu = min(side.timing.runs), min(side.timing.cpu_runs)
        lines.append(
            [
                side.name,
                f"{1000 * wall:.1f}",
                f"{wall / min(ours.runs):.2f}",
                f"{1000 * cpu:.1f}",
                f"{cpu / min(ours.cpu_runs):.2f}",
                f"{sent[side.name] / _MIB:.1f}",
                "-" if side.peak is None else f"{side.peak / _MIB:.1f}",
            ]
        )
    return aligned(lines)


def correlation_json(settings: CorrelationSettings, found: list[FoundCorrelation]) -> dict[str, Any]:
    sides = [
        {
            "name": side.name,
            "runs_s": side.timing.runs,
            "cpu_runs_s": side.timing.cpu_runs,
            "peak_bytes": side.peak,
            "sent_bytes": settings.sent()[side.name],
            "loss": side.loss,
        }
        for side in found
    ]
    return {"settings": vars(settings), "sides": sides}
