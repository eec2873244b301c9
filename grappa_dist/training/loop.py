"""The training loop of adapt and fuse: steps through the engine, figures, checkpoints, resume, a clean stop.

The host gives a GPU step after step and reads what came of them every few seconds (training/figures.py), before
anything is saved and before weights are used for something that is kept. So nothing comes of a step after a figure that
is not finite: its updates are never saved.

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

from grappa_dist.bucket import refreshed
from grappa_dist.console import METRICS_FILE, Events, parse_event
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import replace
from grappa_dist.storage import open_to_read, open_to_write
from grappa_dist.training.checkpoints import CheckpointWriter, RowShard, load_checkpoint
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, Figures, Pace, PendingFigures, Reading
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

    def backward(self, engine: Engine, step: int) -> Figures:
        """This rank's sums of figures, which add over ranks; those that a GPU computes stay on it.

        `images`, `loss` and `gradient_norm` (these two multiplied by the images) are among them: a gradient may be NaN
        where the loss is finite, and nothing is saved where a figure is not finite.
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

    # Images of a step that may be why a loss is not finite; all ranks call it
    suspects: Callable[[int], Sequence[str]] = lambda step: ()
    uses_weights: Callable[[int], bool] = lambda step: False  # whether a step begins with something kept, made of them
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
    pace: Pace = DEFAULT_PACE,
) -> bool:
    """Trains from the newest checkpoint in `folder` to the end; False when it was asked to stop and saved its state.

    `sharded` are the modules outside the engine, by their names in checkpoints; their gradients must be finite where
    the loss is. An ArithmeticError names the step, and its images, where a figure is not finite.
    """
    shards = {name: module.shard() for name, module in sharded.items()}
    start = load_checkpoint(context, folder, objective.module, optimizer, shards)
    parted = zero_stage if context.comm.size > 1 else 0  # a world of one has nobody to share with
    engine = Engine(objective.module, optimizer, context.comm, context.device, zero_stage=parted)
    with ExitStack() as stack:
        stack.callback(engine.close)
        log = _Log(context, folder / METRICS_FILE, job, reporting, start=start, steps=schedule.steps)
        stack.callback(log.close)
        writer = stack.enter_context(CheckpointWriter(context, folder))
        pending = PendingFigures(context, pace)
        saving = _Saving(
            writer, schedule, pending, lambda done: writer.begin(done, objective.module, engine.state(), shards)
        )
        steps = _Steps(objective, engine, schedule, tuple(sharded.values()), job, reporting, log, pending, saving)
        objective.begin(start)
        log.begin()
        return all(steps.take(step) for step in range(start, schedule.steps))


@dataclass(frozen=True)
class _Steps:
    """What a step of training is."""

    objective: Objective
    engine: Engine
    schedule: Schedule
    sharded: Sequence[ShardedModule]
    job: str
    reporting: Reporting
    log: _Log
    pending: PendingFigures
    saving: _Saving

    def take(self, step: int) -> bool:
        """One step; False if training stops after it, with its state saved."""
        done, rate = step + 1, self.schedule.learning_rate(step)
        if self.pending and self.reporting.uses_weights(step):
            self.log.steps(self._read(), self.schedule.learning_rate)
        sums = self.objective.backward(self.engine, step)
        self.pending.add(step, sums, written=self.saving.written())
        reading = self._read() if self.pending.due or self.saving.due(done) else None
        self.engine.step(rate)
        for module in self.sharded:
            module.step(rate)
        if reading is None:
            return True
        self.log.steps(reading, self.schedule.learning_rate)
        return not self.saving.after(done, reading)

    def _read(self) -> Reading:
        """The figures of all steps since the last read.

        Raises:
            ArithmeticError: one is not finite; names the first such step.
        """
        reading = self.pending.read()
        for step, figures in reading.steps:
            if any(not math.isfinite(v) for name, v in figures.items() if not name.startswith(_MAY_BE_UNDEFINED)):
                suspects = self.reporting.suspects(step)
                raise ArithmeticError(f"{self.job}: {_describe_not_finite(figures, step, suspects)}")
        return reading


class _Saving:
    """When a job saves its state: by steps, by time, and where it is asked to stop. All ranks decide alike."""

    def __init__(
        self, writer: CheckpointWriter, schedule: Schedule, pending: PendingFigures, begin: Callable[[int], None]
    ) -> None:
        """`begin` begins to save the state after some steps."""
        self._writer, self._schedule, self._pending, self._begin = writer, schedule, pending, begin
        self._wanted = False  # a checkpoint that waits for the one before it to be written

    def written(self) -> bool:
        """Whether this rank's part of a checkpoint is."""
        return self._writer.written()

    def due(self, done: int) -> bool:
        """Whether figures have to be read after as many steps: the state may be saved only where they are finite."""
        return done == self._schedule.steps or done % self._schedule.checkpoint_steps == 0

    def after(self, done: int, reading: Reading) -> bool:
        """Saves where it is time; whether training stops here."""
        last = done == self._schedule.steps
        stop = reading.stop and not last
        self._wanted |= reading.save or done % self._schedule.checkpoint_steps == 0
        if reading.written or stop or last:
            self._writer.finish()
        if stop or (self._wanted and not last and not self._writer.under_way):
            self._begin(done)
            self._pending.saved()
            self._wanted = False
        if stop:
            self._writer.finish()
        return stop


def _describe_not_finite(figures: Mapping[str, float], step: int, suspects: Sequence[str]) -> str:
    """Which figures are the cause: losses before what follows from them, those of single sets before their mean."""
    wrong = {name: value for name, value in figures.items() if not math.isfinite(value)}
    wrong = {name: value for name, value in wrong.items() if name.split(" ")[0] == "loss"} or wrong
    wrong = {name: value for name, value in wrong.items() if " " in name} or wrong
    values = ", ".join(f"{name} is {value}" for name, value in wrong.items())
    named = f"; images of that step: {', '.join(suspects[:NAMED])}" if suspects else ""
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return f"{values} at step {step}; nothing of it was saved{named}{more}"


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
            _drop_steps(refreshed(path), start)
            self._events = Events(path, job=job)
            where = {"ranks": context.comm.size, "host": socket.gethostname(), "pid": os.getpid()}
            self._events("begins", at_step=start, **where, **reporting.decisions)
            self._trackers = TrackerGroup(reporting.trackers(), self._tracker_failed)

    def begin(self) -> None:
        """The first step begins; what comes before it takes no part in rates."""
        self._recent.append((time.monotonic(), 0.0, 0.0))

    def steps(self, reading: Reading, rate_of: Callable[[int], float]) -> None:
        """Logs the steps that were read together, as if they had taken equal times."""
        before, now, count = self._recent[-1][0], time.monotonic(), len(reading.steps)
        for number, (step, figures) in enumerate(reading.steps, start=1):
            at = now if number == count else before + (now - before) * number / count
            self._step(step, rate_of(step), figures, at)

    def _step(self, step: int, rate: float, figures: dict[str, float], at: float) -> None:
        """Logs a step that ended at this time."""
        waited_s = figures.pop("waited_s", None)
        self._recent.append((at, figures["images"], waited_s or 0.0))
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
