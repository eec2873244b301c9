"""The training loop of adapt and fuse: steps through the engine, figures, checkpoints, resume, a clean stop.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from grappa_dist.console import METRICS_FILE, Events, parse_event
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import replace
from grappa_dist.storage import open_to_read, open_to_write
from grappa_dist.training.checkpoints import RowShard, load_checkpoint, save_checkpoint
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.trackers import Tracker, TrackerGroup

NAMED = 5  # images, in a message
_MAY_BE_UNDEFINED = "decay_to_gradient"  # NaN where there is no gradient, with a model that is fine
_FEW = 3  # steps, too few for a time left
_RECENT = 20  # steps that speed and waiting are averaged over


class Objective(Protocol):
    """What is trained. `begin(step)` prepares the data from a step on; `backward` computes one step's gradients."""

    @property
    def module(self) -> nn.Module: ...

    def begin(self, step: int) -> None: ...

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        """This rank's sums of figures, which add over ranks.

        `images`, `loss` and `gradient_norm` (these two multiplied by the images) are among them: a gradient may be NaN
        where the loss is finite, and nothing is updated where a figure is not finite.
        """


class ShardedModule(Protocol):
    """What is trained outside the engine, its rows spread over the ranks; `step` follows every `backward`."""

    def step(self, learning_rate: float) -> None: ...

    def shard(self) -> RowShard: ...


