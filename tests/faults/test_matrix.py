"""A dozen faults in one run directory, and the parts of the matrix that has hundreds of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.clock import Clock
from tests.faults.faults import FAULTS
from tests.faults.injection import why_unavailable
from tests.faults.matrix import DOCUMENT, ON_STORE, available, plan_for, prepare, trials_of
from tests.faults.mounts import namespace
from tests.faults.small_run import STAGES, SmallRun, Watch, digest, role_of
from tests.faults.table import BEGIN, END, HEAD, table, written_into
from tests.faults.trials import plan_of

DOZEN = (  # in this order; the program is started again after each fault that ends it
    ("pseudo_label", "kill -9 of the worker of rank 0"),
    ("adapt", "kill -9 of the raylet"),
    ("adapt", "kill -9 of the other worker"),
    ("fuse", "SIGTERM"),
    ("fuse", "SIGSTOP of a worker, seconds"),
    ("evaluate", "kill -9 of the driver"),
    ("start", "0.2 % of reads, writes and fsyncs answer EIO"),
    ("adapt", "clock jumps a day ahead"),
    ("adapt", "run directory turns read-only"),
    ("fuse", "clock jumps a day back"),
    ("fuse", "disk full at the run directory, injected"),
    ("evaluate", "SIGHUP"),
)


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_a_run_with_a_dozen_faults_ends_with_the_bytes_of_one_without(tmp_path: Path) -> None:
    prepare(tmp_path)
    plan = [(stage, FAULTS[name]) for stage, name in DOZEN]
    trials = trials_of(24, plan, tmp_path, seconds=600, stop_s=5)
    for trial in trials:
        print(trial)
    late = "noticed after"  # on a machine that is busy
    wrong = [(trial.fault, what) for trial in trials for what in trial.wrong if not what.startswith(late)]
    assert wrong == []
    assert Counter(trial.outcome for trial in trials)["missed"] <= 2


def test_over_as_many_seeds_as_there_are_faults_each_fault_meets_each_stage() -> None:
    names = list(FAULTS)
    met = [(stage, fault.name) for seed in range(len(names)) for stage, fault in plan_of(seed, names)]
    assert Counter(met) == {(stage, name): 1 for stage in STAGES for name in names}
    assert plan_of(3, names) == plan_of(3, names)


def test_every_fault_that_can_be_injected_here_is_in_the_matrix() -> None:
    planned = {fault.name for seed in range(3 * len(FAULTS) * (ON_STORE + 1)) for _, fault in plan_for(seed)}
    assert planned == set(available())


def test_the_table_counts_trials_by_fault_and_stage_and_leaves_out_what_did_not_happen() -> None:
    trial = {"fault": "SIGTERM", "stage": "fuse", "outcome": "ended", "wrong": [], "noticed_s": 1.0, "recovered_s": 4.0}
    more = [
        {"noticed_s": 3.0, "recovered_s": None},
        {"outcome": "missed"},
        {"fault": "SIGINT", "outcome": "went on", "wrong": ["differs from an undisturbed run: labels/k=4-0"]},
    ]
    trials = [trial, *(trial | change for change in more)]
    assert table(trials).splitlines() == [
        *HEAD,
        "| SIGTERM | 2 | 0 | 2 | 0 | 2.0, 3.0 | 4.0, 4.0 |",
        "| SIGINT | 1 | 1 | 0 | 1 | 1.0, 1.0 | 4.0, 4.0 |",
        "| *any, in fuse* | 3 | 1 | 2 | 1 | 1.0, 3.0 | 4.0, 4.0 |",
        "| **all** | 3 | 1 | 2 | 1 | 1.0, 3.0 | 4.0, 4.0 |",
    ]
    once = written_into(f"before\n{BEGIN}old\n{END}after\n", trials, "Three trials.")
    assert once == f"before\n{BEGIN}Three trials.\n\n{table(trials)}\n{END}after\n"
    assert written_into(once, trials, "Three trials.") == once


def test_the_document_has_a_place_for_the_table() -> None:
    text = DOCUMENT.read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_digest_covers_every_byte_but_times(tmp_path: Path) -> None:
    manifest = {"kind": "a", "fingerprint": "b", "settings": {}, "inputs": {}, "files": {"x": 1}, "created": "now"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text("1\n")
    (tmp_path / "x").write_bytes(b"1")
    before = digest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"created": "later"}))
    (tmp_path / "metrics.jsonl").write_text("2\n")
    assert digest(tmp_path) == before
    (tmp_path / "x").write_bytes(b"2")
    assert digest(tmp_path) != before


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_clock_of_a_process_jumps_while_it_runs_and_its_waits_last_as_long(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    program = """
import ctypes, time
libc = ctypes.CDLL(None)
def wait(clock):  # on a condition, 0.1 s by that clock
    attributes, condition, mutex = (ctypes.create_string_buffer(size) for size in (64, 64, 64))
    libc.pthread_condattr_init(attributes)
    libc.pthread_condattr_setclock(attributes, clock)
    libc.pthread_cond_init(condition, attributes)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    end = time.clock_gettime_ns(clock) + 10**8
    libc.pthread_cond_timedwait(condition, mutex, (ctypes.c_int64 * 2)(*divmod(end, 10**9)))
