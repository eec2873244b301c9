from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import checkpoints, figures, loop
from grappa_dist.training.checkpoints import CheckpointWriter
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, MOST_UNREAD, Figures, Pace, PendingFigures, Reading
from grappa_dist.training.loop import Reporting, Schedule, train
from tests.processes import run_ranks
from tests.stages.tiny import Killed, Watcher, steps_of
from tests.training.test_loop import Regression, optimizer_of, state_of

STEPS, PACE = 23, Pace(log_s=0.1)


class Clock:
    """One that shows a second more at each look; a rank's may be slower."""

    def __init__(self, rank: int) -> None:
        self.now, self._tick = 0.0, 0.01 if rank == 0 else 7.0

    def monotonic(self) -> float:
        self.now += self._tick
        return self.now


def pending_of(comm: Comm, pace: Pace) -> PendingFigures:
    return PendingFigures(Watcher().context(comm), pace)


def test_figures_of_several_steps_are_read_together_as_means_over_images() -> None:
    pending = pending_of(Comm(), DEFAULT_PACE)
    pending.add(4, {"loss": torch.tensor(6.0), "images": 3, "waited_s": 1.5})
    pending.add(5, {"images": 0, "accuracy": torch.tensor(2.0), "loss": math.nan})
    assert pending
    found = pending.read()
    assert found.steps[0] == (4, {"loss": 2.0, "waited_s": 0.5, "images": 3})
    assert math.isnan(found.steps[1][1].pop("loss"))
    assert found.steps[1] == (5, {"accuracy": 2.0, "images": 0})
    assert not pending
    assert (found.stop, found.save, found.written) == (False, False, True)


def test_on_a_cpu_every_step_is_due() -> None:
    pending = pending_of(Comm(), Pace(log_s=100.0))
    for step in range(5):
        pending.add(step, {"images": 1})
        assert pending.due
        pending.read()


def reads_of_a_rank(comm: Comm) -> list[tuple[list[int], Reading]]:
    """The steps of each read, by clocks that differ."""
    clock, found = Clock(comm.rank), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "waits", lambda device: True)
        patch.setattr(figures, "time", clock)
        pending = pending_of(comm, Pace(log_s=0.1, checkpoint_s=0.3))
        for step in range(60):
            pending.add(step, {"images": comm.rank + 1}, written=step > 30 or comm.rank == 0)
            if pending.due:
                reading = pending.read()
                found.append(([step for step, _ in reading.steps], replace(reading, steps=[])))
                if reading.save:
                    pending.saved()
    return found


def test_ranks_read_and_save_at_the_same_steps_by_the_clock_of_rank_0() -> None:
    first, second = run_ranks(reads_of_a_rank, 2)
    assert first == second
    assert [step for steps, _ in first for step in steps] == list(range(len([s for steps, _ in first for s in steps])))
    assert max(len(steps) for steps, _ in first) > 1
    assert any(reading.save for _, reading in first)
    assert not all(reading.save for _, reading in first)
    assert [reading.written for _, reading in first] == [steps[-1] > 30 for steps, _ in first]


def test_no_more_steps_than_are_remembered_wait_for_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "waits", lambda device: True)
    pending, longest = pending_of(Comm(), Pace(log_s=1e6)), 0
    for step in range(3 * MOST_UNREAD):
        pending.add(step, {"images": 1})
        if pending.due:
            longest = max(longest, len(pending.read().steps))
    assert longest == MOST_UNREAD


def test_the_pace_is_that_of_the_settings() -> None:
    assert Pace.of(Resources(gpu_log_s=2.0, checkpoint_s=None)) == Pace(2.0, None)


class Spoiled(Regression):
    """A loss that is no number from a step on, on the last rank."""

    def __init__(self, comm: Comm, at: int) -> None:
        super().__init__(comm)
        self._at = at

    def backward(self, engine: Engine, step: int) -> Figures:
        found = dict(super().backward(engine, step))
        return found | {"loss": torch.tensor(math.nan)} if step >= self._at and self._comm.rank else found


class Releasing(Regression):
    """Lets the writer of checkpoints go at a step."""

    def __init__(self, comm: Comm, at: int) -> None:
        super().__init__(comm)
        self._at, self.go = at, threading.Event()

    def backward(self, engine: Engine, step: int) -> Figures:
        if step == self._at:
            self.go.set()
        return super().backward(engine, step)


