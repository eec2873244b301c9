"""One assignment of rows to their nearest centroids, on a CPU or a GPU, against a plain matrix product and argmin.

Ours gives exact labels (search/rerank.py); the baseline computes in float32, without TF32, tile by tile. The arithmetic
limit is that of one large matrix product in the type of our candidate generator, measured in the same run.

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Log,
    Timing,
    aligned,
    aligned_header,
    arithmetic_limit,
    check_device,
    check_positive,
    drawn_rows,
    in_shards,
    in_turns,
    machine,
    wait_for,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import ShardedRows, join_rows
from grappa_dist.progress import lost_trials
from grappa_dist.search.candidates import Centroids, Float32Generator
from grappa_dist.search.rerank import assign

OURS, BASELINE = "ours", "matmul + argmin"
_TILE = 2**28  # products that the baseline computes at once


@dataclass(frozen=True)
class AssignSettings:
    """Options of `bench.py assign`."""

    rows: int
    dim: int
    num_labels: int
    device: str
    threads: int
    repeats: int

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "rows", "dim", "num_labels", "threads", "repeats")
        if self.num_labels > self.rows:
            raise ValueError(f"--num-labels must be at most the number of rows, {self.rows}, got {self.num_labels}")
        check_device(self.device)


@dataclass(frozen=True)
class AssignFindings:
    """Results of `bench.py assign`."""

    timings: dict[str, Timing]
    generator: str  # our candidate generator
    dtype: str  # of its scores
    limit: float  # operations per second in one large product of that type
    operations: float  # of one assignment
    same: float  # share of rows to which both sides gave the same label

    @property
    def ratio(self) -> float:
        return self.timings[BASELINE].fastest / self.timings[OURS].fastest

    @property
    def of_limit(self) -> float:
        return self.operations / self.timings[OURS].fastest / self.limit


def measure_assign(settings: AssignSettings, log: Log) -> AssignFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    log("rows")
    rows = drawn_rows(settings.rows, settings.dim, 0)
    sharded = join_rows(Comm(), in_shards(rows, len(rows)), device=device)
    x = torch.from_numpy(rows).to(device)
    c = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: settings.num_labels].to(device)]
    sides: dict[str, Callable[[], Tensor]] = {OURS: lambda: _ours(sharded, x, c), BASELINE: lambda: _baseline(x, c)}
    labels = {name: side() for name, side in sides.items()}  # the first run warms up
    _, timings = in_turns({name: partial(_finished, side) for name, side in sides.items()}, settings.repeats, log)
    dtype = torch.float32 if isinstance(sharded.generator, Float32Generator) else torch.bfloat16
    operations = 2.0 * settings.rows * settings.num_labels * settings.dim
    same = float((labels[OURS] == labels[BASELINE]).float().mean())
    generator, limit = type(sharded.generator).__name__, arithmetic_limit(device, dtype)
    return AssignFindings(timings, generator, str(dtype).removeprefix("torch."), limit, operations, same)


def _ours(sharded: ShardedRows, x: Tensor, c: Tensor) -> Tensor:
    centroids = Centroids.of(c, sharded.generator)
    squares = sharded.squares.to(x.device)
    blocks = zip(x.split(sharded.block_rows), squares.split(sharded.block_rows), strict=True)
    return torch.cat([assign(block, centroids, squares=of_block).labels for block, of_block in blocks])


def _baseline(x: Tensor, c: Tensor) -> Tensor:
    half = c.square().sum(1) / 2
    return torch.cat([(rows @ c.T - half).argmax(1) for rows in x.split(max(1, _TILE // len(c)))])


def _finished(side: Callable[[], Tensor]) -> None:
    wait_for(side().device)


def as_json(header: dict[str, str], settings: AssignSettings, found: AssignFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "settings": vars(settings),
        "generator": found.generator,
        "dtype": found.dtype,
        "limit_flops": found.limit,
        "of_limit": found.of_limit,
        "baseline_over_ours": found.ratio,
        "same_labels_share": found.same,
        "seconds": {name: timing.runs for name, timing in found.timings.items()},
        "notes": lost_trials(),
    }


def as_text(header: dict[str, str], settings: AssignSettings, found: AssignFindings) -> str:
    shape = f"{settings.rows} drawn rows, {settings.dim} dimensions, K={settings.num_labels}, on {settings.device}"
    lines: list[Sequence[str]] = [["", "seconds", "baseline/ours"]]
    for name, timing in found.timings.items():
        lines.append([name, f"{timing.fastest:.3f}", "-" if name == OURS else f"{found.ratio:.2f}"])
    ours = (
        f"ours: {found.generator}, {found.of_limit:.0%} of the limit of {found.dtype} here "
        f"({found.limit / 1e12:.2f} TFLOP/s in one product); labels exact, the baseline has {found.same:.4%} of them"
    )
    return "\n".join([aligned_header({**header, "rows": shape}), "", aligned(lines), ours, *lost_trials()])


SHORT = "against torch's matmul + argmin"
DESCRIPTION = """\
One assignment of all rows to their nearest centroids, exact, against float32 matrix products and argmin in
torch: on a CPU, or on a GPU, where one kernel computes products and their maximum. Prints the ratio (baseline / ours:
above 1, ours is faster) and the share of the machine's arithmetic limit that ours reaches."""
EXAMPLE = """example, on a GPU:
  python launch/bench.py assign --device cuda --rows 1000000 --num-labels 131072"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=133_339, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="on a CPU; default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, the fastest; default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = AssignSettings(**options)
    header = machine(settings.threads, *(["triton"] if settings.device == "cuda" else []))
    found = measure_assign(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
