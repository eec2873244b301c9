"""Figures of a training job's steps: summed over the ranks on the device, and read by the host now and then.

To read a number from a GPU is to wait until it has done all that it was given, and meanwhile it is given nothing. So
the sums of a step stay there, and the host reads those of many steps at once: every few seconds, and where something is
saved. Every step is logged, on a GPU some seconds late. On a CPU a look costs nothing, and every step is read at once.

What ranks have to decide alike travels with the sums, and is known to all of them at a read: whether to stop, whether
rank 0's clock asks for a checkpoint, and after how many steps to read again.

Shapes: F figures of a step, V votes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.config import Resources
from grappa_dist.distributed.worker import RankContext
from grappa_dist.search.in_flight import sent

Figures = Mapping[str, Tensor | float]  # scalars, on the device or known to the host
MOST_UNREAD = 100  # steps whose figures wait to be read
_VOTES = 4  # stop, save, written, steps until the next read


def waits(device: torch.device) -> bool:
    """Whether to read a number from this device is to wait for it."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Pace:
    """Seconds between what a training job does now and then; results do not depend on them."""

    log_s: float = 3.0  # between reads of figures that are on a GPU; 0: every step
    checkpoint_s: float | None = None  # between checkpoints, where the steps between them take longer; None: by steps

    @classmethod
    def of(cls, resources: Resources) -> Pace:
        return cls(resources.gpu_log_s, resources.checkpoint_s)


DEFAULT_PACE = Pace()


@dataclass(frozen=True)
class Reading:
    """What all ranks know after a read."""

    steps: list[tuple[int, dict[str, float]]]  # means per image over all ranks, and `images`, by step
    stop: bool  # some rank was asked to
    save: bool  # it is time to, by rank 0's clock
    written: bool  # a checkpoint under way is written by every rank


class PendingFigures:
    """Figures of the steps since the last read. All ranks add and read at the same steps."""

    def __init__(self, context: RankContext, pace: Pace) -> None:
        self._context, self._pace = context, pace
        self._rows: list[tuple[int, list[str], Tensor]] = []  # step, names, (F + V,) float64 on the device
        self._every = self._by_clock = 1  # steps between reads: those of all ranks, and what fits by this rank's clock
        self._read_at = self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether this step's figures are to be read, and those of the steps before it."""
        return len(self._rows) >= self._every

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, step: int, sums: Figures, *, written: bool = True) -> None:
        """Begins the sum over ranks of this rank's figures of a step.

        Args:
            written: whether this rank's part of a checkpoint is.
        """
        names = sorted(sums)
        known = [0.0 if isinstance(value := sums[name], Tensor) else float(value) for name in names]
        host = torch.tensor([*known, *self._votes(written)], dtype=torch.float64)
        values = list(sent(host, self._context.device).unbind())
        for place, name in enumerate(names):
            if isinstance(value := sums[name], Tensor):
                values[place] = value.double()
        self._rows.append((step, names, self._context.comm.sum_(torch.stack(values))))

    def _votes(self, written: bool) -> list[float]:
        first, pace = self._context.comm.rank == 0, self._pace
        save = pace.checkpoint_s is not None and time.monotonic() - self._saved_at >= pace.checkpoint_s
        return [self._context.stop_requested(), first and save, written, self._by_clock if first else 0]

    def read(self) -> Reading:
        """The figures of all steps since the last read; waits for the device."""
        flat, steps = torch.cat([values for _, _, values in self._rows]).tolist(), []
        for step, names, values in self._rows:
            totals, flat = flat[: len(values)], flat[len(values) :]
            figures = dict(zip(names, totals, strict=False))
            images = figures.pop("images")
            means = {name: total / max(images, 1) for name, total in figures.items()}
            steps.append((step, {**means, "images": images}))
        stop, save, written, every = totals[-_VOTES:]
        self._every = int(every)
        self._measure(len(steps))
        self._rows.clear()
        return Reading(steps, stop > 0, save > 0, written == self._context.comm.size)

    def _measure(self, count: int) -> None:
        """From what `count` steps took, how many fit the time between reads; ranks follow rank 0."""
        now = time.monotonic()
        took_s, self._read_at = max(now - self._read_at, 1e-9), now
        fit = int(self._pace.log_s * count / took_s) if waits(self._context.device) else 1
        self._by_clock = max(1, min(fit, MOST_UNREAD))

    def saved(self) -> None:
        """The time between checkpoints begins anew."""
        self._saved_at = time.monotonic()
