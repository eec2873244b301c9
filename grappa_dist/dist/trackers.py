"""Where else the figures of a training go, if asked for: TensorBoard, Weights & Biases, MLflow. Imported on demand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_RUN_CHARACTERS = 64  # of the run directory's name; an id may have 128 together with the job's


class Tracker(Protocol):
    """Hears of a job's steps from rank 0; a resumed job says steps again that it had said before it was killed."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder of the job's own; steps that are said again replace those from before."""

    def __init__(self, folder: Path, job: str) -> None:
        self._folder = folder / "tensorboard" / job
        self._writer: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run named by the job, in the project named by the run directory; server and key are the environment's."""

    def __init__(self, folder: Path, job: str) -> None:
        import wandb

        name = f"{folder.resolve().name[-_RUN_CHARACTERS:]}-{job}".replace("/", "-").replace("=", "-").replace("+", "-")
        self._run = wandb.init(project=folder.resolve().name, name=job, id=name, resume="allow", dir=str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run named by the job, in the experiment named by the run directory; the server is that of the environment."""

    def __init__(self, folder: Path, job: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(folder.resolve().name)
        mlflow.start_run(run_name=job)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        allowed = {"".join(c if c.isalnum() or c in "_-./ " else "-" for c in k): v for k, v in figures.items()}
        self._mlflow.log_metrics(allowed, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_KINDS: Mapping[str, Callable[[Path, str], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError when a package that is asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"resources.trackers: {name} is not installed here; `pip install {name}`, or leave it out")


def trackers_of(names: Sequence[str], folder: Path, job: str) -> list[Tracker]:
    """What hears of a job's steps. Its name is used for a folder and an id, so it should be short and its own.

    Raises:
        ValueError: a package is not installed.
    """
    check_trackers(names)
    return [_KINDS[name](folder, job) for name in names]
