from __future__ import annotations

import io
import json
import math
import os
import re
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from grappa_dist.config import Config
from grappa_dist.console import (
    LINE_S,
    Console,
    Ending,
    Events,
    LogFile,
    Terminated,
    format_bytes,
    format_number,
    one_line,
    pluralize,
    print_end,
    read_events,
)
from grappa_dist.output import choose_mode
from grappa_dist.storage import StorageError, open_to_append


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    events = Events(tmp_path / "deep" / "events.jsonl", job="k=4")
    events("step", step=1, loss=0.5)
    events("note", text="two\nlines, a naïve \u2028 one")
    first, second = read_events(tmp_path / "deep" / "events.jsonl")  # before the file is closed
    assert {**first, "t": 0} == {"t": 0, "job": "k=4", "name": "step", "step": 1, "loss": 0.5}
    assert second["text"] == "two\nlines, a naïve \u2028 one"
    assert first["t"] <= second["t"]
    events.close()


def test_no_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "events.jsonl")) == []


@pytest.mark.parametrize("cut", ['{"name": "b', '{"name": "b"}', "{", " "])
def test_a_last_line_that_a_crash_cut_short_is_left_out(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"name": "a"}\n' + cut)
    assert [event["name"] for event in read_events(path)] == ["a"]


def test_a_last_line_longer_than_what_is_read_at_a_time_is_cut_off_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"name": "a"}\n' + "x" * 200_000)
    Events(path).close()
    assert path.read_text() == '{"name": "a"}\n'


def test_events_are_bounded_and_all_but_progress_is_carried_over(tmp_path: Path) -> None:
    path, bound = tmp_path / "events.jsonl", 20_000
    events = Events(path, bound)
    for number in range(3000):
        events("progress", job="k=4", done=number, of=3000)
        if number % 100 == 0:
            events("stage_ends", stage=str(number))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * bound + 200
    events.close()
    found = list(read_events(path))
    assert [e["stage"] for e in found if e["name"] == "stage_ends"] == [str(n) for n in range(0, 3000, 100)]
    last = [e["done"] for e in found if e["name"] == "progress"]
    before = [e["done"] for e in read_events(tmp_path / "events.jsonl.old") if e["name"] == "progress"]
    assert [*before, *last] == list(range(before[0], 3000))
    assert {file.name for file in tmp_path.iterdir()} == {"events.jsonl", "events.jsonl.old"}


def test_events_that_are_no_progress_are_bounded_too_and_the_newest_are_kept(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl", 10_000)
    for number in range(1000):
        events("job_failed", attempt=number)
    events.close()
    kept = [event["attempt"] for event in read_events(tmp_path / "events.jsonl")]
    assert kept == list(range(kept[0], 1000))
    assert len(kept) > 50


def test_a_damaged_line_goes_when_events_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"name": "stage_ends"}\n\xff\x00{\n[]\n{"t": 1}\n')
    events = Events(path, 100)
    events("progress", done="x" * 100)
    events.close()
    assert path.read_bytes() == b'{"name": "stage_ends"}\n{"t": 1}\n'


@pytest.mark.parametrize("before", ["", '{"name": "a"}\n', '{"name": "a"}\n{"name": "b', "{"])
def test_a_restart_writes_on_without_running_into_a_cut_line(before: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(before)
    events = Events(path)
    events("c")
    events.close()
    assert [event["name"] for event in read_events(path)] == ["a"] * ('"a"' in before) + ["c"]


def test_the_begin_of_a_stage_and_its_time_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Events(tmp_path / "events.jsonl"))
    with console.stage("embed", "3 images"):
        console.jobs({"k=4": {"done": 1, "of": 2, "loss": 0.5}, "k=8": {}})
    names = [event["name"] for event in read_events(tmp_path / "events.jsonl")]
    assert (names[0], names[-1]) == ("stage_begins", "stage_ends")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "embed: 3 images" in printed.err
    assert "1/2 loss 0.500" in printed.err
    assert "k=8" not in printed.err


def test_a_console_without_events_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.stage("embed", "nothing"):
        console.jobs({})
    assert "embed: nothing" in capsys.readouterr().err


def test_the_console_logs_once_for_each_job_which_tracker_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    console = Console(clock=lambda: now[0])
    for done in (3, 4):
        now[0] += LINE_S
        status = {"done": done, "of": 9, "trackers_off": ["Mlflow"]}
        console.jobs({"k=4": status, "k=5": status, "k=6": {"done": 1, "of": 9}})
    printed = capsys.readouterr().err
    assert [printed.count(f"k={k}: Mlflow failed and is switched off") for k in (4, 5, 6)] == [1, 1, 0]
    assert "k=4: 4/9 | k=5: 4/9 | k=6: 1/9" in printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 GiB for an array with shape (4, 5)"),
        RuntimeError("k=64 failed 4 times, last with: DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("neighbours failed 4 times, last with: Task was killed due to the node running low on memory."),
    ],
)
def test_an_error_of_memory_names_settings_that_need_less(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert Ending().of(fail) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {str(error) or 'MemoryError'}; less memory is needed with fewer resources.workers")
    named = re.findall(r"\b([a-z]+)\.([a-z_]+)", line.partition("less memory")[2])
    assert named
    assert all(key in Config.model_fields[section].annotation.model_fields for section, key in named)  # type: ignore[union-attr]


def test_an_error_that_names_a_setting_already_gets_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(ValueError("out of memory; lower adapt.micro_batch")) == "out of memory; lower adapt.micro_batch"


def test_counts_have_the_plural_of_their_noun_and_thousands_separators() -> None:
    assert [pluralize(n, "image") for n in (0, 1, 2, 12_345)] == ["0 images", "1 image", "2 images", "12,345 images"]
    assert [pluralize(n, "query", "queries") for n in (1, 2_000)] == ["1 query", "2,000 queries"]


def test_damaged_lines_of_events_are_left_out(tmp_path: Path) -> None:
    (path := tmp_path / "events.jsonl").write_bytes(b'{"a": 1}\n' + bytes(9) + b'\n{"b": \xff}\n[]\n{"c": 3}\n{"d":')
    assert list(read_events(path)) == [{"a": 1}, {"c": 3}]


def test_a_note_of_a_job_is_logged_once_and_is_an_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Events(tmp_path / "events.jsonl"))
    console.jobs({"k=8": {"notes": ["a checkpoint is damaged"]}, "k=9": {}})
    console.jobs({"k=8": {"notes": ["a checkpoint is damaged"], "done": 3, "of": 4}})
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["k=8: a checkpoint is damaged", "k=8: 3/4"]
    events = [(e["name"], e.get("text")) for e in read_events(tmp_path / "events.jsonl")]
    assert events == [("note", "a checkpoint is damaged"), ("progress", None)]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr("grappa_dist.output._chosen", "auto")  # and back to it after the test
    return choose_mode


