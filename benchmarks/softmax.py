"""The classifier of step 2 against one that materialises its logits: seconds of a step, and memory beside the weights.

Every side runs in its own processes, one side at a time, in alternating order. A section of `bench.py adapt`.

Shapes: B images, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    CAN_WATCH_MEMORY,
    MIB,
    Log,
    Timing,
    aligned,
    check_positive,
    held_bytes,
    over_ranks,
    run_workers,
    timed,
    turns,
    watched_memory,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.classifier import Classifier, ClassifierSettings
from grappa_dist.training.norm_softmax_loss import norm_softmax_sum

MATERIALISED, CHUNKED = "materialised, gradients", "chunked, gradients"
MATERIALISED_STEP, CHUNKED_STEP = "materialised, gradients and Adam", "chunked, gradients and Adam"
SHARDED_STEP, SAMPLED_STEP = "chunked, sharded", "chunked, sampled"
_BASELINE = {
    CHUNKED: MATERIALISED,
    CHUNKED_STEP: MATERIALISED_STEP,
    SHARDED_STEP: MATERIALISED_STEP,
    SAMPLED_STEP: CHUNKED_STEP,
}
_GAMMA, _DECAY, _RATE = 16.0, 1e-3, 1e-3


@dataclass(frozen=True)
class SoftmaxSettings:
    """Options of the section softmax of `bench.py adapt`."""

    classes: int
    dim: int
    batch: int
    sampled: float
    ranks: int
    threads: int
    steps: int
    repeats: int

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "classes", "dim", "batch", "ranks", "threads", "steps", "repeats")
        if not 0 < self.sampled < 1:
            raise ValueError(f"--sampled must be between 0 and 1, got {self.sampled}")
        if self.threads % self.ranks:
            raise ValueError(f"--threads must be a multiple of --ranks, {self.ranks}, got {self.threads}")

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.classes * self.dim

    @property
    def logit_bytes(self) -> int:
        return 4 * self.batch * self.classes


@dataclass(frozen=True)
class Side:
    """Time and memory of one side."""

    name: str
    timing: Timing  # of a step
    growth: int  # bytes by which all its ranks grew at most in a step
    gradient_bytes: int  # of these, the classes' gradient
    rank_bytes: int = 0  # the peak of the largest rank in a step: weights, Adam and all of the above

    @property
    def extra(self) -> int:
        """Bytes beside weights, gradient and state of Adam."""
        return self.growth - self.gradient_bytes


def measure_softmax(settings: SoftmaxSettings, log: Log) -> list[Side]:
    """All sides, with the times of all their steps."""
    settings.check()
    if not CAN_WATCH_MEMORY:
        raise ValueError("memory is read from /proc, which this system does not have")
    names = [MATERIALISED, CHUNKED, MATERIALISED_STEP, CHUNKED_STEP, SAMPLED_STEP]
    names += [SHARDED_STEP] if settings.ranks > 1 else []
    found: dict[str, Side] = {}
    for order in turns(names, settings.repeats):
        for name in order:
            log(f"{settings.classes} classes, {name}")
            side = _run_side(name, settings)
            found[name] = replace(side, timing=found[name].timing + side.timing) if name in found else side
    return [found[name] for name in names]


def _run_side(name: str, settings: SoftmaxSettings) -> Side:
    ranks = run_workers(_measure_rank, settings.ranks if name == SHARDED_STEP else 1, name, settings)
    timing = over_ranks([rank.timing for rank in ranks])
    keeps_gradient = name in (MATERIALISED, CHUNKED, MATERIALISED_STEP)
    gradient_bytes = settings.gradient_bytes if keeps_gradient else 0
    return Side(name, timing, sum(r.growth for r in ranks), gradient_bytes, max(r.kept + r.growth for r in ranks))


@dataclass(frozen=True)
class RankFindings:
    """One side on one rank."""

    timing: Timing
    kept: int  # bytes between two steps: weights and Adam, and libraries that the first step loads
    growth: int  # beyond that, within a step


def _measure_rank(comm: Comm, name: str, settings: SoftmaxSettings) -> RankFindings:
    torch.set_num_threads(settings.threads // comm.size)
    empty = held_bytes()
    step = _SIDES[name](comm, settings)
    step(0)  # loads libraries, and touches what stays
    kept = held_bytes()  # without what the first step freed: further steps need it again
    with watched_memory() as peak:
        runs = [timed(lambda at=at: step(at))[1] for at in range(1, settings.steps + 1)]  # type: ignore[misc]
    timing = Timing(tuple(run.seconds for run in runs), tuple(run.cpu for run in runs))
    return RankFindings(timing, kept - empty, peak[0] - kept)


def _batch(settings: SoftmaxSettings, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(settings.batch, settings.dim, generator=generator)
    return z.requires_grad_(), torch.randint(settings.classes, (settings.batch,), generator=generator)


def _materialised(z: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_GAMMA * (F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T), labels)


def _chunked(z: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return norm_softmax_sum(z, weight, labels, _GAMMA) / len(z)


def _by_autograd(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], adam: bool
) -> Callable[[Comm, SoftmaxSettings], Callable[[int], None]]:
    def side(comm: Comm, settings: SoftmaxSettings) -> Callable[[int], None]:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(F.normalize(torch.randn(settings.classes, settings.dim, generator=generator), dim=1))
        optimizer = torch.optim.Adam([weight], lr=_RATE, weight_decay=_DECAY, fused=True) if adam else None

        def step(at: int) -> None:
            z, labels = _batch(settings, at)
            loss(z, weight, labels).backward()
            if optimizer is not None:
                optimizer.step()
            weight.grad = None

        return step

    return side


def _by_classifier(sampled: bool) -> Callable[[Comm, SoftmaxSettings], Callable[[int], None]]:
    def side(comm: Comm, settings: SoftmaxSettings) -> Callable[[int], None]:
        how = ClassifierSettings(_GAMMA, _DECAY, settings.sampled if sampled else 1.0)
        classifier = Classifier(comm, torch.device("cpu"), (settings.classes, settings.dim), how)
        classifier.start(None, torch.Generator().manual_seed(0))
        for tensor in classifier.state.tensors().values():
            tensor.add_(0)  # zeros take no memory before they are written to

        def step(at: int) -> None:
            z, labels = _batch(settings, at)
            parts = z.tensor_split(comm.size)
            classifier.begin(at, labels)
            loss, _ = classifier.score(parts[comm.rank], labels, [len(part) for part in parts])
            loss.backward()
            classifier.step(_RATE)

        return step

    return side


_SIDES: dict[str, Callable[[Comm, SoftmaxSettings], Callable[[int], None]]] = {
    MATERIALISED: _by_autograd(_materialised, adam=False),
    CHUNKED: _by_autograd(_chunked, adam=False),
    MATERIALISED_STEP: _by_autograd(_materialised, adam=True),
    CHUNKED_STEP: _by_classifier(sampled=False),
    SHARDED_STEP: _by_classifier(sampled=False),
    SAMPLED_STEP: _by_classifier(sampled=True),
}


def as_json(settings: SoftmaxSettings, sides: Sequence[Side]) -> dict[str, Any]:
    return {"settings": vars(settings), "sides": [_figures(side, sides) for side in sides]}


def _figures(side: Side, sides: Sequence[Side]) -> dict[str, Any]:
    baseline = next((other for other in sides if other.name == _BASELINE.get(side.name)), None)
    return {
        "name": side.name,
        "seconds": side.timing.seconds,
        "runs_s": side.timing.runs,
        "cpu_seconds": side.timing.cpu,
        "growth_bytes": side.growth,
        "extra_bytes": side.extra,
        "rank_bytes": side.rank_bytes,
        "baseline": None if baseline is None else baseline.name,
        "ratio": None if baseline is None else baseline.timing.seconds / side.timing.seconds,
        "cpu_ratio": None if baseline is None else baseline.timing.cpu / side.timing.cpu,
        "extra_ratio": None if baseline is None else side.extra / baseline.extra,
    }


def as_text(settings: SoftmaxSettings, sides: Sequence[Side]) -> str:
    titles = ["seconds", "CPU s", "faster than baseline", "in CPU s"]
    titles += ["MiB beside", "of baseline", "of one B x K", "MiB a rank"]
    lines = [["softmax", *titles]]
    for side in sides:
        found = _figures(side, sides)
        ratios = [f"{found[name]:.2f}" if found["baseline"] else "-" for name in ("ratio", "cpu_ratio")]
        memory = [f"{side.extra / MIB:.0f}", f"{found['extra_ratio']:.3f}" if found["baseline"] else "-"]
        memory += [f"{side.extra / settings.logit_bytes:.3f}", f"{side.rank_bytes / MIB:.0f}"]
        lines.append([side.name, f"{side.timing.seconds:.2f}", f"{side.timing.cpu:.2f}", *ratios, *memory])
    threads = settings.threads // settings.ranks
    notes = [
        f"K={settings.classes}, D={settings.dim}, B={settings.batch}; a step; sampled {settings.sampled:.0%} against "
        f"chunked with all classes; sharded: {settings.ranks} ranks together, {threads} threads each",
        "MiB beside: peak beyond weights, their gradient and Adam's state; one matrix of logits, B x K, has "
        f"{settings.logit_bytes / MIB:.0f} MiB; MiB a rank: peak of the largest rank, weights and Adam included",
    ]
    return "\n".join([aligned(lines), *notes])
