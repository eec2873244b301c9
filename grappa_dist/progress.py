"""How far a run is: rates from the first batch on, the time left, and how that is put into words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_REASON = 300  # characters of an error that are repeated
_lost: list[str] = []  # lines about trials of this process

Status = Mapping[str, Any]  # of a job: phase, done, of, unit, loss, images_per_s, data_wait_share, left_s


def duration(seconds: float) -> str:
    """For example "4.2s", "3m05s", "2h07m" or "3d04h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{min(seconds, 59.9):.1f}s"
    minutes, hours = whole // 60, whole // 3600
    if hours < 1:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def about(seconds: float) -> str:
    """An estimate, for example "about 4s" or "about 3m05s"."""
    return f"about {round(seconds)}s" if round(seconds) < 60 else f"about {duration(seconds)}"


def describe(status: Status) -> str:
    """One job in one line, without its name; what is not known is left out."""
    parts = [str(status["phase"])] if "phase" in status else []
    if status.get("of"):
        unit = f" {status['unit']}" if "unit" in status else ""
        parts.append(f"{status['done']}/{status['of']}{unit}")
    if "loss" in status:
        parts.append(f"loss {status['loss']:.3f}")
    if status.get("images_per_s"):
        parts.append(f"{status['images_per_s']:.0f} img/s")
    if "data_wait_share" in status:
        parts.append(f"{status['data_wait_share']:.0%} waiting for data")
    if status.get("left_s") is not None and not is_done(status):
        parts.append(f"{about(status['left_s'])} left")
    return " ".join(parts)


def describe_jobs(jobs: Mapping[str, Status]) -> str:
    """All jobs that run in one line, and how many wait for workers."""
    parts = [f"{name}: {figures}" for name, status in jobs.items() if (figures := describe(status))]
    waiting = max((int(status.get("waiting", 0)) for status in jobs.values()), default=0)
    return " | ".join([*parts, *[f"{waiting} waiting"] * bool(waiting)])


def is_done(status: Status) -> bool:
    return bool(status.get("of")) and status.get("done") == status["of"]


def gist(jobs: Mapping[str, Status]) -> dict[str, tuple[Any, ...]]:
    """What a line must differ in from the one before to be worth printing: rates and times alone are not."""
    return {name: tuple(status.get(key) for key in ("phase", "done", "of")) for name, status in jobs.items()}


def stage_left(jobs: Mapping[str, Status]) -> float | None:
    """Seconds until all jobs of a stage are done, also those that wait for workers; None: not known of all."""
    known = [status for status in jobs.values() if status.get("left_s") is not None]
    if not known or len(known) < len(jobs):
        return None
    left: float = max(status["left_s"] for status in known)
    waiting = max(int(status.get("waiting", 0)) for status in known)
    if not waiting:
        return left
    under_way = [status for status in known if not is_done(status)]
    whole = [status["left_s"] * status["of"] / (status["of"] - status["done"]) for status in under_way]
    return left + math.ceil(waiting / len(jobs)) * max(whole) if whole else None


@dataclass
class Counter:
    """How many images, or other units, of some tasks are done: those of finished tasks, and what running ones report.

    Call it with the index of each task that has finished.
    """

    sizes: Sequence[int]  # of each task
    show: Callable[[Status], None]  # called with the status whenever it has changed
    unit: str = "images"
    clock: Callable[[], float] = time.monotonic
    _finished: int = 0
    _done: int = 0
    _began: float | None = None  # when the first batch began, as far as it is known
    _before: int = 0  # units done at that moment

    def __call__(self, index: int) -> None:
        self._finished += self.sizes[index]
        self._see(self._finished, None)

    def running(self, reports: Sequence[Status]) -> None:
        """Takes what running tasks report: `done` units, and the `seconds` since the task's first batch began."""
        some = [report for report in reports if report.get("done")]
        if some:
            done = self._finished + sum(int(report["done"]) for report in some)
            self._see(done, max(float(report.get("seconds", 0.0)) for report in some))

    def _see(self, done: int, seconds: float | None) -> None:
        now, total = self.clock(), sum(self.sizes)
        if self._began is None and seconds is not None:
            self._began = now - seconds
        elif self._began is None:  # a task has finished without a report: rates count from here on
            self._began, self._before = now, done
        done = min(total, max(self._done, done))  # a task that is tried again reports less than before
        if done == self._done:
            return
        self._done = done
        status: dict[str, Any] = {"done": done, "of": total, "unit": self.unit}
        elapsed, made = now - self._began, done - self._before
        if elapsed > 0 and made > 0:
            rate = {"images_per_s": made / elapsed} if self.unit == "images" else {}
            status |= rate | {"left_s": (total - done) * elapsed / made}
        self.show(status)


