from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grappa_dist.pipeline import run
from grappa_dist.stages.run import Run, running
from tests.stages import tiny


def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(tiny.picture(0))
    with pytest.raises(ValueError, match=r"shards: nothing at .*photos.*make_shards\.py --images"):
        run(tiny.config([str(tmp_path / "photos")]), tmp_path / "runs" / "deep" / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


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
