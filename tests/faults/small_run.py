"""A run of a few seconds that faults are injected into: its files, its processes, and what it has made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from grappa_dist.checksums import MANIFEST
from grappa_dist.console import METRICS_FILE
from grappa_dist.stages.pseudo_label import STATS_FILE
from tests.e2e.runs import ROOT
from tests.stages import tiny

MARK = "GRAPPA_FAULTS"  # in the environment of every process of a run: which one it belongs to
ROLES = {  # how a command line begins, after the folder of the program -> what the process is
    "full_pipeline.py": "driver",
    "gcs_server": "GCS",
    "raylet": "raylet",
    "agent.py": "dashboard agent",  # until it has given itself the next name
    "ray::DashboardAgent": "dashboard agent",
    "main.py": "runtime environment agent",
    "ray::RuntimeEnvAgent": "runtime environment agent",
    "ray::Worker": "worker",
}
STAGES = {  # where faults are injected, and the seconds within which they come
    "start": 7.0,
    "embed": 1.0,
    "pseudo_label": 0.5,
    "adapt": 2.0,
    "fuse": 2.5,
    "evaluate": 2.5,
    "report": 0.1,
}
MADE_IN = {  # patterns of what each stage makes; features of the frozen backbone are the first
    "embed": ("features",),
    "pseudo_label": ("labels", "partitions-*"),
    "adapt": ("adaptors", "packs"),
    "fuse": ("fusion",),
    "evaluate": ("features/[!b]*", "scores", "insight", "galleries*"),
    "report": ("models", "model", "reports", "report"),
}
STAGE_OF = {"partitions": "pseudo_label", "export": "report"}  # stages of the program in those above
TORCHS_CACHE = "torchinductor_"  # a folder for each user, which importing torch's compiler makes and keeps
WITH_TIMES = {METRICS_FILE, "report.html"}  # beside the same results, they hold when these were made
EFFORT = {"exact_share", "searched_share"}  # in statistics of a clustering: of the passes since it began or resumed


def write_data(folder: Path) -> None:
    """Forty drawn images to train on, one of them unreadable, and eighteen to test with."""
    tiny.write_shards(folder / "train")
    tiny.write_shards(folder / "test", (11, 7), bad=(), label=lambda row: f"c{row % 5}", seed=1)


def write_config(path: Path, data: str, **resources: Any) -> None:
    """Settings under which every stage takes a second or so, most of which its backbone sleeps."""
    config = tiny.config(
        [f"{data}/train/part-{number}/part{number}-000000.tar" for number in range(len(tiny.SIZES))],
        data={"test": [f"{data}/test/part-{number}/part{number}-000000.tar" for number in range(2)]},
        backbone={"name": "tests.faults.slow_vit:create"},
        embed={"batch_size": 2},
        adapt={"epochs": 10},
        fuse={"variants": ("average", "neighbours"), "epochs": 4},
        resources=resources,
    )
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))


def role_of(arguments: Sequence[str]) -> str:
    """What a process is, by its command line; of those that no fault is aimed at, the program."""
    names = [argument.rpartition("/")[2] for argument in arguments[:3]]
    program = next((name for name in names if name.endswith(".py") and names[0].startswith("python")), names[0])
    return next((role for begin, role in ROLES.items() if program.startswith(begin)), program)


def _listen() -> None:
    """Takes signals as a program in a terminal does, also where this one runs in the background or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Driver:
    """One start of the program."""

    process: subprocess.Popen[bytes]
    log: Path  # what it writes on stderr
    began: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def said_last(self) -> str:
        """The last line of its progress and errors."""
        return (self.output.splitlines() or [""])[-1]

    def error(self) -> str:
        """The one line that says why it ended, or "" if there is none or more than that."""
        lines = [line for line in self.output.splitlines() if line.startswith(("error: ", "Traceback"))]
        return lines[0] if len(lines) == 1 and lines[0].startswith("error: ") else ""


