"""What a run reports: events as JSON lines on disk, progress on the console, and its exit status.

A program that fails prints one line; the traceback goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa_dist.extras import MissingPackage, explained
from grappa_dist.output import printable, printable_line, unprinted, without_secrets
from grappa_dist.storage import described, open_to_append, open_to_read, tried_again

EVENTS_FILE = "events.jsonl"  # of a run, in its directory
METRICS_FILE = "metrics.jsonl"  # of a training job, in its folder
EVENTS_BYTES = 32 * 2**20  # of them, and as many of the part before
_TAIL_BYTES = 2**16
COUNTER_S = 2.0  # between two lines of a counter

FAILED, CONFIG_ERROR, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_MEMORY = re.compile(
    r"MemoryError|unable to allocate|can't allocate memory|out of memory|low on memory|bad_alloc", re.IGNORECASE
)
_SETTING = re.compile(r"\b(embed|clustering|adapt|fuse|evaluate|resources)\.[a-z]+_?[a-z]+")
_LESS_MEMORY = (
    "less memory is needed with fewer resources.workers on a node, and with smaller values of embed.batch_size "
    "(embed), clustering.num_labels (pseudo_label), adapt.micro_batch (adapt), fuse.micro_batch and fuse.projector"
)
STATUSES = (
    "Exit status: 0 done, 2 a setting or an input is wrong, 143 after SIGTERM or SIGHUP and 130 after Ctrl-C with "
    "state saved (or a line that says it is not; a second Ctrl-C stops at once, without), 1 anything else."
)


class Terminated(BaseException):
    """SIGTERM arrived.

    Args:
        waited_s: the time limit of jobs that had not all saved their state by then; None: all had.
    """

    def __init__(self, waited_s: float | None = None) -> None:
        super().__init__()
        self.waited_s = waited_s


class Interrupted(Terminated):
    """Ctrl-C was pressed.

    Args:
        at_once: whether it was pressed again, so that no job was waited for.
        waited_s: as in Terminated.
    """

    def __init__(self, *, at_once: bool, waited_s: float | None = None) -> None:
        super().__init__(waited_s)
        self.at_once = at_once


class Events:
    """Appends events to a JSONL file: {"t": unix seconds, "stage", "job", "name", ...figures}.

    Args:
        most_bytes: a larger file becomes `<name>.old`, in place of the one before, and a new one begins with all of its
            events that are not progress; None: it may grow.
    """

    def __init__(self, path: Path, most_bytes: int | None = None, **always: Any) -> None:
        tried_again(lambda: path.parent.mkdir(parents=True, exist_ok=True), path)
        tried_again(lambda: _drop_cut_line(path), path)
        self._path, self._most_bytes, self._always = path, most_bytes, always
        self._file = open_to_append(path)

    def __call__(self, name: str, **figures: Any) -> None:
        line = json.dumps({"t": round(time.time(), 3), **self._always, "name": name, **figures})
        self._file.write(f"{without_secrets(line)}\n".encode())
        self._file.flush()
        if self._most_bytes is not None and self._file.tell() > self._most_bytes:
            self._file.close()
            tried_again(lambda: _begin_anew(self._path, self._most_bytes or 0), self._path)
            self._file = open_to_append(self._path)

    def close(self) -> None:
        self._file.close()


def _begin_anew(path: Path, most_bytes: int) -> None:
    """Copies a file of events to `<name>.old`, then leaves in it what is not progress: half of its bound at most."""
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f"{path.name}.old")
    shutil.copyfile(path, fresh)
    os.replace(fresh, old)
    kept, size = deque[bytes](), 0
    with open(old, "rb") as lines:
        for line in lines:
            event = parse_event(line)
            if event is not None and event.get("name") != "progress":
                kept.append(line)
                size += len(line)
                while size > most_bytes // 2:
                    size -= len(kept.popleft())
    fresh.write_bytes(b"".join(kept))
    os.replace(fresh, path)


def _drop_cut_line(path: Path) -> None:
    """Removes a last line that a crash cut short: the next event would be appended to it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:  # from the end, a piece at a time: the log of a long job is long
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file; a last line cut short by a crash is left out, and lines that are damaged."""
    if not path.exists():
        return
    with open_to_read(path) as lines:
        for line in lines:
            event = parse_event(line)
            if event is not None:
                yield event


def parse_event(line: bytes) -> dict[str, Any] | None:
    """An event from its line; None if that is cut short or damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(line) if line.endswith(b"\n") else None
        return event if isinstance(event, dict) else None
    return None