PRIOR = 0.1
START = "start"  # of the workers: a stage for itself here, and the first part of the stage that needs them first


@dataclass
class RunTime:
    """The time left for a whole run, from what its stages were expected to take and from what they do take.

    A stage may come several times, as embed does: its parts are expected in the order in which they come.
    """

    expected: Mapping[str, Sequence[float]] = field(default_factory=dict)  # seconds of each part, by stage
    stage: str = ""  # that runs now
    ended: dict[str, list[float]] = field(default_factory=dict)  # what the parts took that have ended
    starting: bool = False  # workers start
    _started_s: float = 0.0  # of the stage that runs now: until the workers were up

    def started(self, elapsed: float) -> None:
        """Workers are up, so long after the stage that runs now has begun."""
        if self.starting:
            self.starting, self._started_s = False, elapsed
            self.ended.setdefault(START, []).append(elapsed)

    def end(self, seconds: float) -> None:
        """The stage that ran has ended."""
        self.ended.setdefault(self.stage, []).append(seconds - self._started_s)
        self.stage, self.starting, self._started_s = "", False, 0.0

    def left_s(self, elapsed: float, stage_left: float | None) -> float | None:
        """Seconds; None where they are not known.

        Args:
            elapsed: since the stage that runs now has begun.
            stage_left: of that stage, as its jobs say; None: unknown.
        """
        if not self.expected:
            return None
        elapsed -= self._started_s
        to_come = {name: parts[len(self.ended.get(name, ())) :] for name, parts in self.expected.items()}
        now, *later = to_come.pop(START if self.starting else self.stage, ()) or (0.0,)
        factor = self._factor(now, None if stage_left is None else elapsed + stage_left)
        left = max(0.0, now * factor - elapsed) if stage_left is None else stage_left
        return left + factor * (sum(later) + sum(map(sum, to_come.values())))

    def _factor(self, expected_now: float, takes_now: float | None) -> float:
        """By how much stages take longer than expected: those that have ended, and the one that says how long.

        A short first stage tells little of a long run, so a share of it, PRIOR, counts as being as expected.
        """
        pairs = [
            (expected, took)
            for name, parts in self.expected.items()
            for expected, took in zip(parts, self.ended.get(name, ()), strict=False)
            if name != START
        ]
        if takes_now is not None:
            pairs.append((expected_now, takes_now))
        pairs = [(expected, took) for expected, took in pairs if expected > 0]
        if not pairs:
            return 1.0
        as_expected = PRIOR * sum(sum(parts) for name, parts in self.expected.items() if name != START)
        return (as_expected + sum(took for _, took in pairs)) / (as_expected + sum(expected for expected, _ in pairs))


def trial_lost(way: str, why: BaseException | str) -> None:
    """Notes that a faster way is not taken because its trial failed. A job that runs says so, with the reason."""
    text = why if isinstance(why, str) else f"{type(why).__name__}: {' '.join(str(why).split())}"
    if (line := f"{way} is not used: {text[:_REASON]}") not in _lost:
        _lost.append(line)


def lost_trials() -> list[str]:
    """A line for each way that this process does without since its trial failed, in the order in which it tried."""
    return list(_lost)