@dataclass
class SmallRun:
    """A run directory, and the processes that work on it."""

    folder: Path  # run/, tmp/ and logs are made below it
    config: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0

    def __post_init__(self) -> None:
        self.temporary.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        return self.folder / "run"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the run; its path is short, since sockets lie below it."""
        return self.folder / "tmp"

    def start(self) -> Driver:
        self.starts += 1
        log = self.folder / f"start-{self.starts}.log"
        variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            MARK: str(self.folder),
            **self.environment,
        }
        program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py")]
        command = [*program, "--config", str(self.config), "--out", str(self.root)]
        with open(log, "wb") as file, open(log.with_suffix(".out"), "wb") as results:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=results,
                stderr=file,
                env=variables,
                start_new_session=True,
                preexec_fn=_listen,
            )
        return Driver(process, log)

    def has_made(self, stage: str, artefacts: Collection[str]) -> bool:
        """Whether a stage is finished, so far as it makes any of these artefacts."""
        patterns = [end for pattern in MADE_IN[stage] for end in (pattern, f"{pattern}/*")]
        made = self.artefacts()
        return all(name in made for name in artefacts if any(fnmatch(name, pattern) for pattern in patterns))

    def rewind(self, stage: str) -> None:
        """Removes what a stage and those after it have made, so that the next start makes it again."""
        stages = list(MADE_IN)
        for pattern in (p for s in stages[stages.index(stage) :] for p in MADE_IN[s]):
            for path in self.root.glob(pattern):
                path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def processes(self) -> dict[int, str]:
        """Every living process of the run and what it is; of others, the command."""
        mark, found = f"{MARK}={self.folder}\0".encode(), dict[int, str]()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended
                if mark in environ.read_bytes() + b"\0":
                    line = (environ.parent / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if line[0]:  # a zombie has none
                        found[int(environ.parent.name)] = role_of(line)
        return found

    def pids(self, role: str) -> list[int]:
        return sorted(pid for pid, found in self.processes().items() if found == role)

    def end_all(self) -> None:
        """Kills what is left of the run."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)

    def left(self) -> list[str]:
        """What lies in the temporary directory."""
        return sorted(path.name for path in self.temporary.iterdir() if not path.name.startswith(TORCHS_CACHE))

    def artefacts(self) -> dict[str, str]:
        """A digest of every finished artefact, without the times that it holds."""
        manifests = self.root.glob(f"**/{MANIFEST}")  # links to folders are not followed
        folders = (path.parent for path in manifests if not path.parent.name.endswith(".partial"))
        return {str(folder.relative_to(self.root)): digest(folder) for folder in sorted(folders)}


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of all files, except for what holds times or the effort of a clustering."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\n".encode())
        if path.name == MANIFEST:
            manifest = json.loads(path.read_text())
            kept = {key: manifest[key] for key in ("kind", "fingerprint", "settings", "inputs")}
            whole.update(json.dumps([kept, sorted(manifest["files"])]).encode())
        elif path.name == STATS_FILE:
            statistics = json.loads(path.read_text())
            whole.update(
                json.dumps({key: statistics[key] for key in statistics.keys() - EFFORT}, sort_keys=True).encode()
            )
        elif path.name not in WITH_TIMES:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


@dataclass
class Watch:
    """What a run has reported and written so far, by this machine's clock: the run's may have been made to jump."""

    run: SmallRun
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # when each was seen
    _offset: int = 0

    def look(self) -> None:
        path = self.run.root / "events.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._offset)
            lines = file.read().rpartition(b"\n")[0]
        for line in lines.splitlines():
            self.events.append((time.monotonic(), self._named(json.loads(line))))
        self._offset += len(lines) + bool(lines)

    def _named(self, event: dict[str, Any]) -> dict[str, Any]:
        """The event with its stage of STAGES; jobs belong to the stage that has begun last."""
        stage = event.get("stage") or next((e["stage"] for _, e in reversed(self.events)), "start")
        if stage == "embed" and any(self.run.root.glob("features/k=*")):
            stage = "evaluate"
        return event | {"stage": STAGE_OF.get(stage, stage)}

    def since(self, moment: float, name: str) -> Iterator[tuple[float, dict[str, Any]]]:
        return ((at, event) for at, event in self.events if at >= moment and event["name"] == name)

    def stage(self, began: float) -> str:
        """The stage of STAGES that the program begun at that moment is in; "start" until its workers have begun."""
        events = [event for at, event in self.events if at >= began]
        begun = [e["stage"] for e in events if e["name"] in ("stage_begins", "stage_ends")]
        works = any(e["name"] in ("job_begins", "progress") for e in events)
        embeds = begun[-1:] == ["embed"] and any(self.run.root.glob("features/backbone/*"))
        return begun[-1] if begun and (works or embeds) else "start"

    def furthest(self, began: float) -> int:
        """The number, in STAGES, of the last stage that workers have begun to work on since that moment."""
        events = [event for at, event in self.events if at >= began]
        jobs = [e["stage"] for e in events if e["name"] == "job_begins"]
        later = [e["stage"] for e in events if e["name"] == "stage_begins" and e["stage"] in ("evaluate", "report")]
        return max((list(STAGES).index(stage) for stage in jobs + later), default=0)

    def written(self) -> tuple[int, int]:
        """Grows as the run makes progress: files, and bytes of logs."""
        files = [path for path in self.run.root.rglob("*") if path.is_file()]
        logs = [path for path in files if path.suffix == ".jsonl"]
        sizes = 0
        for path in logs:
            with suppress(OSError):
                sizes += path.stat().st_size
        return len(files), sizes