class Console:
    """Progress on stderr; the table and the report's path go to stdout."""

    def __init__(self, events: Events | None = None) -> None:
        self._events = events
        self._began = time.monotonic()
        self._noted: set[tuple[str, str]] = set()  # (job, note) that has been logged
        self._off: set[tuple[str, str]] = set()  # (job, tracker) whose failure has been logged

    def log(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {printable_line(without_secrets(text))}", file=sys.stderr, flush=True)

    def event(self, name: str, **figures: Any) -> None:
        if self._events:
            self._events(name, **figures)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Logs the begin of a stage, and how long it took."""
        self.log(f"{name}: {what}")
        self.event("stage_begins", stage=name)
        began = time.monotonic()
        try:
            yield
            self.log(f"{name}: done in {duration(time.monotonic() - began)}")
        finally:  # an attempt that fails took its time too
            self.event("stage_ends", stage=name, seconds=round(time.monotonic() - began, 3))

    def jobs(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """One line with all running jobs side by side, each status an event too; notes and failed trackers are logged
        once."""
        for name, figures in status.items():
            for note in {(name, text) for text in figures.get("notes", ())} - self._noted:
                self._noted.add(note)
                self.log(f"{name}: {note[1]}")
                self.event("note", job=name, text=note[1])
        known = {
            name: figures for name, of in status.items() if (figures := {k: v for k, v in of.items() if k != "notes"})
        }
        for name, figures in known.items():
            self.event("progress", job=name, **figures)
            for off in {(name, tracker) for tracker in figures.get("trackers_off", ())} - self._off:
                self._off.add(off)
                self.log(f"{name}: {off[1]} failed and is switched off; its error is in the job's {METRICS_FILE}")
        if known:
            self.log(" | ".join(f"{name}: {_figures(figures)}" for name, figures in known.items()))

    def counter(self, job: str, parts: int, images: int) -> Callable[[int], None]:
        """A callback for the number of finished parts: logs it with the speed and the time left, not too often."""
        began = shown = time.monotonic()

        def done(count: int) -> None:
            nonlocal shown
            now = time.monotonic()
            left = (now - began) / count * (parts - count)
            status = {
                "done": count,
                "of": parts,
                "images_per_s": images * count / parts / max(now - began, 1e-9),
                "left_s": left,
            }
            if count == parts or now - shown > COUNTER_S:
                self.jobs({job: status})
                shown = now

        return done


def pluralize(count: int, one: str, many: str | None = None) -> str:
    """For example "1 rank", "2,000 ranks" or, with a plural that needs more than an s, "2 queries"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_bytes(num_bytes: float) -> str:
    """For example "512 B" or "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


def _figures(status: Mapping[str, Any]) -> str:
    parts = []
    if "phase" in status:
        parts.append(str(status["phase"]))
    if status.get("of"):
        parts.append(f"{status['done']}/{status['of']}")
    if "loss" in status:
        parts.append(f"loss {status['loss']:.3f}")
    if status.get("images_per_s"):
        parts.append(f"{status['images_per_s']:.0f} img/s")
    if "data_wait_share" in status:
        parts.append(f"{status['data_wait_share']:.0%} waiting for data")
    if status.get("left_s") is not None:
        parts.append(f"{duration(status['left_s'])} left")
    return " ".join(parts)


@dataclass
class Ending:
    """Turns what a program raises into its exit status."""

    log_dir: Path | None = None  # where tracebacks go to `errors.log`, once it is known and exists

    def of(self, work: Callable[[], object]) -> int:
        try:
            work()
        except ValueError as error:
            return self._failed(error, CONFIG_ERROR)
        except ImportError as error:
            known = explained(error)
            return self._failed(known, CONFIG_ERROR if isinstance(known, MissingPackage) else FAILED)
        except Exception as error:
            return self._failed(error, FAILED)
        except KeyboardInterrupt:
            return _ended("interrupted;", INTERRUPTED)
        except Interrupted as ended:
            return _ended("interrupted;" if ended.at_once else f"interrupted; {_saved(ended)},", INTERRUPTED)
        except Terminated as ended:
            return _ended(f"terminated; {_saved(ended)},", TERMINATED)
        if why := unprinted():
            print(f"warning: done, but standard output could not be written: {why}", file=sys.stderr)
        return 0

    def _failed(self, error: Exception, status: int) -> int:
        error, place = described(error), ""
        if self.log_dir is not None and self.log_dir.is_dir():
            log = self.log_dir / "errors.log"
            with contextlib.suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(without_secrets("".join(traceback.format_exception(error))))
                place = f" (traceback in {log})"
        print(f"error: {one_line(error)}{printable(place)}", file=sys.stderr)
        return status


def one_line(error: BaseException) -> str:
    """What an error says, for a terminal; its kind where it says nothing; settings where memory was short."""
    text = printable(without_secrets(" ".join(str(error).split()))) or type(error).__name__
    short = isinstance(error, MemoryError) or _MEMORY.search(text)
    return f"{text}; {_LESS_MEMORY}" if short and not _SETTING.search(text) else text


def _saved(ended: Terminated) -> str:
    if ended.waited_s is None:
        return "state is saved"
    return f"not all jobs had saved within {ended.waited_s:g} s"


def _ended(how: str, status: int) -> int:
    print(f"{how} run the same command again to go on", file=sys.stderr)
    return status
