"""The command: runs the checks that fit the budget, prints a row as each ends, writes all of them.

Checks run in a process of their own. An error of a GPU may spoil all that its process does afterwards, so after an
error, a crash or a check that does not end, the next check gets a new process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grappa_dist.gpu_check.checks import CHECKS, Check, Found, Machine, NotHere
from grappa_dist.gpu_check.report import FAILED, SKIPPED, WRONG, Report, Row, machine_facts, state_of
from grappa_dist.output import Parser

LEFT_OVER_S = 60.0  # a check is ended this much after four times its estimate, or after the budget
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit threads, and a GPU cannot be used in it
ALL_RIGHT, SOME_WRONG, SOME_SKIPPED = 0, 1, 3  # exit statuses; 2: a wrong call
DESCRIPTION = """\
Checks whether this machine computes what it should, and how fast. A row is printed as each check ends; all of them are
written to DIR as gpu_check.json and gpu_check.md. It takes one GPU, and needs neither Ray nor faiss."""
ENDING = """\
exit status: 0 all checks passed, 1 something is wrong or failed, 3 nothing is wrong but checks were skipped, 2 a wrong
call. docs/gpu.md says what each row means and which packages are needed."""


def parser() -> argparse.ArgumentParser:
    found = Parser(description=DESCRIPTION, epilog=ENDING)
    found.add_argument("--out", metavar="DIR", type=Path, help="the folder for the results")
    budget = "seconds; what would take longer than is left is skipped, and named; default: %(default)g"
    found.add_argument("--budget-s", metavar="S", type=float, default=420.0, help=budget)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to test the checks")
    found.add_argument("--only", metavar="NAME", nargs="+", default=[], help="these checks alone")
    found.add_argument("--list", action="store_true", help="list the checks, with about how long each takes")
    found.add_argument("--write-digests", action="store_true", help="write what a CPU gives for kmeans and knn")
    return found


def checked(asked: argparse.Namespace) -> list[Check]:
    """The checks that were asked for, in their order; a wrong call ends with status 2."""
    known = {check.name: check for check in CHECKS}
    unknown = [name for name in asked.only if name not in known]
    if unknown:
        parser().error(f"--only {unknown[0]}: there is no such check (--list shows them)")
    if asked.budget_s <= 0:
        parser().error(f"--budget-s {asked.budget_s:g}: must be above 0")
    if not (asked.list or asked.write_digests) and asked.out is None:
        parser().error("--out DIR is needed, for the results")
    return [check for check in CHECKS if not asked.only or check.name in asked.only]


def main(asked: argparse.Namespace) -> int:
    """Runs what was asked for; the exit status."""
    checks = checked(asked)
    if asked.list:
        width = max(len(check.name) for check in checks)
        print("\n".join(f"{check.name:<{width}}  {check.seconds:3.0f} s  {check.what}" for check in checks))
        return ALL_RIGHT
    if asked.write_digests:
        from grappa_dist.gpu_check.rows import write_digests

        write_digests(print)
        return ALL_RIGHT
    if asked.device == "cuda" and (why := _no_gpu()):
        parser().error(f"--device cuda: {why}; --device cpu tests the checks themselves on tiny sizes")
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        report = Report(asked.out, shlex.join(sys.argv), asked.budget_s)
        report.write()  # now rather than after the first check
    except OSError as error:
        parser().error(f"--out {asked.out}: {error.strerror or error}; expected a folder to write to")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        run_all(checks, report, asked.device, asked.budget_s)
    except KeyboardInterrupt:
        report.note("interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
        for check in checks[len(report.rows) :]:
            report.add(Row(check.name, SKIPPED, 0.0, Found("not reached")))
        report.write()
    print(report.ending(), flush=True)
    return status_of(report.rows)


def _end(*_: Any) -> None:
    raise KeyboardInterrupt


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU here"


def status_of(rows: Sequence[Row]) -> int:
    """The exit status for these rows."""
    states = {row.state for row in rows}
    if states & {WRONG, FAILED}:
        return SOME_WRONG
    return SOME_SKIPPED if SKIPPED in states else ALL_RIGHT


def run_all(checks: Sequence[Check], report: Report, device: str, budget_s: float) -> None:
    """Runs one check after the other; those that do not fit the rest of the budget are rows too."""
    began, limits = time.monotonic(), dict[str, float]()
    with Process(device, report.machine.update) as process:
        for check in checks:
            left_s = budget_s - (time.monotonic() - began)
            needed_s = check.seconds if device == "cuda" else 0.0
            if needed_s > left_s or left_s <= 0:
                reason = f"takes about {check.seconds:.0f} s, {max(left_s, 0):.0f} s of the budget are left"
                report.add(Row(check.name, SKIPPED, 0.0, Found(reason)))
                continue
            row = process.run(check, limits, most_s=min(4 * check.seconds, left_s) + LEFT_OVER_S)
            limits |= row.found.limits
            report.add(row)


@dataclass
class Process:
    """The process that checks run in, started when it is needed."""

    device: str
    on_facts: Callable[[dict[str, str]], None]  # about the machine, by a process that has just started
    _process: Any = None
    _pipe: Connection | None = field(default=None, repr=False)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, check: Check, limits: dict[str, float], most_s: float) -> Row:
        """The row of one check, which may fail, crash, or be ended after `most_s`."""
        began = time.monotonic()
        if self._process is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send((check, limits))
        try:
            state, found, spoiled = self._answer(check.name, began + most_s)
        except TimeoutError:
            state, found, spoiled = FAILED, Found(f"did not end within {most_s:.0f} s"), True
        except (EOFError, ConnectionError):
            self._process.join(5)
            state, found, spoiled = FAILED, Found(f"its process died ({_death(self._process.exitcode)})"), True
        if spoiled:
            self._end()
        return Row(check.name, state, time.monotonic() - began, found)

    def _answer(self, name: str, until: float) -> tuple[str, Found, bool]:
        assert self._pipe is not None
        while True:
            if not self._pipe.poll(max(0.0, until - time.monotonic())):
                raise TimeoutError
            kind, *rest = self._pipe.recv()
            if kind == "facts":
                self.on_facts(rest[0])
            elif kind == "log":
                print(f"  {name}: {rest[0]}", file=sys.stderr, flush=True)
            else:
                return kind, *rest

    def _start(self) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(theirs, self.device), daemon=False)
        self._process.start()
        theirs.close()  # so that its death shows as the end of the pipe

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()  # what it has found is here
            self._process.join()
            self._process = None


def _death(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"status {code}"


def serve(pipe: Connection, device: str) -> None:
    """The process of checks: answers each with (state, found, whether its GPU may be spoiled)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernel on a CPU; read when triton is imported
    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other take longer over tensors this small
    pipe.send(("facts", machine_facts(device)))
    while True:
        try:
            check, limits = pipe.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            machine = Machine(
                torch.device(device, 0) if device == "cuda" else torch.device(device),
                device == "cpu",
                Path(folder),
                limits,
            )
            answer = perform(check, replace(machine, log=lambda text: pipe.send(("log", text))))
        pipe.send(answer)


def perform(check: Check, machine: Machine) -> tuple[str, Found, bool]:
    """Runs a check here; its state, what it found, and whether what follows in this process may be spoiled."""
    from grappa_dist.distributed.worker import release_memory

    try:
        found = check.run(machine)
        return state_of(found), found, False
    except NotHere as reason:
        return SKIPPED, Found(str(reason)), False
    except Exception as error:  # whatever a check may raise is a row; the others go on
        return FAILED, Found(_reason(error)), machine.device.type == "cuda" and not isinstance(error, ValueError)
    finally:
        release_memory()


def _reason(error: Exception) -> str:
    """The error in one line, with the place in this package that it comes from."""
    text = " ".join(str(error).split())[:300]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "grappa_dist" in frame.filename]
    at = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{at}"
