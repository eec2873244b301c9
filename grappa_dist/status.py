"""`status`: how far a run is, as its directory shows it, from another terminal or machine. Writes nothing."""

from __future__ import annotations

import json
import os
import shlex
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from grappa_dist.artifacts import LOCK
from grappa_dist.bucket import EVENT_PARTS, Bucket, bucket_of
from grappa_dist.config import CONFIG_FILE
from grappa_dist.console import EVENTS_FILE, LOG_FILE, parse_event
from grappa_dist.files import is_locked
from grappa_dist.lease import holder
from grappa_dist.progress import about, describe, duration

State = Literal["running", "done", "stopped", "failed", "died", "unclear", "not begun"]
FOLLOW_S = 2.0  # between two looks
_TOGETHER_S = 1.0  # between the statuses of jobs that are reported at once
_OF_ALL = ("t", "stage_left_s", "run_left_s")  # alike in the reports of all jobs
_LATEST = 256  # reports of progress that are kept


@dataclass(frozen=True)
class RunStatus:
    """Times are seconds since 1970, as in events.jsonl; None or "" is unknown, or there is none."""

    run: str
    state: State
    process: str = ""  # "process 12 on host since 2026-11-30T12:00:00Z", of the lock
    since: float | None = None  # the run began
    last_event: float | None = None
    stage: str = ""  # that runs, or in which it ended without an end
    stage_since: float | None = None
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # that run, as in events.jsonl
    left_s: float | None = None  # of the stage
    run_left_s: float | None = None
    ended_stages: Mapping[str, float] = field(default_factory=dict)  # seconds
    until: str = ""  # the stage that the run was to end after
    error: str = ""  # the last one
    error_since: float | None = None
    next: tuple[str, ...] = ()  # what may be typed, or looked at


