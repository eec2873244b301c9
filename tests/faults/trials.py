"""One run directory with a fault in each of its stages, until it is finished: every fault is a trial."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.runs import last_step
from tests.faults.faults import FAULTS, Fault, Missed, Scene
from tests.faults.small_run import STAGES, Driver, SmallRun, Watch

STEPS = {"adapt": ("adaptors/k=4", 30), "fuse": ("fusion/neighbours", 12)}  # a job, and its number of steps
RAY_DIED = "has died; starting Ray again"  # of distributed/ray_cluster.py
LOOK_S = 0.02
NOTICED_S = 30.0  # the most that may pass until a lost process is noticed
STARTS_S = 45.0  # while Ray starts: it waits 30 s by itself for what has died
GONE_S = 20.0  # the most that processes may outlive their driver
MOST_S = 180.0  # until a run goes on or ends; it waits a minute for jobs to save their state
LASTS_S = 30.0  # of a fault that lasts until the program ends, where it does not
QUIET_S = 3.0  # no failure but progress for so long: the fault has no effect yet
STARTS = 4  # the most starts without a fault that a run may need to end


@dataclass
class Trial:
    """A fault, and what came of it."""

    fault: str
    stage: str  # that the run was in
    seed: str
    outcome: str = ""  # went on, ended (and the next start went on), missed, hung
    status: int | None = None  # of the program, where it ended
    said: str = ""  # its error
    noticed_s: float | None = None
    recovered_s: float | None = None  # from the fault, or from the next start, until work went on
    gone_s: float | None = None  # until no process of an ended program was left
    wrong: list[str] = field(default_factory=list)  # what contradicts docs/reliability.md


def plan_of(seed: int, names: Sequence[str]) -> list[tuple[str, Fault]]:
    """A fault for every stage."""
    plan = []
    for stage in STAGES:
        order = sorted(names)
        random.Random(f"{stage} {seed // len(order)}").shuffle(order)
        plan.append((stage, FAULTS[order[seed % len(order)]]))
    return plan


@dataclass
class _Injected:
    """The last fault of the program that runs now."""

    trial: Trial
    fault: Fault
    driver: Driver
    at: float


@dataclass
class Trials:
    """The trials of one run directory, one after another.

    Args:
        reference: the digest of every artefact of a run that nothing has happened to.
        prepared: storage, clock and server of a Scene, as far as the faults need them.
        begin_until: no trial begins after this time of the monotonic clock.
        stop_s: how long a process is stopped by the fault that says minutes.
        other_names: what the names of artefacts begin with that are named by where the images lie.
    """

    run: SmallRun
    seed: int
    reference: Mapping[str, str]
    prepared: Mapping[str, Any] = field(default_factory=dict)
    begin_until: float = float("inf")
    stop_s: float = 120.0
    other_names: str | None = None
    done: list[Trial] = field(default_factory=list)
    _driver: Driver | None = None
    _whole: bool = False  # whether the program has ended well, and all artefacts are there
    _deaths: int = 0  # of Ray, that the program running now has reported
    _died: list[float] = field(default_factory=list)  # when these were seen
    _compared: int = 0  # so many trials belong to runs that have ended well
    _last: _Injected | None = None
    _restarted: list[tuple[Trial, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(self.run)

    def all_of(self, plan: Sequence[tuple[str, Fault]]) -> list[Trial]:
        """The trials of a plan, after the run has ended well or in vain."""
        for number, (stage, fault) in enumerate(plan):
            if time.monotonic() > self.begin_until:
                break
            first = "embed" if stage == "start" else stage
            if self._driver is None and self.run.has_made(first, self.reference):
                self.run.rewind(first)  # it has been compared, and is made again
                self._whole = False
            trial = Trial(fault.name, stage, f"{self.seed}.{number}")
            self.done.append(trial)
            try:
                self._attempt(trial, stage, fault, random.Random(trial.seed))
            except Missed as why:
                trial.outcome, trial.said = "missed", str(why)
            if self._driver is not None and self._driver.process.poll() is not None:
                self._ended()
        self._finish()
        for trial, began in self._restarted:
            on = self._goes_on(began)
            trial.recovered_s = None if on is None else round(on - began, 1)
        return self.done

    def _start(self) -> Driver:
        driver, self._deaths = self.run.start(), 0
        self._driver = driver
        if self._last is not None and self._last.trial.outcome in ("ended", "hung"):
            self._restarted.append((self._last.trial, driver.began))
        return driver

    def _attempt(self, trial: Trial, stage: str, fault: Fault, draws: random.Random) -> None:
        driver = self._driver or self._start()
        scene = Scene(self.run, driver, draws, **self.prepared)
        self._await_point(driver, stage, draws)
        lasts = self._lasts(fault, draws)
        fault.inject(scene)
        self._last = _Injected(trial, fault, driver, time.monotonic())
        self.watch.look()
        trial.stage = self.watch.stage(driver.began)
        try:
            self._follow(self._last, scene, lasts)
        finally:
            fault.undo(scene)

    def _await_point(self, driver: Driver, stage: str, draws: random.Random) -> None:
        """Waits for a random moment of a stage: after one of its steps, or after a while."""
        self._until(driver, lambda: self._reached(stage, driver.began))
        if stage in STEPS and draws.random() < 0.5:
            job, steps = STEPS[stage]
            first = last_step(self.run.root, job) + 1
            step = draws.randrange(first, steps) if first < steps else steps - 1
            self._until(driver, lambda: last_step(self.run.root, job) >= step)
        else:
            end = time.monotonic() + draws.uniform(0, STAGES[stage])
            self._until(driver, lambda: time.monotonic() >= end)

    def _until(self, driver: Driver, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + MOST_S
        while not happened():
            if driver.process.poll() is not None:
                raise Missed("the run ended before")
            if time.monotonic() > end:
                raise Missed("the point was not reached")
            time.sleep(LOOK_S)
            self.watch.look()

    def _reached(self, stage: str, began: float) -> bool:
        """Whether work on a stage has begun, or on a later one where an earlier start has finished it."""
        if stage == "start" or (stage == "embed" and any(self.run.root.glob("features/backbone/*"))):
            return True
        return self.watch.furthest(began) >= list(STAGES).index(stage)

    def _lasts(self, fault: Fault, draws: random.Random) -> float:
        if "minutes" in fault.name:
            return self.stop_s
        return LASTS_S if fault.lasts_s is None else draws.uniform(*fault.lasts_s)

    def _follow(self, injected: _Injected, scene: Scene, lasts: float) -> None:
        """Waits until the program has ended or goes on."""
        trial, fault, at = injected.trial, injected.fault, injected.at
        before, undone = self.watch.written(), False
        while injected.driver.process.poll() is None:
            time.sleep(LOOK_S)
            now = time.monotonic() - at
            self.watch.look()
            failed = self._failed(at)
            if now >= lasts and not undone:
                fault.undo(scene)
                undone, before = True, self.watch.written()
            if now > lasts + MOST_S:
                trial.outcome = "hung"
                trial.wrong.append(f"neither ended nor went on within {MOST_S:g} s")
                self.run.end_all()
                injected.driver.process.wait(timeout=30)
            elif undone and 0 in fault.statuses and self._went_on(injected, failed, now - lasts, before):
                trial.outcome = "went on"
                return

    def _failed(self, at: float) -> float | None:
        """When the run first noticed that a job or its Ray had failed, after a fault at that moment."""
        if self._driver is not None and self._driver.output.count(RAY_DIED) > self._deaths:
            self._deaths += 1
            self._died.append(time.monotonic())
        seen = [at for at, _ in self.watch.since(at, "job_failed")] + [died for died in self._died if died >= at]
        return min(seen, default=None)

    def _went_on(self, injected: _Injected, failed: float | None, since_s: float, before: tuple[int, int]) -> bool:
        if failed is None:  # it has not harmed any job, at least not yet
            return not injected.fault.awaited and since_s > QUIET_S and self.watch.written() != before
        on = self._goes_on(failed)
        if on is None:
            return False
        trial, at = injected.trial, injected.at
        trial.noticed_s, trial.recovered_s = round(failed - at, 2), round(on - at, 1)
        return True

    def _goes_on(self, moment: float) -> float | None:
        """When, after that moment, the run first reported work that goes on."""
        names = ("job_begins", "progress", "stage_ends")
        return min((at for name in names for at, _ in self.watch.since(moment, name)), default=None)

    def _ended(self) -> None:
        """Takes note of how the program ended, and of what it left."""
        ended, driver, last = time.monotonic(), self._driver, self._last
        assert driver is not None
        self._driver, status = None, driver.process.wait()
        self.watch.look()
        if last is None:
            raise RuntimeError(f"the program ended with {status} before any fault:\n{driver.output}")
        trial = last.trial
        if last.driver is driver:
            self._judge(last, status, ended)
        elif status:
            trial.wrong.append(f"the next start ended with {status}: {driver.error()}")
        trial.gone_s = self._gone()
        if trial.gone_s is None:
            left = ", ".join(sorted(set(self.run.processes().values())))
            trial.wrong.append(f"processes left after {GONE_S:g} s: {left}"[:300])
            self.run.end_all()
        self._whole = status == 0
        wrong = self._differing(partly=not self._whole)
        if self._whole and (left := self.run.left()):
            wrong.append(f"left in the temporary directory: {', '.join(left)}")
        for one in self.done[self._compared :] if self._whole else [trial]:
            if one.outcome != "missed":
                one.wrong += wrong
        self._compared = len(self.done) if self._whole else self._compared

    def _judge(self, last: _Injected, status: int, ended: float) -> None:
        """Whether the program may end in this way by this fault."""
        trial, fault, driver = last.trial, last.fault, last.driver
        trial.status = status
        if trial.outcome == "hung":
            return
        trial.outcome = "ended" if status else "went on"
        if status and trial.noticed_s is None:
            trial.noticed_s = round((self._failed(last.at) or ended) - last.at, 2)
            most_s = STARTS_S if trial.stage == "start" else NOTICED_S
            if trial.noticed_s > most_s and fault.group == "kills":
                trial.wrong.append(f"noticed after {trial.noticed_s:g} s, more than {most_s:g}")
        if status not in {0, *fault.statuses}:
            trial.wrong.append(f"exit status {status}")
        if status > 0:
            trial.said = driver.error() or driver.said_last
            if status < 128 and not driver.error():
                trial.wrong.append("not one line that says why")
            if not re.search(fault.says, trial.said):
                trial.wrong.append(f"its line does not match {fault.says!r}")

    def _gone(self) -> float | None:
        """Seconds until no process of the run is left; None: some are for too long."""
        began = time.monotonic()
        while self.run.processes():
            if time.monotonic() - began > GONE_S:
                return None
            time.sleep(0.1)
        return round(time.monotonic() - began, 1)

    def _differing(self, *, partly: bool) -> list[str]:
        """Finished artefacts with other bytes than those of the undisturbed run; missing ones too, unless `partly`."""
        found = self.run.artefacts()
        names = [name for name, value in found.items() if self.reference.get(name) != value]
        names += [name for name in self.reference if name not in found and not partly]
        return [f"differs from an undisturbed run: {name}" for name in names if not self._has_another_name(name)]

    def _has_another_name(self, name: str) -> bool:
        return self.other_names is not None and name.startswith(self.other_names)

    def _finish(self) -> None:
        """Starts the program, where a fault has ended it, until it ends well."""
        for _ in range(STARTS):
            if self._whole:
                return
            driver = self._driver or self._start()
            try:
                driver.process.wait(timeout=4 * MOST_S)
            except subprocess.TimeoutExpired:
                self.run.end_all()
            self._ended()
        for trial in self.done[self._compared :] if not self._whole else ():
            trial.wrong.append(f"has not ended well after {STARTS} starts")