@dataclass(frozen=True)
class Schedule:
    """How many steps a job has, when it saves its state, and the learning rate of each step."""

    steps: int
    checkpoint_steps: int
    learning_rate: Callable[[int], float]

    @classmethod
    def falling(cls, steps: int, checkpoint_steps: int, *, peak: float, warmup_steps: int) -> Schedule:
        """A learning rate that rises to `peak` and falls along a cosine."""
        warmup = min(warmup_steps, steps - 1)
        return cls(steps, checkpoint_steps, lambda step: peak * cosine(step, steps, warmup))


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """Factor in [0, 1] of the learning rate for `step` of 0..total: half a cosine from 1 down to 0 at `total`.

    The first `warmup` steps climb to it in a straight line that starts above 0: no step is spent on a rate of zero.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"cosine: warmup must lie in [0, total) with total = {total}, got {warmup}")
    if not 0 <= step <= total:
        raise ValueError(f"cosine: step must lie in [0, {total}], got {step}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@dataclass(frozen=True)
class Reporting:
    """What a job reports beside its figures, and where to."""

    suspects: Callable[[], Sequence[str]] = tuple  # images that may be why a loss is not finite; all ranks call it
    trackers: Callable[[], Sequence[Tracker]] = tuple  # log every step, on rank 0
    decisions: Mapping[str, str] = field(default_factory=dict)  # made when the job began, for its log


def train(
    context: RankContext,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    folder: Path,
    job: str,
    sharded: Mapping[str, ShardedModule] = MappingProxyType({}),
    zero_stage: int = 0,
    reporting: Reporting = Reporting(),
) -> bool:
    """Trains from the newest checkpoint in `folder` to the end; False when it was asked to stop and saved its state.

    `sharded` are the modules outside the engine, by their names in checkpoints; their gradients must be finite where
    the loss is. An ArithmeticError names the step, and its images, where a figure is not finite.
    """
    shards = {name: module.shard() for name, module in sharded.items()}
    start = load_checkpoint(context, folder, objective.module, optimizer, shards)
    engine = Engine(objective.module, optimizer, context.comm, context.device, zero_stage=zero_stage)
    with ExitStack() as stack:
        stack.callback(engine.close)
        log = _Log(context, folder / METRICS_FILE, job, reporting, start=start, steps=schedule.steps)
        stack.callback(log.close)
        objective.begin(start)
        log.begin()
        for step in range(start, schedule.steps):
            figures, stop = _reduce(context, objective.backward(engine, step))
            if any(not math.isfinite(v) for name, v in figures.items() if not name.startswith(_MAY_BE_UNDEFINED)):
                raise ArithmeticError(f"{job}: {_describe_not_finite(figures, step, reporting.suspects())}")
            done, rate = step + 1, schedule.learning_rate(step)
            engine.step(rate)
            for module in sharded.values():
                module.step(rate)
            log.step(step, rate, figures)
            if done < schedule.steps and (stop or done % schedule.checkpoint_steps == 0):
                save_checkpoint(context, folder, done, objective.module, engine.state(), shards)
                if stop:
                    return False
        return True


def _reduce(context: RankContext, sums: dict[str, float]) -> tuple[dict[str, float], bool]:
    """Means per image over all ranks, and whether any rank was asked to stop (so that all stop at the same step)."""
    names = sorted(sums)
    values = torch.tensor([sums[n] for n in names] + [float(context.stop_requested())], dtype=torch.float64)
    totals = context.comm.sum_(values.to(context.device)).tolist()
    figures = dict(zip(names, totals, strict=False))
    images = figures.pop("images")
    return {**{name: total / max(images, 1) for name, total in figures.items()}, "images": images}, totals[-1] > 0


def _describe_not_finite(figures: Mapping[str, float], step: int, suspects: Sequence[str]) -> str:
    """Which figures are the cause: losses before what follows from them, those of single sets before their mean."""
    wrong = {name: value for name, value in figures.items() if not math.isfinite(value)}
    wrong = {name: value for name, value in wrong.items() if name.split(" ")[0] == "loss"} or wrong
    wrong = {name: value for name, value in wrong.items() if " " in name} or wrong
    values = ", ".join(f"{name} is {value}" for name, value in wrong.items())
    named = f"; images of that step: {', '.join(suspects[:NAMED])}" if suspects else ""
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return f"{values} at step {step}; nothing was updated{named}{more}"


class _Log:
    """Rank 0 writes metrics.jsonl and the trackers; every rank reports its status, of which rank 0's is shown."""

    def __init__(
        self, context: RankContext, path: Path, job: str, reporting: Reporting, *, start: int, steps: int
    ) -> None:
        self._context, self._job, self._steps = context, job, steps
        self._recent = deque[tuple[float, float, float]](maxlen=_RECENT + 1)  # time, images, seconds of waiting
        self._first: tuple[int, float] | None = None  # the first step, and when it had ended
        self._events, self._trackers = None, None
        if context.comm.rank == 0:
            _drop_steps(path, start)
            self._events = Events(path, job=job)
            where = {"ranks": context.comm.size, "host": socket.gethostname(), "pid": os.getpid()}
            self._events("begins", at_step=start, **where, **reporting.decisions)
            self._trackers = TrackerGroup(reporting.trackers(), self._tracker_failed)

    def begin(self) -> None:
        """The first step begins; what comes before it takes no part in rates."""
        self._recent.append((time.monotonic(), 0.0, 0.0))

    def step(self, step: int, rate: float, figures: dict[str, float]) -> None:
        waited_s = figures.pop("waited_s", None)
        self._recent.append((time.monotonic(), figures["images"], waited_s or 0.0))
        recent = list(self._recent)[1:]
        elapsed = max(recent[-1][0] - self._recent[0][0], 1e-9)
        speed = sum(images for _, images, _ in recent) / elapsed
        waits = {} if waited_s is None else {"data_wait_share": round(sum(w for _, _, w in recent) / elapsed, 3)}
        if self._events:
            self._events("step", step=step, lr=rate, images_per_s=round(speed, 1), **waits, **figures)
        if self._trackers:
            self._trackers.log(step, {"lr": rate, "images_per_s": speed, **waits, **figures})
        status: dict[str, object] = {"loss": figures["loss"], "images_per_s": speed, **waits}
        if (left := self._left_s(step)) is not None:
            status["left_s"] = left
        if self._trackers and self._trackers.failed:
            status["trackers_off"] = self._trackers.failed
        self._context.report({"done": step + 1, "of": self._steps, **status})

    def _left_s(self, step: int) -> float | None:
        """Seconds by all steps but the first, which has what later ones do not: None before there are _FEW of them.

        What some steps have alone, as the k-NN graph of an epoch, is so spread over all.
        """
        now = self._recent[-1][0]
        if self._first is None:
            self._first = (step, now)
        first, then = self._first
        return (self._steps - step - 1) * (now - then) / (step - first) if step - first >= _FEW else None

    def close(self) -> None:
        if self._trackers:
            self._trackers.close()
        if self._events:
            self._events.close()

    def _tracker_failed(self, tracker: str, reason: str) -> None:
        if self._events:
            self._events("tracker_failed", tracker=tracker, reason=reason)


def _drop_steps(path: Path, start: int) -> None:
    """Drops from a log what a killed attempt wrote after the checkpoint that this one resumes from."""
    if path.exists():

        def write(fresh: Path) -> None:
            with open_to_read(path) as lines, open_to_write(fresh) as kept:
                for line in lines:
                    event = parse_event(line)
                    if event is not None and event.get("step", 0) < start:
                        kept.write(line)

        replace(path, write)
