from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.console import Interrupted, Terminated
from grappa_dist.distributed.runner import Signals
from grappa_dist.distributed.worker import RankContext

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from grappa_dist.config import Resources
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from grappa_dist.console import Ending
from tests.distributed.test_runner_signals import save_when_asked

where = Resources(workers=2, num_cpus=2, gpus_per_worker=0)
runner = Runner(Cluster(where, log=lambda text: print(text, file=sys.stderr, flush=True)), where)

def work():
    try:
        with runner.handle_signals():
            runner.run_jobs([Job("long", save_when_asked, (sys.argv[1], float(sys.argv[2])), 2)])
    finally:
        runner.cluster.close()

sys.exit(Ending().of(work))
"""
PATIENCE_S = 90.0


def save_when_asked(context: RankContext, job: tuple[str, float]) -> None:
    """Rank 0 notes that it has begun and, a while after it was asked to stop, what it has saved."""
    marker, takes_s = job
    Path(f"{marker}.rank-{context.comm.rank}").touch()
    while not context.stop_requested():
        time.sleep(0.02)
    time.sleep(takes_s)
    Path(f"{marker}.saved-{context.comm.rank}").touch()


def press(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a handler runs between two instructions of Python


def test_a_signal_that_is_not_polled_for_ends_the_run_at_once() -> None:
    signals, before = Signals(), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as ended, signals.handled():
        press()
    assert (ended.value.at_once, ended.value.waited_s) == (False, None)
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(Terminated) as terminated, Signals().handled():
        press(signal.SIGTERM)
    assert not isinstance(terminated.value, Interrupted)


def test_a_closed_terminal_is_like_sigterm() -> None:
    with pytest.raises(Terminated) as ended, Signals().handled():
        press(signal.SIGHUP)
    assert not isinstance(ended.value, Interrupted)
    polled = Signals(polled=True)
    with polled.handled():
        press(signal.SIGHUP)
        assert (polled.stop_requested(), polled.interrupted) == (True, False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_where_signals_are_polled_a_second_ctrl_c_waits_for_no_job() -> None:
    signals = Signals(polled=True)

    def watch() -> None:
        assert (signals.stop_requested(), signals.interrupted, signals.at_once) == (False, False, False)
        press(signal.SIGTERM)
        assert (signals.stop_requested(), signals.interrupted, signals.at_once) == (True, False, False)
        press()
        assert (signals.interrupted, signals.at_once) == (True, False)
        press()
        assert signals.at_once
        raise Terminated

    with pytest.raises(Interrupted) as ended, signals.handled():
        watch()
    assert ended.value.at_once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_program_in_the_background_or_under_nohup_still_ignores_what_it_did(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals().handled():
            press(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("again", [pytest.param(False, marks=pytest.mark.long), True])
def test_ctrl_c_in_a_terminal_lets_every_rank_save_and_a_second_one_ends_at_once(tmp_path: Path, again: bool) -> None:
    status, lines, saved = signalled(tmp_path, signal.SIGINT, again=again)
    assert status == 130
    first, last = lines
    assert first == "interrupted: saving; press Ctrl-C again to stop at once\n"
    state = "" if again else " state is saved,"
    assert last == f"interrupted;{state} run the same command again to go on\n"
    assert saved == (set() if again else {"job.saved-0", "job.saved-1"})


@pytest.mark.long
def test_a_closed_terminal_lets_every_rank_save(tmp_path: Path) -> None:
    status, lines, saved = signalled(tmp_path, signal.SIGHUP, again=False)
    assert (status, saved) == (143, {"job.saved-0", "job.saved-1"})
    assert lines == ["terminated; state is saved, run the same command again to go on\n"]


def signalled(tmp_path: Path, number: signal.Signals, *, again: bool) -> tuple[int, list[str], set[str]]:
    """The program's exit status, its lines and what its ranks have saved, after a signal while they work.

    As a terminal does it: the signal goes to every process of the group, Ray's and the workers' among them.
    """
    marker, takes_s = tmp_path / "job", 300.0 if again else 1.0
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    command: list[Any] = [sys.executable, "-c", PROGRAM, str(marker), str(takes_s)]
    program = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True)
    patience = threading.Timer(2 * PATIENCE_S, program.kill)  # its end is awaited by reading its output
    patience.start()
    try:
        end = time.monotonic() + PATIENCE_S
        while len(list(tmp_path.glob("job.rank-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(program.pid, number)
        assert program.stderr is not None
        lines = [program.stderr.readline()]
        if again:
            os.killpg(program.pid, number)
        lines += program.stderr.readlines()
        status = program.wait(timeout=PATIENCE_S)
    finally:
        patience.cancel()
        program.kill()
        program.wait()
    return status, lines, {path.name for path in tmp_path.glob("job.saved-*")}