@dataclass
class _Record:
    """What the events of the latest start of a run say, as far as they are read."""

    began: Mapping[str, Any] = field(default_factory=dict)  # the event run_begins
    last: float | None = None
    stage: str = ""
    stage_since: float | None = None
    ended_stages: dict[str, float] = field(default_factory=dict)
    until: str = ""
    how: str = ""  # it has ended
    error: str = ""
    error_since: float | None = None
    progress: deque[bytes] = field(default_factory=lambda: deque(maxlen=_LATEST))  # of the stage; most are never parsed

    def after(self, line: bytes) -> _Record:
        """This record with one more event, or a new one where a run begins."""
        if b'"name": "progress"' in line:
            self.progress.append(line)
            return self
        event = parse_event(line)
        if event is None:
            return self
        name, self.last = event.get("name"), _number(event.get("t"))
        if name == "run_begins":
            return _Record(began=event, last=self.last)
        if name == "stage_begins":
            self.stage, self.stage_since = str(event.get("stage")), self.last
            self.progress.clear()
        elif name == "stage_ends":
            self.ended_stages[self.stage] = self.ended_stages.get(self.stage, 0.0) + float(event.get("seconds", 0.0))
            self.stage, self.stage_since = "", None
            self.progress.clear()
        elif name == "ended_early":
            self.until = str(event.get("until"))
        elif name == "job_failed":
            self.error, self.error_since = f"{event.get('job')}: {event.get('reason')}", self.last
        elif name == "run_ends":
            self.how = str(event.get("how"))
            if "error" in event:
                self.error, self.error_since = str(event["error"]), self.last
        return self

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The jobs that were reported last, at once."""
        found = [event for line in self.progress if (event := parse_event(line)) is not None]
        latest = max((_number(event.get("t")) or 0.0 for event in found), default=0.0)
        jobs = {}
        for event in found:
            if (_number(event.get("t")) or 0.0) >= latest - _TOGETHER_S:
                jobs[str(event.get("job"))] = {key: value for key, value in event.items() if key not in ("name", "job")}
        return jobs


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


class Reader:
    """Looks at a run again and again, and reads what is new of its events alone."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            ValueError: the folder is no run directory.
        """
        self._root = self._events_in = root
        self._record, self._file, self._offset = _Record(), (0, 0), 0
        self._check()

    def _check(self) -> None:
        root = self._root
        if not _is_run(root):
            there = "it has no " + ", no ".join((EVENTS_FILE, CONFIG_FILE)) if root.is_dir() else "there is none"
            raise ValueError(f"{root}: expected a run directory, but {there}")

    def look(self) -> RunStatus:
        """How far it is now."""
        locked, process = self._lock()  # before the events: a run that ends meanwhile is done, and not dead
        self._read()
        return _status(self._root, self._record, locked=locked, process=process)

    def _lock(self) -> tuple[bool, str]:
        """Whether a process holds the lock, as far as it can be seen here, and what is written in it."""
        path = self._root / LOCK
        try:
            return is_locked(path), " ".join(path.read_text(encoding="utf-8", errors="replace").split())[:500]
        except OSError:  # there is none, or this file system has no locks
            return False, ""

    def _read(self) -> None:
        try:
            file = open(self._events_in / EVENTS_FILE, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        with file:
            about_it = os.fstat(file.fileno())
            if self._file != (about_it.st_dev, about_it.st_ino) or about_it.st_size < self._offset:
                self._record, self._offset = _Record(), 0  # begun anew
            self._file = (about_it.st_dev, about_it.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self._offset += len(line)
                self._record = self._record.after(line)


class _BucketReader(Reader):
    """The same of a run on an object store that has no driver on this machine: by its lease, and the parts of its
    events."""

    def __init__(self, root: Path, bucket: Bucket) -> None:
        self._bucket, self._parts = bucket, list[str]()
        self._own = tempfile.TemporaryDirectory(prefix="grappa-status-")
        super().__init__(root)
        self._events_in = Path(self._own.name)

    def _check(self) -> None:
        if not self._bucket.names():
            raise ValueError(f"{self._bucket.url}: expected a run, but nothing is there")

    def _lock(self) -> tuple[bool, str]:
        found = holder(self._bucket, write=False)
        return found is not None and found.holds, found.who if found is not None and found.holds else ""

    def _read(self) -> None:
        parts, path = sorted(self._bucket.names(EVENT_PARTS)), self._events_in / EVENTS_FILE
        if parts[: len(self._parts)] != self._parts:  # begun anew
            path.unlink(missing_ok=True)
            self._parts = []
        with open(path, "ab") as file:
            for part in parts[len(self._parts) :]:
                file.write(self._bucket.read(part) or b"")
        self._parts = parts
        super()._read()


def _reader(root: Path) -> Reader:
    bucket = bucket_of(root)
    with suppress(OSError):  # no driver has been here
        if is_locked(root / LOCK):
            return Reader(root)
    return Reader(root) if bucket is None else _BucketReader(root, bucket)


def status(root: Path) -> RunStatus:
    """How far a run is.

    Raises:
        ValueError: the folder is no run directory.
    """
    return _reader(root).look()


def runs_in(root: Path) -> list[Path]:
    """The folder itself or, where several seeds run in it, the run directory of each seed."""
    seeds = [path for path in root.glob("seed-*") if path.name[5:].isdecimal() and (path / EVENTS_FILE).exists()]
    return sorted(seeds, key=lambda path: int(path.name[5:])) if seeds and not _is_run(root) else [root]


def _is_run(root: Path) -> bool:
    return any((root / name).exists() for name in (LOCK, EVENTS_FILE, CONFIG_FILE))


def follow(root: Path, pause_s: float = FOLLOW_S) -> Iterator[list[RunStatus]]:
    """How far a run is, or that of each seed, again and again until none goes on.

    Raises:
        ValueError: the folder is no run directory.
    """
    readers, went_on = dict[Path, Reader](), True
    while True:
        runs = runs_in(root)
        readers = {run: readers.get(run) or _reader(run) for run in runs}
        found = [reader.look() for reader in readers.values()]
        yield found
        goes_on = any(each.state in ("running", "unclear") for each in found)
        if not goes_on and (len(runs) == 1 or not went_on):  # between two seeds there is a moment without a run
            return
        went_on = goes_on
        time.sleep(pause_s)


def _status(root: Path, record: _Record, *, locked: bool, process: str) -> RunStatus:
    jobs = record.jobs()
    last = max((time_ for time_ in (record.last, *(_number(j.get("t")) for j in jobs.values())) if time_), default=None)
    bucket = bucket_of(root)
    state = _state(record, locked=locked, is_seen=bucket is not None)
    ago = 0.0 if last is None else max(0.0, time.time() - last)
    runs = state in ("running", "unclear")

    def left(name: str) -> float | None:
        found = next((seconds for job in jobs.values() if (seconds := _number(job.get(name))) is not None), None)
        return max(0.0, found - ago) if runs and found is not None else None

    return RunStatus(
        run=str(root) if bucket is None else bucket.url,
        state=state,
        process=process,
        since=_number(record.began.get("t")),
        last_event=last,
        stage=record.stage,
        stage_since=record.stage_since,
        jobs={name: {key: job[key] for key in job if key not in _OF_ALL} for name, job in jobs.items()},
        left_s=left("stage_left_s"),
        run_left_s=left("run_left_s"),
        ended_stages=record.ended_stages,
        until=record.until,
        error=record.error,
        error_since=record.error_since,
        next=tuple(_next(root, state)),
    )


def _state(record: _Record, *, locked: bool, is_seen: bool) -> State:
    """The state; `is_seen`: whether a lock of another machine would be seen from here."""
    if locked:
        return "running"
    if record.how in ("done", "stopped", "failed"):
        return record.how  # type: ignore[return-value]
    if not record.began and record.last is None:
        return "not begun"
    here = is_seen or record.began.get("host") in (None, socket.gethostname())
    return "died" if here else "unclear"  # locks of another machine are not seen on every file system


def _next(root: Path, state: State) -> Iterator[str]:
    """What may be typed, or looked at."""
    report, embeddings, bucket = root / "report" / "report.html", root / "embeddings.json", bucket_of(root)
    if bucket is not None:
        done = [f"{bucket.url}/report/report.html", f"{bucket.url}/model"]
        on = {"running": [f"grappa-dist status --follow {bucket.url}"], "done": done}
        yield from on.get(state, [f"grappa-dist run --out {bucket.url}"])
    elif state == "running":
        yield f"grappa-dist status --follow {shlex.quote(str(root))}"
    elif state == "done" and (report.exists() or embeddings.exists()):
        yield from (str(path) for path in (report, root / "model", embeddings) if path.exists())
    elif state != "unclear" and (root / CONFIG_FILE).exists():
        yield f"grappa-dist run --out {shlex.quote(str(root))}"
    elif state != "unclear":
        yield "the command of this run once more: it goes on from what is finished"


def describe_status(found: RunStatus) -> str:
    """The same in some lines."""
    lines = [("run", found.run), ("state", _describe_state(found))]
    if found.stage and found.state in ("running", "unclear"):
        lines.append(("stage", _describe_stage(found)))
    elif found.stage:
        lines.append(("stage", f"{found.stage}, which did not end"))
    lines += [(name, describe(job)) for name, job in found.jobs.items() if found.state in ("running", "unclear")]
    if found.ended_stages:
        lines.append(("ended", ", ".join(f"{name} {duration(s)}" for name, s in found.ended_stages.items())))
    if found.error:
        lines.append(("error", f"{found.error}{_ago(found.error_since)}"))
    if (Path(found.run) / LOG_FILE).exists():
        lines.append(("log", str(Path(found.run) / LOG_FILE)))
    lines += [("next", line) for line in found.next]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _describe_state(found: RunStatus) -> str:
    last, by = _ago(found.last_event), f" ({found.process})" if found.process else ""
    begun = "" if found.since is None else f", begun {datetime.fromtimestamp(found.since).astimezone():%F %T%z}"
    if found.state == "running":
        return f"running{by}" + (f"; its last event{last}" if last else "; no stage has begun")
    ended = {
        "done": f"done up to {found.until}" if found.until else "done",
        "stopped": "stopped by a signal; its jobs were asked to save their state",
        "failed": "failed",
        "died": "dead: it ended without a word, and nothing holds its lock; what was saved is kept",
        "unclear": f"begun on another machine{by}, whose lock may not be seen from here, {socket.gethostname()}",
        "not begun": "no run has begun here",
    }[found.state]
    return f"{ended}{begun}" + (f"; its last event{last}" if last else "")


def _describe_stage(found: RunStatus) -> str:
    text = found.stage
    if found.stage_since is not None:
        text += f" for {duration(max(0.0, time.time() - found.stage_since))}"
    text += f", {about(found.left_s)} left" if found.left_s is not None else ""
    return text + (f"; run: {about(found.run_left_s)} left" if found.run_left_s is not None else "")


def _ago(moment: float | None) -> str:
    return "" if moment is None else f" {duration(max(0.0, time.time() - moment))} ago"


def status_json(found: RunStatus) -> str:
    """The same as one line of JSON, with the names of the fields of RunStatus."""
    return json.dumps(asdict(found))
