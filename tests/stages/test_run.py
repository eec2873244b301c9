from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.pipeline import run
from grappa_dist.stages.run import running
from tests.stages import tiny


def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(tiny.picture(0))
    with pytest.raises(ValueError, match=r"shards: nothing at .*photos.*make_shards\.py --images"):
        run(tiny.config([str(tmp_path / "photos")]), tmp_path / "runs" / "deep" / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_what_was_there_and_what_was_begun_stays(tmp_path: Path) -> None:
    settings = tiny.config(["nowhere"])
    (tmp_path / "there").mkdir()
    for name in ("there", "begun", "made"):
        with pytest.raises(ValueError, match="wrong"), running(settings, tmp_path / name) as context:
            if name == "begun":
                context.console.event("stage_begins")
            if name == "made":
                (tmp_path / "made" / "index").mkdir()
            raise ValueError("wrong")
    assert {path.name for path in tmp_path.iterdir()} >= {"there", "begun", "made"}
    with pytest.raises(RuntimeError, match="not of the input"), running(settings, tmp_path / "other"):
        raise RuntimeError("not of the input")
    assert (tmp_path / "other").is_dir()
