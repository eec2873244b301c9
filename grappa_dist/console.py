"""What a run reports: events as JSON lines on disk, progress on the console, and its exit status.

A program that fails prints one line; the traceback goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grappa_dist.extras import MissingPackage, explained
from grappa_dist.output import is_live, mode, printable, printable_line, unprinted, without_secrets
from grappa_dist.progress import Counter, RunTime, Status, about, describe_jobs, duration, gist, is_done, stage_left
from grappa_dist.storage import described, open_to_append, open_to_read, tried_again

if TYPE_CHECKING:
    from grappa_dist.bars import Bars

EVENTS_FILE = "events.jsonl"  # of a run, in its directory
LOG_FILE = "run.log"  # what the console of a run has logged, beside it
METRICS_FILE = "metrics.jsonl"  # of a training job, in its folder
EVENTS_BYTES = 32 * 2**20  # of events, and of a log; as many of the part before
_TAIL_BYTES = 2**16
LINE_S = 5.0  # between two lines of progress
_IN_STAGE = "in stage "  # begins the note of an error that has the name of the stage
_WARNING = re.compile(r"(\w+: )?(warning|damaged)\b")

FAILED, CONFIG_ERROR, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_MEMORY = re.compile(
    r"MemoryError|unable to allocate|can't allocate memory|out of memory|low on memory|bad_alloc", re.IGNORECASE
)
_SETTING = re.compile(r"\b(embed|clustering|adapt|fuse|evaluate|resources)\.[a-z]+_?[a-z]+")
_FEWER_WORKERS = "less memory is needed with fewer resources.workers on a node, and with smaller values of"
_GPU = re.compile(r"\bCUDA\b|\bGPU")
_LESS_OF_GPU = "a GPU needs less memory with smaller values of"
_LESS_OF_GPU_IN_VERB = "a smaller --batch-size takes less memory of a GPU, and --device cpu none"
_LESS_MEMORY = {  # settings by the stage that was short
    "embed": "embed.batch_size and resources.decode_threads",
    "pseudo_label": "clustering.num_labels",
    "adapt": "adapt.micro_batch and adapt.sets_per_job",
    "fuse": "fuse.micro_batch and fuse.projector",
    "evaluate": "embed.batch_size and evaluate.view_queries",
}
_LESS_MEMORY_ANYWHERE = (
    "embed.batch_size (embed), clustering.num_labels (pseudo_label), adapt.micro_batch (adapt), fuse.micro_batch and "
    "fuse.projector"
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


class LogFile:
    """Lines that are appended to a file.

    Args:
        most_bytes: a larger file becomes `<name>.old`, in place of the one before; None: it may grow.
        keeps: whether a line is carried over into the new one, which has half of the bound for them.
    """

    def __init__(
        self, path: Path, most_bytes: int | None = None, keeps: Callable[[bytes], bool] = lambda line: False
    ) -> None:
        tried_again(lambda: path.parent.mkdir(parents=True, exist_ok=True), path)
        tried_again(lambda: _drop_cut_line(path), path)
        self._path, self._most_bytes, self._keeps = path, most_bytes, keeps
        self._file = open_to_append(path)

    def write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
        self._file.flush()
        if self._most_bytes is not None and self._file.tell() > self._most_bytes:
            self._file.close()
            tried_again(lambda: self._begin_anew(self._most_bytes or 0), self._path)
            self._file = open_to_append(self._path)

    def _begin_anew(self, most_bytes: int) -> None:
        """Copies the file to `<name>.old`, then leaves in it what it keeps: half of its bound at most."""
        path = self._path
        fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f"{path.name}.old")
        shutil.copyfile(path, fresh)
        os.replace(fresh, old)
        kept, size = deque[bytes](), 0
        with open(old, "rb") as lines:
            for line in filter(self._keeps, lines):
                kept.append(line)
                size += len(line)
                while size > most_bytes // 2:
                    size -= len(kept.popleft())
        fresh.write_bytes(b"".join(kept))
        os.replace(fresh, path)

    def close(self) -> None:
        self._file.close()


class Events:
    """Appends events to a JSONL file: {"t": unix seconds, "stage", "job", "name", ...figures}.

    Args:
        most_bytes: as for LogFile; all events that are not progress are carried over.
    """

    def __init__(self, path: Path, most_bytes: int | None = None, **always: Any) -> None:
        self._always = always
        self._file = LogFile(path, most_bytes, _is_no_progress)

    def __call__(self, name: str, **figures: Any) -> None:
        self._file.write(event_line(name, **self._always, **figures))

    def close(self) -> None:
        self._file.close()


def event_line(name: str, **figures: Any) -> str:
    """An event as a line of JSON, without secrets."""
    return without_secrets(json.dumps({"t": round(time.time(), 3), "name": name, **figures}))


def _is_no_progress(line: bytes) -> bool:
    event = parse_event(line)
    return event is not None and event.get("name") != "progress"


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
    """Progress on stderr; the table and the report's path go to stdout. `output.MODE` says what is shown, and how.

    Args:
        events: gets an event for everything that may be counted later.
        log_file: gets every line that is logged, whatever is shown, with date, time and UTC offset.
    """

    def __init__(
        self,
        events: Events | None = None,
        log_file: LogFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events, self._log_file, self._clock = events, log_file, clock
        self._began = self._stage_began = clock()
        self._run_time = RunTime()
        self._noted: set[tuple[str, str]] = set()  # (job, note) that has been logged
        self._off: set[tuple[str, str]] = set()  # (job, tracker) whose failure has been logged
        self._shown: dict[str, tuple[Any, ...]] = {}  # the gist of the last line of progress
        self._recorded: set[str] = set()  # the jobs of the last events of progress
        self._shown_at = self._event_at = -math.inf
        self._stage_left: float | None = None
        self.begun = set[str]()  # the stages that have begun
        self._bars: Bars | None = None
        if mode() == "auto" and is_live(sys.stderr):
            from grappa_dist.bars import Bars

            self._bars = Bars(sys.stderr, self._footer)

    def log(self, text: str, *, warning: bool | None = None) -> None:
        """Prints a line, and writes it into the log.

        Args:
            warning: whether it is shown with --quiet, too; None: if it says that it is a warning, or tells of damage.
        """
        text = printable_line(without_secrets(text))
        self._write(text)
        is_warning = bool(_WARNING.match(text)) if warning is None else warning
        if mode() == "json":
            print(event_line("log", text=text, warning=is_warning), flush=True)
        elif mode() == "auto" or is_warning:
            self._print(text)

    def _write(self, text: str) -> None:
        if self._log_file:
            self._log_file.write(f"{datetime.now().astimezone().isoformat(' ', 'seconds')} {text}")

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(self._clock() - self._began), 60)
        line = f"[{minutes:3d}:{seconds:02d}] {text}"
        if self._bars:
            self._bars.log(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def event(self, name: str, **figures: Any) -> None:
        if self._events:
            self._events(name, **figures)
        if mode() == "json":
            print(event_line(name, **figures), flush=True)

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run from its begin to its end, which are events with the process, and the error if one ends it."""
        self.event("run_begins", pid=os.getpid(), host=socket.gethostname())
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Terminated | KeyboardInterrupt)
            with contextlib.suppress(OSError):  # a full disk: the error that is raised says so
                self._end("stopped" if stopped else "failed", "" if stopped else one_line(error))
            raise
        else:
            self._end("done")
        finally:
            self.close()

    def _end(self, how: str, error: str = "") -> None:
        self._write(f"error: {error}" if error else how)
        self.event("run_ends", how=how, **({"error": error} if error else {}))

    def close(self) -> None:
        """Removes the bars, and closes the files."""
        if self._bars:
            self._bars.close()
        for file in (self._events, self._log_file):
            if file:
                with contextlib.suppress(OSError):  # a full disk has been an error when it was written to
                    file.close()

    def expect(self, seconds: Mapping[str, Sequence[float]]) -> None:
        """Takes how long the stages to come are expected to take, each part of them, for the time left of the run."""
        self._run_time = RunTime(seconds, self._run_time.stage)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Logs the begin of a stage, and how long it took; an error of it has a note with its name."""
        self.log(f"{name}: {what}")
        self.event("stage_begins", stage=name, what=what)
        began = self._stage_began = self._clock()
        self.begun.add(name)
        self._run_time.stage, self._stage_left = name, None
        self._show_bars({})
        try:
            yield
            self.log(f"{name}: done in {duration(self._clock() - began)}")
        except Exception as error:
            error.add_note(f"{_IN_STAGE}{name}")
            raise
        finally:  # an attempt that fails took its time too
            seconds = self._clock() - began
            self._show_bars(None)
            self._run_time.end(seconds)
            self.event("stage_ends", stage=name, seconds=round(seconds, 3))

    def jobs(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """Shows all running jobs side by side, each status an event too; notes and failed trackers are logged once.

        A line is printed when one of them has got on, LINE_S apart; at once when a job is done, and for other jobs.
        """
        for name, figures in status.items():
            for note in {(name, text) for text in figures.get("notes", ())} - self._noted:
                self._noted.add(note)
                self.log(f"{name}: {note[1]}", warning=True)
                self.event("note", job=name, text=note[1])
            for off in {(name, tracker) for tracker in figures.get("trackers_off", ())} - self._off:
                self._off.add(off)
                text = f"{name}: {off[1]} failed and is switched off; its error is in the job's {METRICS_FILE}"
                self.log(text, warning=True)
        known = {
            name: figures for name, of in status.items() if (figures := {k: v for k, v in of.items() if k != "notes"})
        }
        if known:
            self._run_time.started(self._clock() - self._stage_began)
            self._stage_left = stage_left({name: known.get(name, {}) for name in status})
            self._show(known)

    def _show(self, jobs: Mapping[str, Status]) -> None:
        self._show_bars(jobs)
        self._record(jobs)
        self._log_progress(jobs)

    def phase(self, what: str, text: str) -> None:
        """Shows how the start of workers comes along."""
        self._run_time.starting = True
        self._show({what: {"phase": text}})

    def _record(self, jobs: Mapping[str, Status]) -> None:
        now, known = self._clock(), jobs.keys() == self._recorded
        if known and now - self._event_at < LINE_S and not any(map(is_done, jobs.values())):
            return
        self._event_at, self._recorded = now, set(jobs)
        left = {"stage_left_s": self._stage_left, "run_left_s": self.run_left_s()}
        of_all = {name: round(seconds, 1) for name, seconds in left.items() if seconds is not None}
        for name, figures in jobs.items():
            self.event("progress", job=name, **figures, **of_all)

    def _log_progress(self, jobs: Mapping[str, Status]) -> None:
        now, new = self._clock(), gist(jobs)
        at_once = new.keys() != self._shown.keys() or any(map(is_done, jobs.values()))
        if new == self._shown or (now - self._shown_at < LINE_S and not at_once):
            return
        self._shown, self._shown_at = new, now
        line = describe_jobs(jobs)
        left = self.run_left_s()
        line += f" | run: {about(left)} left" if left is not None else ""
        self._write(printable_line(without_secrets(line)))
        if mode() == "auto" and not self._bars:
            self._print(line)

    def _show_bars(self, jobs: Mapping[str, Status] | None) -> None:
        """Shows these jobs on a terminal; None: nothing."""
        if self._bars and jobs is None:
            self._bars.close()
        elif self._bars and jobs is not None:
            self._bars.show(jobs)

    def run_left_s(self) -> float | None:
        """Seconds that the whole run will still take, about; None where they are not known."""
        return self._run_time.left_s(self._clock() - self._stage_began, self._stage_left)

    def _footer(self) -> str:
        """The stage that runs, for how long, and how long it and the run will take still."""
        parts = [f"{self._run_time.stage} {duration(self._clock() - self._stage_began)}"]
        parts += [f"{about(self._stage_left)} left"] if self._stage_left is not None else []
        left = self.run_left_s()
        return ", ".join(parts) + (f"; run {about(left)} left" if left is not None else "")

    def counter(self, job: str, sizes: Sequence[int], unit: str = "images") -> Counter:
        """Counts what is done of some tasks, and shows it; called with the index of each task that has finished.

        Args:
            sizes: images, or other units, of each task.
        """
        return Counter(sizes, lambda status: self.jobs({job: status}), unit, self._clock)


class Outcome(Protocol):
    """What a run has come to."""

    def text(self) -> str:
        """All that is printed at the end."""
        ...

    def figures(self) -> dict[str, Any]:
        """The same for programs."""
        ...


def print_end(found: Outcome | None, until: str | None = None) -> None:
    """Prints what a run has come to on standard output; with --json as an event with its figures, too.

    Args:
        until: the stage that it was to end after, where nothing is found.
    """
    text = f"done up to {until}; the same command without --until goes on" if found is None else found.text()
    if mode() == "json":
        print(event_line("result", text=text, **({"until": until} if found is None else found.figures())), flush=True)
    else:
        print(printable(text))


def pluralize(count: int, one: str, many: str | None = None) -> str:
    """For example "1 rank", "2,000 ranks" or, with a plural that needs more than an s, "2 queries"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_bytes(num_bytes: float) -> str:
    """For example "512 B", "1.5 GiB" or "20.0 TiB"."""
    for unit in ("B", "KiB", "MiB"):
        if round(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB" if num_bytes < 1023.95 else f"{num_bytes / 1024:.1f} TiB"


def format_number(value: float, digits: int = 3) -> str:
    """A figure of so many significant digits: "0.035", "1.24", "110", "12,300", "12 million", "3 x 10^-7"."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(float(value))
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -5 < exponent < 15:
        return f"{_plain(rounded / 10.0**exponent, digits)} x 10^{exponent}"
    for power, word in ((12, " trillion"), (9, " billion"), (6, " million")):
        if exponent >= power:
            return _plain(rounded / 10.0**power, digits) + word
    return _plain(rounded, digits)


def _plain(value: float, digits: int) -> str:
    """The number without an exponent, thousands apart, without zeros at its end."""
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


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
                file.write(time.strftime("%Y-%m-%d %H:%M:%S %z\n"))
                file.write(without_secrets("".join(traceback.format_exception(error))))
                place = f" (traceback in {log})"
        text = one_line(error)
        print(f"error: {text}{printable(place)}", file=sys.stderr)
        if mode() == "json":
            print(event_line("error", text=text, status=status), flush=True)
        return status


def one_line(error: BaseException) -> str:
    """What an error says, for a terminal; its kind where it says nothing; settings where memory was short.

    An error of a worker begins with the stage that it was raised in.
    """
    text = printable(without_secrets(" ".join(str(error).split()))) or type(error).__name__
    chain = [error, *filter(None, [error.__cause__, getattr(error.__cause__, "__cause__", None)])]
    notes = [note for one in chain for note in getattr(one, "__notes__", ())]
    stage = next((note.removeprefix(_IN_STAGE) for note in notes if note.startswith(_IN_STAGE)), "")
    of_worker = any(type(one).__module__.partition(".")[0] == "ray" for one in chain)
    short = isinstance(error, MemoryError) or _MEMORY.search(text)
    if short and not _SETTING.search(text):
        text += f"; {_less_memory(stage, on_gpu=_GPU.search(text) is not None, of_worker=of_worker)}"
    return f"{stage}: {text}" if of_worker and stage and not text.startswith(stage) else text


def _less_memory(stage: str, *, on_gpu: bool, of_worker: bool) -> str:
    """What to change where memory was short; only the workers of a run and the verbs without one use a GPU."""
    settings = _LESS_MEMORY.get(stage, _LESS_MEMORY_ANYWHERE)
    if not on_gpu:
        return f"{_FEWER_WORKERS} {settings}"
    return (
        f"{_LESS_OF_GPU} {settings}, and none with resources.gpus_per_worker=0" if of_worker else _LESS_OF_GPU_IN_VERB
    )


def _saved(ended: Terminated) -> str:
    if ended.waited_s is None:
        return "state is saved"
    return f"not all jobs had saved within {ended.waited_s:g} s"


def _ended(how: str, status: int) -> int:
    print(f"{how} run the same command again to go on", file=sys.stderr)
    return status
