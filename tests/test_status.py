from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.cli.main import main
from grappa_dist.config import CONFIG_FILE
from grappa_dist.console import EVENTS_FILE, Console, Events, LogFile, Terminated
from grappa_dist.status import Reader, describe_status, follow, runs_in, status
from tests.stages.tiny import files_below


def write(root: Path, *events: dict[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with open(root / EVENTS_FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"t": time.time(), **event}) + "\n" for event in events)


def begins(host: str = "") -> dict[str, Any]:
    return {"name": "run_begins", "pid": 1, "host": host or socket.gethostname()}


STAGE = {"name": "stage_begins", "stage": "adapt"}


def progress(job: str, done: int, **figures: Any) -> dict[str, Any]:
    return {"name": "progress", "job": job, "done": done, "of": 90, "images_per_s": 211.0, "left_s": 20.0, **figures}


def test_a_run_that_goes_on_shows_its_stage_its_jobs_and_the_time_left(tmp_path: Path) -> None:
    root = tmp_path / "my run"
    with Store(root).lock():
        write(
            root, begins(), {"name": "stage_begins", "stage": "embed"},
            {"name": "stage_ends", "stage": "embed", "seconds": 61.2}, STAGE, progress("k=9", 90, left_s=0.0),
        )  # fmt: skip
        write(
            root, {"t": time.time() - 9, **progress("k=4", 1)}, progress("k=4", 25, stage_left_s=20.0, run_left_s=300.0)
        )
        found = status(root)
        before = files_below(root)
        text = describe_status(status(root))
        assert files_below(root) == before  # nothing is written
    assert (found.state, found.stage, found.ended_stages) == ("running", "adapt", {"embed": 61.2})
    assert found.process.startswith(f"process {os.getpid()} on {socket.gethostname()} since ")
    assert found.jobs["k=4"] == {"done": 25, "of": 90, "images_per_s": 211.0, "left_s": 20.0}
    assert found.left_s == pytest.approx(20, abs=10)
    assert found.run_left_s == pytest.approx(300, abs=10)
    assert found.next == (f"grappa-dist status --follow '{root}'",)
    assert f"running (process {os.getpid()} on" in text
    assert "k=4    25/90 211 img/s about 20s left" in text
    assert "ended  embed 1m01s" in text


def end(root: Path, error: BaseException | None) -> None:
    console = Console(Events(root / EVENTS_FILE), LogFile(root / "run.log"))
    with console.run(), console.stage("adapt", "one set"):
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (None, "done", "done, begun 20"),
        (Terminated(), "stopped", "stopped by a signal; its jobs were asked to save their state, begun 20"),
        (RuntimeError("k=8: no memory"), "failed", "failed, begun 20"),
    ],
)
def test_a_run_that_has_ended_says_how_and_what_to_do_next(
    error: BaseException | None, state: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) if error else nullcontext():
        end(tmp_path, error)
    (tmp_path / CONFIG_FILE).write_text("name: x\n", encoding="utf-8")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").touch()
    found = status(tmp_path)
    assert found.state == state
    assert found.error == ("k=8: no memory" if state == "failed" else "")
    goes_on = f"grappa-dist run --out {tmp_path}"
    assert found.next == ((str(tmp_path / "report" / "report.html"),) if state == "done" else (goes_on,))
    assert text in describe_status(found)
    assert f"log    {tmp_path / 'run.log'}" in describe_status(found)


def test_a_run_that_was_killed_is_dead_as_soon_as_nothing_holds_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from grappa_dist.artifacts import Store; "
        "from grappa_dist.console import *\n"
        "root = Path(sys.argv[1])\n"
        "with Store(root).lock():\n"
        "    console = Console(Events(root / EVENTS_FILE))\n"
        "    with console.run(), console.stage('adapt', ''):\n"
        "        print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "up\n"
        assert status(tmp_path).state == "running"
        with pytest.raises(ValueError, match=rf"another run is writing to .* \(process {process.pid} on .* since 20"):
            Store(tmp_path).lock().__enter__()
        process.kill()
    found = status(tmp_path)
    assert (found.state, found.stage) == ("died", "adapt")
    assert "dead: it ended without a word, and nothing holds its lock" in describe_status(found)
    assert "stage  adapt, which did not end" in describe_status(found)
    assert found.next == ("the command of this run once more: it goes on from what is finished",)


def test_a_run_on_another_machine_is_said_to_be_unclear_where_its_lock_is_not_seen(tmp_path: Path) -> None:
    write(tmp_path, begins("elsewhere"), STAGE)
    (tmp_path / ".lock").write_text("process 7 on elsewhere since 2026-11-30T00:00:00Z\n", encoding="utf-8")
    found = status(tmp_path)
    assert found.state == "unclear"
    assert "begun on another machine (process 7 on elsewhere since" in describe_status(found)
    assert found.next == ()


