"""The processes of a command, looked at from outside while it runs: memory, CPU seconds and bytes written, by role."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIVER, RAYLET, GCS, WORKER, OTHER = "driver", "raylet", "GCS", "worker", "other"
LOOK_S = 1.0
STOPPED = 143  # exit status after SIGTERM with state saved
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_KIB = 1024


@dataclass(frozen=True)
class Look:
    """One process at one moment."""

    role: str
    own: int  # bytes resident that are of no file: the kernel may drop the pages of files
    shared: int  # bytes resident of shared memory: of the raylet, what the object store holds or has held
    cpu_s: float  # so far
    written: int  # bytes that went to a disk so far


@dataclass
class Use:
    """What a command, or a stage of it, took; `+` is of two attempts at the same."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    own: dict[str, int] = field(default_factory=dict)  # by role: the most that one process held
    shared: int = 0
    written: int = 0

    def __add__(self, other: Use) -> Use:
        own = {role: max(self.own.get(role, 0), other.own.get(role, 0)) for role in {*self.own, *other.own}}
        seconds, cpu_s = self.seconds + other.seconds, self.cpu_s + other.cpu_s
        return Use(seconds, cpu_s, own, max(self.shared, other.shared), self.written + other.written)

    @staticmethod
    def of(stored: Mapping[str, Any]) -> Use:
        return Use(**stored)


@dataclass(frozen=True)
class Watched:
    """A command that has ended."""

    status: int
    began: float  # unix time
    looks: list[tuple[float, dict[int, Look]]]  # unix time, and all its processes by id

    def use(self, windows: Iterable[tuple[float, float]] | None = None) -> Use:
        """What it took within these times; None: in all.

        What happens between two looks counts to the window that has their middle, and what a process does between the
        last look at it and its end is not seen.
        """
        spans = [(self.began, self.looks[-1][0])] if windows is None else list(windows)
        found = Use(sum(end - begin for begin, end in spans))
        before: Mapping[int, Look] = {}
        last = self.began
        for at, now in self.looks:
            if any(begin <= (last + at) / 2 < end for begin, end in spans):
                _add(found, before, now)
            before, last = {**before, **now}, at
        return found

    @property
    def roles(self) -> set[str]:
        """Of all processes that were seen."""
        return {look.role for _, looks in self.looks for look in looks.values()}


def _add(found: Use, before: Mapping[int, Look], now: Mapping[int, Look]) -> None:
    for pid, look in now.items():
        earlier = before.get(pid)
        found.own[look.role] = max(found.own.get(look.role, 0), look.own)
        found.shared = max(found.shared, look.shared if look.role == RAYLET else 0)
        found.cpu_s += look.cpu_s - (earlier.cpu_s if earlier else 0.0)
        found.written += look.written - (earlier.written if earlier else 0)


def watch(command: Sequence[str], output: Path, env: Mapping[str, str], stop_after_s: float | None = None) -> Watched:
    """Runs a command to its end and looks at it and at all processes below it.

    Args:
        output: a file that gets what it prints, after what is there.
        stop_after_s: after so long it is sent SIGTERM; None: it may take any time.
    """
    looks, began, stopped = list[tuple[float, dict[int, Look]]](), time.time(), False
    with open(output, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=dict(env))
    try:
        while process.poll() is None:
            looks.append((time.time(), _look(process.pid)))
            if stop_after_s is not None and not stopped and time.time() - began > stop_after_s:
                process.send_signal(signal.SIGTERM)
                stopped = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
    finally:
        if process.poll() is None:  # interrupted here: its state is saved
            process.send_signal(signal.SIGTERM)
            process.wait()
    return Watched(process.returncode, began, [*looks, (time.time(), {})])


def _look(pid: int) -> dict[int, Look]:
    children = defaultdict[int, list[int]](list)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, LookupError):
                children[int(_stat(int(entry))[1])].append(int(entry))
    found, left = dict[int, Look](), [pid]
    while left:
        one = left.pop()
        left += children.get(one, [])
        with suppress(OSError, LookupError, ValueError):  # it has just ended
            found[one] = _look_at(one, is_driver=one == pid)
    return found


def _look_at(pid: int, *, is_driver: bool) -> Look:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    fields = _stat(pid)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    own, shared = (int(status[name].split()[0]) * _KIB for name in ("RssAnon", "RssShmem"))
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
    return Look(DRIVER if is_driver else role_of(command), own, shared, cpu_s, int(io["write_bytes"]))


def _stat(pid: int) -> list[str]:
    """The fields of a process after its name, which may have spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def role_of(command: str) -> str:
    """What a process below the driver is, by its command line with NUL between arguments."""
    program = command.partition("\0")[0]
    if program.startswith("ray::"):
        return WORKER
    return {"raylet": RAYLET, "gcs_server": GCS}.get(os.path.basename(program), OTHER)
