from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.dist import trackers
from grappa_dist.dist.trackers import check_trackers, trackers_of

NAMES = ("tensorboard", "wandb", "mlflow")


class Recorder:
    """Stands for any of the packages: notes what is called on it, and gives itself back."""

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
    monkeypatch.setitem(sys.modules, "mlflow", found)  # type: ignore[arg-type]
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = found.SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return found


@pytest.mark.parametrize(
    ("name", "logged"), [("tensorboard", "add_scalar"), ("wandb", "log"), ("mlflow", "log_metrics")]
)
def test_each_tracker_hears_of_every_step_and_is_closed(
    recorder: Recorder, tmp_path: Path, name: str, logged: str
) -> None:
    (tracker,) = trackers_of([name], tmp_path / "mine", "k=4+k=5")
    tracker.log(7, {"loss k=4": 0.5})
    tracker.log(8, {"loss k=4": 0.25})
    tracker.close()
    found = recorder.named(logged)
    assert [kwargs.get("step", args[-1]) for args, kwargs in found] == [7, 8]
    assert "0.25" in str(found[1])
    assert recorder.calls[-1][0] in ("close", "finish", "end_run")


def test_a_resumed_job_replaces_what_it_says_again(recorder: Recorder, tmp_path: Path) -> None:
    (tracker,) = trackers_of(["tensorboard"], tmp_path, "k=4")
    tracker.log(5, {"loss": 1.0})
    (call,) = recorder.named("SummaryWriter")
    assert call == ((str(tmp_path / "tensorboard" / "k=4"),), {"purge_step": 5})


def test_an_id_keeps_to_the_characters_that_the_server_takes(recorder: Recorder, tmp_path: Path) -> None:
    trackers_of(["wandb"], tmp_path / ("long" * 50), "k=256+31-0123456789")
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
