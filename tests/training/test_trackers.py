from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.training import trackers
from grappa_dist.training.trackers import check_trackers, trackers_of

NAMES = ("tensorboard", "wandb", "mlflow")


class Recorder:
    """Stands for any of the packages: records the calls on it, and returns itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", found)  # type: ignore[arg-type]
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = found.SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return found


class Server:
    """Stands for the package mlflow and its server: runs by id, found by tags, with what was logged to them."""

    def __init__(self) -> None:
        self.runs: list[types.SimpleNamespace] = []

    def MlflowClient(self) -> Server:
        return self

    def set_experiment(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(experiment_id=f"id of {name}")

    def search_runs(self, experiments: list[str], wanted: str, max_results: int) -> list[types.SimpleNamespace]:
        key, value = wanted.removeprefix("tags.").split(" = ")
        of_all = [r for r in self.runs if r.experiment in experiments and r.tags.get(key) == value.strip("'")]
        return of_all[:max_results]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> types.SimpleNamespace:
        info = types.SimpleNamespace(run_id=str(len(self.runs)), run_name=run_name, status="RUNNING")
        self.runs.append(types.SimpleNamespace(info=info, experiment=experiment, tags=tags, logged=[]))
        return self.runs[-1]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[int(run_id)].info.status = status

    def log_batch(self, run_id: str, metrics: list[types.SimpleNamespace]) -> None:
        self.runs[int(run_id)].logged += [(m.key, m.value, m.step) for m in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found, entities = Server(), types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step)  # type: ignore[attr-defined]
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # what is set there is left as it is
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "mlflow", found)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return found


@pytest.mark.parametrize(("name", "logged"), [("tensorboard", "add_scalar"), ("wandb", "log")])
def test_a_tracker_logs_every_step_and_is_closed(recorder: Recorder, tmp_path: Path, name: str, logged: str) -> None:
    (tracker,) = trackers_of([name], tmp_path / "mine", "k=4+k=5")
    assert recorder.calls == []  # it opens when it first logs a step: a server that does not answer ends nothing
    tracker.log(7, {"loss k=4": 0.5})
    tracker.log(8, {"loss k=4": 0.25})
    tracker.close()
    found = recorder.named(logged)
    assert [kwargs.get("step", args[-1]) for args, kwargs in found] == [7, 8]
    assert "0.25" in str(found[1])
    assert recorder.calls[-1][0] in ("close", "finish")


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_without_a_step_has_nothing_to_close(
    recorder: Recorder, server: Server, tmp_path: Path, name: str
) -> None:
    trackers_of([name], tmp_path, "k=4")[0].close()
    assert recorder.calls == []
    assert server.runs == []


def test_a_restarted_job_goes_on_in_its_own_mlflow_run(server: Server, tmp_path: Path) -> None:
    def log(run: str, job: str, step: int) -> None:
        (tracker,) = trackers_of(["mlflow"], tmp_path / run, job)
        tracker.log(step, {"loss k=4": float(step)})
        assert [r.info.status for r in server.runs].count("RUNNING") == 1
        tracker.close()

    for run, job, step in [("mine", "k=4", 1), ("mine", "k=5", 1), ("mine", "k=4", 2), ("other/mine", "k=4", 9)]:
        log(run, job, step)
    assert [(r.info.run_name, r.info.status) for r in server.runs] == [(k, "FINISHED") for k in ("k=4", "k=5", "k=4")]
    assert {r.experiment for r in server.runs} == {"id of mine"}  # two directories of one name keep their runs apart
    assert [r.logged for r in server.runs] == [
        [("loss k-4", 1.0, 1), ("loss k-4", 2.0, 2)],
        [("loss k-4", 1.0, 1)],
        [("loss k-4", 9.0, 9)],
    ]


def test_tensorboard_reads_back_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value in ((range(4), 1.0), (range(2, 6), 2.0)):  # killed at 4, resumed from a checkpoint at 2
        (tracker,) = trackers_of(["tensorboard"], tmp_path, "k=4")
        for step in steps:
            tracker.log(step, {"loss": value + step, "lr": 0.5})
        tracker.close()
    read = EventAccumulator(str(tmp_path / "tensorboard" / "k=4"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "lr"]
    losses = {event.step: event.value for event in read.Scalars("loss")}
    assert losses == {0: 1.0, 1: 2.0, 2: 4.0, 3: 5.0, 4: 6.0, 5: 7.0}
    assert len(read.Scalars("loss")) == 6
    assert {event.value for event in read.Scalars("lr")} == {0.5}


def test_a_resumed_job_replaces_what_it_logs_again(recorder: Recorder, tmp_path: Path) -> None:
    (tracker,) = trackers_of(["tensorboard"], tmp_path, "k=4")
    tracker.log(5, {"loss": 1.0})
    (call,) = recorder.named("SummaryWriter")
    assert call == ((str(tmp_path / "tensorboard" / "k=4"),), {"purge_step": 5})


def test_an_id_keeps_to_the_characters_that_the_server_takes(recorder: Recorder, tmp_path: Path) -> None:
    trackers_of(["wandb"], tmp_path / ("long" * 50), "k=256+31-0123456789")[0].log(0, {})
    ((_, given),) = recorder.named("init")
    assert given["id"].endswith("long-k-256-31-0123456789")
    assert len(given["id"]) <= 128


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"^resources\.trackers: {name} is not installed here; `pip install {name}`"):
        check_trackers([name])


def test_without_trackers_nothing_is_imported_or_opened(tmp_path: Path) -> None:
    assert trackers_of((), tmp_path, "k=4") == []
    assert list(tmp_path.iterdir()) == []