def test_a_run_that_never_began_and_one_from_before_there_were_begins(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / CONFIG_FILE).touch()
    assert status(tmp_path / "new").state == "not begun"
    write(tmp_path / "old", STAGE, {"name": "stage_ends", "stage": "adapt", "seconds": 1.0})
    assert status(tmp_path / "old").state == "died"


def test_the_last_error_is_that_of_the_latest_start(tmp_path: Path) -> None:
    write(tmp_path, begins(), STAGE, {"name": "job_failed", "job": "k=8", "attempt": 1, "reason": "killed"})
    assert status(tmp_path).error == "k=8: killed"
    assert "error  k=8: killed 0." in describe_status(status(tmp_path))
    write(tmp_path, begins(), {"name": "ended_early", "until": "embed"}, {"name": "run_ends", "how": "done"})
    assert status(tmp_path).error == ""
    assert "done up to embed" in describe_status(status(tmp_path))


def test_a_line_that_is_being_written_and_a_damaged_one_do_no_harm_and_a_file_begun_anew_is_read_anew(
    tmp_path: Path,
) -> None:
    write(tmp_path, begins(), STAGE)
    with open(tmp_path / EVENTS_FILE, "ab") as file:
        file.write(b'\xff{\n[]\n{"t": "x", "name": 3}\n{"name": "stage_en')
    reader = Reader(tmp_path)
    assert reader.look().stage == "adapt"
    with open(tmp_path / EVENTS_FILE, "ab") as file:
        file.write(b'ds", "stage": "adapt", "seconds": 2.0, "t": 5}\n')
    assert (reader.look().stage, reader.look().ended_stages) == ("", {"adapt": 2.0})
    (tmp_path / "new").write_text(json.dumps({**begins(), "t": 1.0}) + "\n", encoding="utf-8")
    os.replace(tmp_path / "new", tmp_path / EVENTS_FILE)
    assert (reader.look().ended_stages, reader.look().since) == ({}, 1.0)


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    with Store(tmp_path).lock():
        write(tmp_path, begins(), STAGE)
        looks = follow(tmp_path, pause_s=0.0)
        assert [next(looks)[0].state for _ in range(2)] == ["running", "running"]
    write(tmp_path, {"name": "run_ends", "how": "done"})
    assert [[each.state for each in look] for look in looks] == [["done"]]


def test_of_several_seeds_each_is_shown_until_none_goes_on(tmp_path: Path) -> None:
    for seed in (10, 2):
        write(tmp_path / f"seed-{seed}", begins(), {"name": "run_ends", "how": "done"})
    (tmp_path / "seed-x").mkdir()
    assert runs_in(tmp_path) == [tmp_path / "seed-2", tmp_path / "seed-10"]
    looks = follow(tmp_path, pause_s=0.0)
    assert [each.state for each in next(looks)] == ["done", "done"]
    with Store(tmp_path / "seed-11").lock():
        write(tmp_path / "seed-11", begins(), STAGE)
        assert [each.state for each in next(looks)] == ["done", "done", "running"]
    write(tmp_path / "seed-11", {"name": "run_ends", "how": "failed", "error": "x"})
    assert [[each.state for each in look] for look in looks] == [["done", "done", "failed"]] * 2


def test_a_look_at_the_lock_refuses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch()
    looking = open(tmp_path / ".lock", "rb")  # noqa: SIM115 - closed while a run begins
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("grappa_dist.files.time.sleep", lambda seconds: looking.close())
    with Store(tmp_path).lock():
        assert status(tmp_path).state == "running"
        assert "no stage has begun" in describe_status(status(tmp_path))


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "--follow"]])
def test_the_verb_prints_json_and_refuses_a_folder_that_is_no_run(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[[Path], int] = lambda root: main(["status", *arguments, str(root)])  # noqa: E731
    monkeypatch.setattr("grappa_dist.cli.main.guard_output", lambda: None)
    write(tmp_path / "run", begins(), STAGE, {"name": "run_ends", "how": "failed", "error": "a \x1b[2J name"})
    assert run(tmp_path / "run") == 0
    (line,) = capfd.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["state"], found["error"], found["stage"]) == ("failed", "a \x1b[2J name", "adapt")
    (tmp_path / "photos").mkdir()
    for name, there in (("photos", "it has no events.jsonl, no config.yaml"), ("nowhere", "there is none")):
        assert run(tmp_path / name) == 2
        message = f"error: {tmp_path / name}: expected a run directory, but {there}\n"
        assert capfd.readouterr().err == message