def test_a_line_is_printed_when_something_has_changed_and_not_more_often_than_that(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    now = [0.0]
    console = Console(Events(tmp_path / "events.jsonl"), clock=lambda: now[0])
    for second, done in enumerate([1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9]):
        now[0] = second
        console.jobs({"k=4": {"done": done, "of": 9, "images_per_s": second + 1.0}})
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert [line.split()[1] for line in lines] == ["1/9", "3/9", "4/9", "9/9"]
    progress = [e["done"] for e in read_events(tmp_path / "events.jsonl") if e["name"] == "progress"]
    assert progress == [1, 3, 3, 7, 9]  # by time alone


class Found:
    """What a run has come to."""

    def text(self) -> str:
        return "table"

    def figures(self) -> dict[str, str]:
        return {"report": "r.html"}


def test_with_quiet_warnings_and_damage_alone_are_printed_and_all_is_in_the_log(
    tmp_path: Path, mode: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    mode(quiet=True)
    console = Console(log_file=LogFile(tmp_path / "run.log"))
    with console.stage("embed", "3 images"):
        console.log("warning: a shard is old")
        console.log("embed: warning: a label is no label")
        console.log("damaged: labels; it is made anew")
        console.jobs({"k=4": {"done": 1, "of": 2, "trackers_off": ["Mlflow"], "notes": ["a checkpoint is damaged"]}})
    print_end(Found())
    console.close()
    printed = capsys.readouterr()
    assert [line.partition("] ")[2].split()[0] for line in printed.err.splitlines()] == [
        "warning:", "embed:", "damaged:", "k=4:", "k=4:"
    ]  # fmt: skip
    assert printed.out == "table\n"
    log = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    stamps = {line[:25] for line in log}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", stamp) for stamp in stamps)
    assert [line[26:].split(" in ")[0] for line in log if "k=4" not in line] == [
        "embed: 3 images", "warning: a shard is old", "embed: warning: a label is no label",
        "damaged: labels; it is made anew", "embed: done"
    ]  # fmt: skip
    assert any(line.endswith("k=4: 1/2") for line in log)


def test_json_is_one_object_a_line_with_the_events_of_the_file_and_what_is_logged(
    tmp_path: Path, mode: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    mode(json=True)
    console = Console(Events(tmp_path / "events.jsonl"))

    def work() -> None:
        with console.run(), console.stage("embed", "two\nlines"):
            console.jobs({"k=4": {"done": 1, "of": 2}})
            raise RuntimeError("no\nway")

    assert Ending().of(work) == 1
    print_end(Found())
    printed = capsys.readouterr()
    assert printed.err == "error: no way\n"
    found = [json.loads(line) for line in printed.out.splitlines()]
    written = list(read_events(tmp_path / "events.jsonl"))
    assert [(e["name"], e.get("stage")) for e in found if e["name"] not in ("log", "error", "result")] == [
        (e["name"], e.get("stage")) for e in written
    ]
    assert [e["name"] for e in written] == ["run_begins", "stage_begins", "progress", "stage_ends", "run_ends"]
    assert [e["text"] for e in found if e["name"] == "log"] == ["embed: two\\nlines"]
    assert found[-2:] == [
        {"t": found[-2]["t"], "name": "error", "text": "no way", "status": 1},
        {"t": found[-1]["t"], "name": "result", "text": "table", "report": "r.html"},
    ]
    with pytest.raises(ValueError, match="--quiet and --json: expected one of them"):
        mode(quiet=True, json=True)


def test_the_log_is_appended_to_bounded_and_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-1")
    path, bound = tmp_path / "run.log", 4000
    for start in range(4):
        console = Console(log_file=LogFile(path, bound))
        for number in range(40):
            console.log(f"start {start} line {number} https://u:p@host planted-secret-1 \x1b[2J")
        console.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    before = (tmp_path / "run.log.old").read_text(encoding="utf-8").splitlines()
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < bound + 200
    assert lines[-1].endswith("start 3 line 39 https://***@host *** \\x1b[2J")
    numbers = [int(line.split()[3]) * 40 + int(line.split()[5]) for line in (*before, *lines)]
    assert numbers == list(range(numbers[0], 160))  # none is lost between the two
    assert "planted" not in "".join(before + lines)


def test_how_a_run_ends_is_an_event_and_a_line_of_the_log(tmp_path: Path) -> None:
    def ends(error: BaseException | None) -> None:
        console = Console(Events(tmp_path / "events.jsonl"), LogFile(tmp_path / "run.log"))
        with console.run():
            if error:
                raise error

    for error in (None, ValueError("data.train: none"), Terminated(), KeyboardInterrupt()):
        with pytest.raises(type(error)) if error else nullcontext():
            ends(error)
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [e["name"] for e in events] == ["run_begins", "run_ends"] * 4
    assert {(e["pid"], e["host"]) for e in events[::2]} == {(os.getpid(), socket.gethostname())}
    assert [(e["how"], e.get("error")) for e in events[1::2]] == [
        ("done", None), ("failed", "data.train: none"), ("stopped", None), ("stopped", None)
    ]  # fmt: skip
    log = [line[26:] for line in (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()]
    assert log == ["done", "error: data.train: none", "stopped", "stopped"]


@pytest.mark.parametrize("stage", ["embed", "pseudo_label", "adapt", "fuse", "evaluate", "report"])
def test_an_error_of_memory_names_the_settings_of_the_stage_that_was_short(stage: str) -> None:
    with pytest.raises(MemoryError) as caught, Console().stage(stage, ""):
        raise MemoryError
    named = re.findall(r"\b([a-z]+)\.([a-z_]+)", one_line(caught.value).partition("values of ")[2])
    assert all(key in Config.model_fields[section].annotation.model_fields for section, key in named)  # type: ignore[union-attr]
    sections = {section for section, _ in named} - {"resources"}
    own = {"pseudo_label": {"clustering"}, "evaluate": {"embed", "evaluate"}}.get(stage, {stage})
    assert sections == ({"embed", "clustering", "adapt", "fuse"} if stage == "report" else own)


def test_an_error_of_a_worker_begins_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    of_ray = type("RayTaskError", (Exception,), {"__module__": "ray.exceptions"})
    for cause, text in ((of_ray("x"), "fuse: /data: Input/output error"), (None, "/data: Input/output error")):
        with pytest.raises(OSError) as caught, Console().stage("fuse", ""):
            raise OSError("/data: Input/output error") from cause
        assert one_line(caught.value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (110.0, 2, "110"),
        (1.25, 2, "1.2"),
        (0.0347, 2, "0.035"),
        (0.99996, 3, "1"),
        (12_345.6, 3, "12,300"),
        (1.2e7, 2, "12 million"),
        (5e13, 1, "50 trillion"),
        (999_999.0, 3, "1 million"),
        (3.21e-7, 2, "3.2 x 10^-7"),
        (4e16, 2, "4 x 10^16"),
        (-1500.0, 2, "-1,500"),
        (0.0, 3, "0"),
        (math.inf, 3, "inf"),
    ],
)
def test_figures_have_no_exponent_of_a_programming_language(value: float, digits: int, text: str) -> None:
    assert format_number(value, digits) == text


def test_bytes_change_their_unit_before_they_have_four_digits() -> None:
    assert [format_bytes(b) for b in (0, 1023, 1024, 1024**2 - 1, 1.5 * 2**30, 2**40)] == [
        *("0 B", "1023 B", "1 KiB", "1 MiB", "1.5 GiB", "1.0 TiB")
    ]


@pytest.mark.parametrize("name", ["events.jsonl", "run.log"])
def test_a_full_disk_is_an_error_that_names_the_file_and_closing_is_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path) -> io.BufferedWriter:
        if path.name == name:
            path.symlink_to("/dev/full")
        return open_to_append(path)

    monkeypatch.setattr("grappa_dist.console.open_to_append", opened)
    console = Console(Events(tmp_path / "events.jsonl"), LogFile(tmp_path / "run.log"))
    with pytest.raises(StorageError, match=rf"{tmp_path}/{name}: No space left on device, .* free some"), console.run():
        console.log("a line")