def slowly(comm: Comm, run: Callable[[Regression], bool]) -> list[int]:
    """The steps at which checkpoints begin that are written beside training, by rank 0 not before step 21 is done; the
    other rank has nothing to write."""
    begun, begin, write, objective = list[int](), CheckpointWriter.begin, checkpoints._write, Releasing(comm, 21)

    def noted(writer: CheckpointWriter, step: int, *state: Any) -> None:
        begun.append(step)
        begin(writer, step, *state)

    def slow(*args: Any) -> str:
        assert objective.go.wait(60)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CheckpointWriter", partial(CheckpointWriter, background=True))
        patch.setattr(CheckpointWriter, "begin", noted)
        patch.setattr(checkpoints, "_write", slow)
        run(objective)
    return begun


def trained_late(comm: Comm, folder: Path) -> dict[str, Any]:
    """Training whose figures are read every few steps, as on a GPU, in all the ways that it may end."""
    found: dict[str, Any] = {}

    def run(out: str, watcher: Watcher, objective: Regression, **reporting: Any) -> bool:
        optimizer = optimizer_of("adam", objective.module)
        schedule = Schedule(STEPS, 10, lambda step: 0.1 / (1 + step))
        context = watcher.context(comm)
        done = train(
            context,
            objective,
            optimizer,
            schedule,
            folder=folder / out,
            job=out,
            reporting=Reporting(**reporting),
            pace=PACE,
        )
        if comm.rank == 0:
            torch.save(state_of(objective.module, optimizer), folder / f"{out}.pt")
        return done

    run("at-once", Watcher(), Regression(comm))
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(comm.rank)
        patch.setattr(figures, "waits", lambda device: True)
        patch.setattr(figures, "time", clock)
        run("late", Watcher(), Regression(comm))
        with pytest.raises(Killed):
            run("killed", Watcher(kill_after=17), Regression(comm))
        run("killed", Watcher(), Regression(comm))
        stopped = Watcher(stop_after=3 if comm.rank else None)
        found["stopped"] = [run("stopped", stopped, Regression(comm)), run("stopped", Watcher(), Regression(comm))]
        found["begun"] = slowly(comm, lambda objective: run("slow-disk", Watcher(), objective))
        used = list[int]()
        with pytest.raises(ArithmeticError) as error:
            run("spoiled", Watcher(), Spoiled(comm, 13), suspects=lambda step: [f"image of step {step}"])
        found["error"] = str(error.value)
        with pytest.raises(ArithmeticError):
            run("used", Watcher(), Spoiled(comm, 13), uses_weights=lambda step: bool(used.append(step)) or step == 14)
        found["used"] = used[-1]
    return found


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("late")
    return folder, run_ranks(trained_late, 2, folder, timeout_s=300)


Late = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("way", ["late", "killed", "stopped", "slow-disk"])
def test_figures_that_are_read_late_change_no_bit_and_every_step_is_logged_once(late: Late, way: str) -> None:
    folder, found = late
    straight, other = (torch.load(folder / f"{name}.pt") for name in ("at-once", way))
    assert straight.keys() == other.keys()
    assert all(torch.equal(straight[key], other[key]) for key in straight)
    left_out = {"t", "images_per_s", "job"}
    steps = [
        [{key: value for key, value in step.items() if key not in left_out} for step in steps_of(folder / name)]
        for name in ("at-once", way)
    ]
    assert str(steps[0]) == str(steps[1])  # a NaN among them
    assert [rank["stopped"] for rank in found] == [[False, True]] * 2


def test_no_rank_waits_for_one_that_writes_slowly_and_all_begin_the_next_checkpoint_alike(late: Late) -> None:
    first, second = (rank["begun"] for rank in late[1])
    assert first == second
    assert first[0] == 10  # as scheduled
    assert 20 not in first  # scheduled too, but the one before was under way
    assert len(first) <= 2


def test_a_loss_that_is_not_finite_and_read_late_stops_all_ranks_before_anything_after_it_is_saved(late: Late) -> None:
    folder, found = late
    for rank in found:
        assert rank["error"] == (
            "spoiled: loss is nan at step 13; nothing of it was saved; images of that step: image of step 13"
        )
        assert rank["used"] == 14  # step 13 was read before step 14 began, which uses the weights
    saved = [path.name for path in (folder / "spoiled" / "checkpoints").iterdir()]
    assert saved == ["step-000000010"]
