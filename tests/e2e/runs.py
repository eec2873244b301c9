"""Starts the real program on a small collection, looks at what it leaves on disk, and ends processes by pid."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grappa_dist.console import read_events

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.collection_kwargs={scale: 0.2}",
    "clustering.num_labels=[8, 24]",
    "adapt.epochs=10",
    "adapt.global_batch=32",
    "adapt.checkpoint_steps=20",
    "fuse.epochs=5",
    "fuse.global_batch=48",
    "fuse.micro_batch=32",
    "fuse.projector=[32, 32]",
    "fuse.checkpoint_steps=4",
    "fuse.variants=[average, neighbours]",
    "resources.num_cpus=2",
)
PATIENCE_S = 400.0
PLANTED = "planted-secret-"  # how the secrets in the environment of every run begin
SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN"),
    *("MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN", "DB_PASSWORD"),
)


def command(out: Path, *overrides: str) -> list[str]:
    demo = ROOT / "configs" / "demo.yaml"
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py")]
    return [*program, "--config", str(demo), "--out", str(out), *SMALL, *overrides]


def run(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The program, to its end."""
    return subprocess.run(
        command(out, *overrides), text=True, capture_output=True, timeout=PATIENCE_S, env=_environment()
    )


def run_with(change: str, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """As `run`, after an assignment to a name in a module, in the driver alone."""
    program, *arguments = command(out, *overrides)[1:]
    module = change.partition(" = ")[0].rpartition(".")[0]
    start = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    code = f"import runpy, sys, {module}; {change}; {start}"
    return subprocess.run(
        [sys.executable, "-c", code, program, *arguments],
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
        env=_environment(),
    )


@contextmanager
def running(out: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The program, while something happens to it."""
    process = subprocess.Popen(
        command(out, *overrides), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)
        if process.stdout:
            process.stdout.close()


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until something is seen; an early end of the program, or no patience left, is an error."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the program ended with {process.returncode} before it happened:\n{output}")
        if time.monotonic() > end:
            raise TimeoutError(f"not seen within {PATIENCE_S} s")
        time.sleep(0.05)


def metrics(out: Path, job: str) -> list[dict[str, object]]:
    """What a job has logged so far, finished or not; `job` is e.g. "adaptors/k=8"."""
    stage, name = job.split("/")
    found = sorted((out / stage).glob(f"{name}-*/metrics.jsonl"))
    return list(read_events(found[0])) if found else []


def last_step(out: Path, job: str) -> int:
    return max((int(str(e["step"])) for e in metrics(out, job) if e["name"] == "step"), default=-1)


def kill_rank_zero(out: Path, job: str) -> None:
    """SIGKILL for the worker process that runs rank 0 of a job."""
    begun = [e for e in metrics(out, job) if e["name"] == "begins"]
    os.kill(int(str(begun[-1]["pid"])), signal.SIGKILL)


def embeds_for_graph(out: Path, variant: str, epoch: int, rank: int) -> bool:
    """Whether a rank embeds its share for the k-NN graph of an epoch: the file is begun and its end is not recorded."""
    name = f"{variant}-*.partial/knn/epoch-{epoch}.partial/features-{rank}-of-*"
    found = {path.suffix for path in (out / "fusion").glob(name)}
    return ".npy" in found and ".json" not in found


def kill_rank_one(driver: subprocess.Popen[str], out: Path, job: str) -> None:
    """SIGKILL for the worker process that runs the other rank of a job on all of two workers."""
    begun = [e for e in metrics(out, job) if e["name"] == "begins"]
    workers = {pid for pid in _below(driver.pid) if _title(pid).startswith("ray::Worker")}
    (other,) = workers - {int(str(begun[-1]["pid"]))}
    os.kill(other, signal.SIGKILL)


def _below(pid: int) -> Iterator[int]:
    """All processes that a process has begun, and those that these have."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
        yield from more


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def without_training(finished: Path, out: Path) -> Path:
    """A copy that has features and labels, so that only what is under test runs again."""
    shutil.copytree(finished, out, symlinks=True)
    for stage in ("adaptors", "fusion", "models", "reports", "scores", "insight"):
        shutil.rmtree(out / stage, ignore_errors=True)  # one set has no fusion
    return out


def weights(out: Path) -> dict[str, str]:
    """sha256 of every trained file, by stage and job."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted([*out.glob("adaptors/*/*.safetensors"), *out.glob("fusion/*/*.safetensors")])
        if not path.parent.name.endswith(".partial")
    }


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, **{name: f"{PLANTED}{name}" for name in SECRETS}, "PYTHONPATH": str(ROOT)}
