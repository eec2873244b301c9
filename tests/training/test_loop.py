from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from grappa_dist.console import read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.checkpoints import load_checkpoint, save_checkpoint
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.loop import Reporting, Schedule, train
from grappa_dist.training.optim import Lars
from tests.processes import run_ranks
from tests.stages.tiny import Killed, Watcher, losses_of, steps_of

STEPS = 9
CHECKPOINT_STEPS = 2


class Part(nn.Module):
    """A matrix, a vector and a number that train, and weights that do not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=draws))
        self.vector = nn.Parameter(torch.randn(5, generator=draws))
        self.number = nn.Parameter(torch.randn(1, generator=draws))
        self.frozen = nn.Parameter(torch.randn(4, generator=draws), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T + self.vector) * self.number


class Regression:
    """Least squares on rows that are a function of the step."""

    def __init__(self, comm: Comm) -> None:
        self.module, self._comm, self.begun = Part(0), comm, list[int]()

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        draws = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 3, generator=draws), torch.randn(6, 5, generator=draws)
        own = slice(self._comm.rank, None, self._comm.size)
        loss = (engine.forward(x[own]) - y[own]).square().sum()
        engine.backward(loss * self._comm.size / 6)
        undefined = {"decay_to_gradient.0": math.nan}  # which stops nothing
        return {"images": len(x[own]), "loss": loss.item(), **undefined}


def optimizer_of(name: str, module: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.1, weight_decay=1e-3)
    return Lars(parameters, lr=0.1, weight_decay=1e-3)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every trained parameter and its optimizer state."""
    tensors = dict[str, Tensor]()
    for name, p in module.named_parameters():
        if p.requires_grad:
            known = {f"{name} {key}": value for key, value in optimizer.state[p].items()}
            tensors |= {name: p.detach().clone(), **{key: value.clone() for key, value in known.items()}}
    return tensors


@pytest.mark.parametrize("name", ["adam", "lars"])
def test_a_checkpoint_brings_parameters_and_optimizer_back_to_the_bit(tmp_path: Path, name: str) -> None:
    module = Part(0)
    optimizer = optimizer_of(name, module)

    def step(module: Part, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(module, optimizer)
    saved = state_of(module, optimizer)
    save_checkpoint(Watcher().context(Comm()), tmp_path, 3, module, optimizer.state)
    other = Part(1)
    frozen, restored = other.frozen.clone(), optimizer_of(name, other)
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, other, restored) == 3
    found = state_of(other, restored)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) and found[key].dtype == saved[key].dtype for key in saved)
    assert all(list(known) == sorted(known) for known in restored.state.values())  # alike on all ranks
    assert torch.equal(other.frozen, frozen)
    step(module, optimizer)
    step(other, restored)
    after = state_of(module, optimizer)
    assert all(torch.equal(tensor, after[key]) for key, tensor in state_of(other, restored).items())


class Recording:
    """A tracker that keeps the steps that it logs."""

    def __init__(self) -> None:
        self.steps = list[int]()

    def log(self, step: int, figures: Any) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


class Failing(Recording):
    """A tracker that cannot be closed, and fails to log from a step on."""

    def __init__(self, fails_from: int) -> None:
        super().__init__()
        self._fails_from = fails_from

    def log(self, step: int, figures: Any) -> None:
        super().log(step, figures)
        if step >= self._fails_from:
            raise TimeoutError("the server is away")

    def close(self) -> None:
        raise OSError("no server")


def train_with_trackers_that_fail(comm: Comm, folder: Path) -> dict[str, Any]:
    """How training went that has a good tracker between two bad ones, one of which fails only when it is closed."""
    closed, close, watcher = list[Engine](), Engine.close, Watcher()
    trackers = [Failing(1), Recording(), Failing(99)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda engine: (closed.append(engine), close(engine)))
        objective, schedule = Regression(comm), Schedule(4, 2, lambda step: 0.1)
        optimizer = optimizer_of("adam", objective.module)
        reporting = Reporting(trackers=lambda: trackers)
        done = train(
            watcher.context(comm), objective, optimizer, schedule, folder=folder, job="job", reporting=reporting
        )
    off = [status.get("trackers_off") for status in watcher.statuses]
    return {"done": done, "logged": [t.steps for t in trackers], "engines closed": len(closed), "off": off}


def test_a_tracker_that_fails_is_reported_once_and_switched_off_while_training_goes_on(tmp_path: Path) -> None:
    (found,) = run_ranks(train_with_trackers_that_fail, 1, tmp_path)
    assert found == {
        "done": True,
        "logged": [[0, 1], [0, 1, 2, 3, -1], [0, 1, 2, 3]],
        "engines closed": 1,
        "off": [None, ["Failing"], ["Failing"], ["Failing"]],
    }
    noted = [e for e in read_events(tmp_path / "metrics.jsonl") if e["name"] == "tracker_failed"]
    assert [e["reason"] for e in noted] == ["TimeoutError: the server is away", "OSError: no server"]
    assert {e["tracker"] for e in noted} == {"Failing"}
    assert len(steps_of(tmp_path)) == 4


