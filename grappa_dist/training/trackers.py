"""Trackers for the figures of a job, if asked for: TensorBoard, Weights & Biases, MLflow. Imported on demand."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from grappa_dist.config import fingerprint

_RUN_CHARACTERS = 64  # of the run directory's name; an id may have 128 together with the job's
_MLFLOW_TAG = "grappa_job"


class Tracker(Protocol):
    """Logs a job's steps, on rank 0; a resumed job logs steps again that it had logged before it was killed.

    It opens at the first step that it logs, so that this call fails where a server does not answer.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TrackerGroup:
    """The trackers of a job. One that fails is reported once, with its error, and closed; training goes on."""

    def __init__(self, trackers: Sequence[Tracker], report: Callable[[str, str], None]) -> None:
        """`report` is called with the name and the error of a tracker that fails."""
        self._active, self._report = list(trackers), report
        self.failed: list[str] = []  # names of trackers

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker in list(self._active):
            try:
                tracker.log(step, figures)
            except Exception as error:  # whatever a package may raise: training does not need it
                self._active.remove(tracker)
                self.failed.append(type(tracker).__name__)
                self._report_failure(tracker, error)
                with suppress(Exception):  # one error is enough
                    tracker.close()

    def close(self) -> None:
        for tracker in self._active:
            try:
                tracker.close()
            except Exception as error:
                self._report_failure(tracker, error)

    def _report_failure(self, tracker: Tracker, error: Exception) -> None:
        self._report(type(tracker).__name__, f"{type(error).__name__}: {error}")


class TensorBoard:
    """Event files in a folder for each job; steps that are logged again replace the earlier ones."""

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
    """A run named by the job, in the project named by the run directory; the environment has server and key."""

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job
        self._run: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._run is None:
            import wandb

            project = self._folder.resolve().name
            name = f"{project[-_RUN_CHARACTERS:]}-{self._job}".replace("/", "-").replace("=", "-").replace("+", "-")
            self._run = wandb.init(project=project, name=self._job, id=name, resume="allow", dir=str(self._folder))
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Mlflow:
    """One run for each job, restarts included, in the experiment named by the run directory.

    The environment has the server. A restarted job finds its run by a tag, made of run directory and job. Unless the
    environment sets other limits, a server that does not answer holds a step up for half a minute, once.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder.resolve(), job
        self._client: Any = None
        self._run_id = ""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._client is None:
            self._open()
        from mlflow.entities import Metric

        allowed = {"".join(c if c.isalnum() or c in "_-./ " else "-" for c in k): v for k, v in figures.items()}
        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in allowed.items()])

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        import mlflow

        client, key = mlflow.MlflowClient(), fingerprint([str(self._folder), self._job])
        experiment = mlflow.set_experiment(self._folder.name).experiment_id
        found = client.search_runs([experiment], f"tags.{_MLFLOW_TAG} = '{key}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        run = found[0] if found else client.create_run(experiment, run_name=self._job, tags={_MLFLOW_TAG: key})
        self._client, self._run_id = client, run.info.run_id

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)


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
    """The trackers of a job. Its name is used for a folder and an id, so it should be short and unique.

    Raises:
        ValueError: a package is not installed.
    """
    check_trackers(names)
    return [_KINDS[name](folder, job) for name in names]