def now():
    waits = [time.time()]
    for clock in (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC):
        began = time.monotonic()
        wait(clock)
        waits.append(time.monotonic() - began)
    print(*waits, flush=True)
now(); input(); now(); input(); now()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for offset_s in (0.0, 86_400.0, -86_400.0):
            said, *waited_s = map(float, process.stdout.readline().split())
            assert said == pytest.approx(time.time() + offset_s, abs=60)
            assert all(0.1 <= seconds < 30 for seconds in waited_s)
            clock.jump_to(86_400.0 if offset_s == 0 else -86_400.0)
            process.stdin.write("\n")
            process.stdin.flush() if offset_s >= 0 else None


@pytest.mark.skipif(namespace() is None, reason="no mount namespace can be made here")
def test_small_disks_fill_up_in_a_namespace_alone(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.faults.mounts import small_disks
disk = Path(sys.argv[1])
with small_disks([disk]):
    try:
        (disk / "x").write_bytes(bytes(2**27))
    except OSError as error:
        print(error.strerror)
"""
    command = [*(namespace() or ()), sys.executable, "-c", program, str(tmp_path / "disk")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.stderr) == ("No space left on device\n", "")
    assert list((tmp_path / "disk").iterdir()) == []
    alone = subprocess.run([sys.executable, *command[-3:]], capture_output=True, text=True, timeout=60, env=environment)
    assert "RuntimeError: disks are mounted in a namespace alone" in alone.stderr


def test_what_a_stage_has_made_is_made_again_with_all_that_follows(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, tmp_path / "unused.yaml")
    for name in ("features/backbone/a-0", "labels/k=4-0", "adaptors/k=4-0", "scores/average-0"):
        (run.root / name).mkdir(parents=True)
        manifest = {"kind": "", "fingerprint": "", "settings": {}, "inputs": {}, "files": {}}
        (run.root / name / "manifest.json").write_text(json.dumps(manifest))
    reference = run.artefacts()
    assert len(reference) == 4
    assert run.has_made("pseudo_label", reference)
    assert not run.has_made("adapt", [*reference, "adaptors/k=6-0"])
    run.rewind("adapt")
    assert list(run.artefacts()) == ["features/backbone/a-0", "labels/k=4-0"]


def test_a_program_is_at_its_start_until_workers_have_begun(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, tmp_path / "unused.yaml")
    run.root.mkdir()
    watch, seen = Watch(run), []
    events = [
        {"name": "stage_begins", "stage": "adapt"},
        {"name": "job_begins", "job": "k=4"},
        {"name": "stage_begins", "stage": "export"},
    ]
    for event in events:
        with open(run.root / "events.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")
        watch.look()
        seen.append(watch.stage(0))
    assert seen == ["start", "adapt", "report"]
    assert watch.stage(time.monotonic()) == "start"  # of a later start


@pytest.mark.parametrize(
    ("line", "role"),
    [
        (["/x/bin/python", "/x/launch/full_pipeline.py", "--out", "raylet"], "driver"),
        (["/x/raylet/raylet", "--agent=/x/dashboard/agent.py"], "raylet"),
        (["/x/gcs/gcs_server", "--log_dir=/x"], "GCS"),
        (["ray::Worker.run_rank"], "worker"),
        (["/x/bin/python", "-u", "/x/dashboard/agent.py", "--node-id=x"], "dashboard agent"),
        (["/x/bin/python", "-u", "/x/log_monitor.py"], "log_monitor.py"),
    ],
)
def test_processes_are_told_apart_by_their_command_lines(line: list[str], role: str) -> None:
    assert role_of(line) == role