def test_without_a_checkpoint_training_starts_at_step_zero(tmp_path: Path) -> None:
    module = Part(0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, module, optimizer_of("adam", module)) == 0
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_two_checkpoints_are_kept_and_a_half_written_one_is_no_checkpoint(tmp_path: Path) -> None:
    module = Part(0)
    optimizer = optimizer_of("adam", module)
    for step in (2, 9, 10, 100):
        save_checkpoint(Watcher().context(Comm()), tmp_path, step, module, optimizer.state)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000010", "step-000000100"]
    (tmp_path / "checkpoints" / ".step-000000200.partial").mkdir()
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, module, optimizer) == 100


def train_all_ways(comm: Comm, folder: Path) -> dict[str, Any]:
    """A straight run; one killed twice, with a log cut short; one asked to stop at its last step."""
    found: dict[str, Any] = {}

    def run(out: str, watcher: Watcher, name: str = "adam") -> tuple[bool, Regression]:
        objective = Regression(comm)
        optimizer = optimizer_of(name, objective.module)
        schedule = Schedule(STEPS, CHECKPOINT_STEPS, lambda step: 0.1 / (1 + step))
        done = train(watcher.context(comm), objective, optimizer, schedule, folder=folder / out, job=out)
        if comm.rank == 0:
            torch.save(state_of(objective.module, optimizer), folder / f"{out}.pt")
        return done, objective

    for name in ("adam", "lars"):
        out = f"{name}-{comm.size}"
        assert run(f"straight-{out}", Watcher(), name)[0]
        killed = f"killed-{out}"
        found[killed] = []
        for kill_after in (1, 6):
            with pytest.raises(Killed):
                run(killed, Watcher(kill_after=kill_after), name)
            found[killed].append(len(steps_of(folder / killed)))
        if comm.rank == 0:
            with open(folder / killed / "metrics.jsonl", "a") as log:
                log.write('{"t": 1, "name": "st')
        comm.barrier()
        done, objective = run(killed, Watcher(), name)
        found[f"begun {out}"] = (done, objective.begun)
    found["late"] = run(f"late-{comm.size}", Watcher(stop_after=STEPS - 1))[0]
    found["early"] = [run(f"early-{comm.size}", Watcher(stop_after=after))[0] for after in (3, None)]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("train")
    return folder, {size: run_ranks(train_all_ways, size, folder, timeout_s=400) for size in (1, 2)}


Trained = tuple[Path, dict[int, list[dict[str, Any]]]]
WORLDS = [(name, size) for name in ("adam", "lars") for size in (1, 2)]


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_the_log_of_a_job_killed_twice_has_every_step_once(trained: Trained, name: str, size: int) -> None:
    folder, found = trained
    out = f"{name}-{size}"
    assert found[size][0][f"killed-{out}"] == [1, 6]
    assert [event["step"] for event in steps_of(folder / f"killed-{out}")] == list(range(STEPS))
    assert losses_of(folder / f"killed-{out}") == losses_of(folder / f"straight-{out}")
    lines = (folder / f"killed-{out}" / "metrics.jsonl").read_text().splitlines()
    begins = [event["at_step"] for event in map(json.loads, lines) if event["name"] == "begins"]
    assert begins == [0, 4]  # what an attempt logged goes with its steps, so the first one left nothing


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_a_job_killed_twice_ends_with_the_same_bits(trained: Trained, name: str, size: int) -> None:
    folder, found = trained
    straight, killed = (torch.load(folder / f"{way}-{name}-{size}.pt") for way in ("straight", "killed"))
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[key], killed[key]) for key in straight)
    for rank in found[size]:
        assert rank[f"begun {name}-{size}"] == (True, [4])


@pytest.mark.parametrize("name", ["adam", "lars"])
def test_losses_agree_on_one_and_two_ranks(trained: Trained, name: str) -> None:
    folder, _ = trained
    alone, both = (torch.tensor(losses_of(folder / f"straight-{name}-{size}")) for size in (1, 2))
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


def test_a_stop_at_the_last_step_finishes_and_an_earlier_one_saves(trained: Trained) -> None:
    folder, found = trained
    for size in (1, 2):
        assert all(rank["late"] and rank["early"] == [False, True] for rank in found[size])
        straight, early = (torch.load(folder / f"{way}-{size}.pt") for way in ("straight-adam", "early"))
        assert all(torch.equal(straight[key], early[key]) for key in straight)


def test_a_checkpoint_holds_what_trains_and_nothing_frozen(trained: Trained) -> None:
    folder, _ = trained
    found = sorted((folder / "straight-adam-2" / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step-000000006", "step-000000008"]
    names = {key.split("|")[0] for path in found[-1].glob("*.safetensors") for key in load_file(path)}
    assert names == {"matrix", "vector", "number"}
