from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grappa_dist.config import Config
from grappa_dist.console import EVENTS_FILE, read_events
from grappa_dist.pipeline import run
from grappa_dist.report.facts import origin_facts
from grappa_dist.stages.run import CONFIG_FILE, Run, keeping_config, read_config, running
from tests.stages import tiny


def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"shards: nothing at .*photos; expected a folder of images"):
        run(tiny.config([str(tmp_path / "photos")]), tmp_path / "runs" / "deep" / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_what_a_run_runs_on_is_recorded_at_its_begin(tmp_path: Path) -> None:
    with running(tiny.config(["nowhere"]), tmp_path):
        pass
    with running(tiny.config(["nowhere"]), tmp_path):
        pass
    events = list(read_events(tmp_path / EVENTS_FILE))
    assert [event["name"] for event in events] == ["run_begins", "origin", "run_ends"] * 2
    assert events[1].keys() >= {"machine", "versions", "code", "command"}
    facts = origin_facts(events, events[-1]["t"])
    assert facts["code"].startswith("grappa-dist ")
    assert facts["run began"].endswith("the first of 2 starts")


def end_with(error: Exception, root: Path, begin: Callable[[Run], object] = lambda run: None) -> None:
    with running(tiny.config(["nowhere"]), root) as context:
        begin(context)
        raise error


def test_what_was_there_what_was_begun_and_what_is_no_mistake_of_the_input_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    wrong = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong"):
        end_with(wrong, tmp_path / "there")
    with pytest.raises(ValueError, match="wrong"):
        end_with(wrong, tmp_path / "begun", lambda run: run.console.event("stage_begins"))
    with pytest.raises(ValueError, match="wrong"):
        end_with(wrong, tmp_path / "made", lambda run: (run.store.root / "index").mkdir())
    with pytest.raises(RuntimeError, match="ours"):
        end_with(RuntimeError("ours"), tmp_path / "other")
    with pytest.raises(ValueError, match="wrong"):
        end_with(wrong, tmp_path / "gone" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "made", "other", "there"]


def test_no_run_makes_a_folder_that_is_called_as_a_home_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with running(tiny.config(["nowhere"]), Path("~/runs/x")) as context:
        assert context.store.root == tmp_path / "home" / "runs" / "x"
    assert list((tmp_path / "here").iterdir()) == []
    assert (tmp_path / "home" / "runs" / "x" / "events.jsonl").is_file()


def keep(settings: Config, root: Path, *, begin: str = "embed", error: Exception | None = None) -> None:
    with running(settings, root) as context, keeping_config(context):
        if begin:
            with context.console.stage(begin, "some"):
                pass
        if error is not None:
            raise error


def test_a_run_directory_holds_the_settings_of_its_latest_run_for_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a $HOME"
    settings = tiny.config(["photos", "s3://bucket/x"], backbone={"checkpoint": "dino.pt"})
    monkeypatch.chdir(tmp_path)
    keep(settings, root)
    monkeypatch.chdir("/")
    found = read_config(root, ["adapt.epochs=2"])
    assert found == read_config(root).model_copy(update={"adapt": found.adapt})
    assert (found.adapt.epochs, read_config(root).adapt.epochs) == (2, settings.adapt.epochs)
    assert found.data.train == (str(tmp_path / "photos"), "s3://bucket/x")
    assert (found.backbone.checkpoint, found.out) == (str(tmp_path / "dino.pt"), str(root))
    written = (root / CONFIG_FILE).stat().st_mtime_ns
    keep(read_config(root), root)
    assert (root / CONFIG_FILE).stat().st_mtime_ns == written  # nothing has changed
    with pytest.raises(ValueError, match=r"a run directory with its config\.yaml, but there is no such folder"):
        read_config(tmp_path / "elsewhere")


def test_settings_that_were_refused_before_any_work_are_not_kept(tmp_path: Path) -> None:
    root, wrong = tmp_path / "run", ValueError("wrong")
    with pytest.raises(ValueError, match="wrong"):
        keep(tiny.config(["nowhere"]), root, begin="", error=wrong)
    assert not root.exists()
    keep(tiny.config(["there"]), root)
    with pytest.raises(ValueError, match="wrong"):
        keep(tiny.config(["nowhere"]), root, begin="", error=wrong)
    with pytest.raises(ValueError, match="wrong"):
        keep(tiny.config(["nowhere"]), root, begin="shards", error=wrong)
    assert read_config(root).data.train[0].endswith("/there")
    with pytest.raises(ValueError, match="wrong"):
        keep(tiny.config(["begun"]), root, error=wrong)
    assert read_config(root).data.train[0].endswith("/begun")
