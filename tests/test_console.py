from __future__ import annotations

import re
from pathlib import Path

import pytest

from grappa_dist.config import Config
from grappa_dist.console import Console, Ending, Events, duration, one_line, pluralize, read_events


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (0.04, "0.0s"), (59.4, "59.4s"), (59.6, "1m00s"), (61, "1m01s"), (7200, "120m00s")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_console_logs_once_for_each_job_which_tracker_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for done in (3, 4):
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
