"""`grappa-dist plan` and `clean` read the settings of a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.cli import clean, plan
from grappa_dist.stages.run import CONFIG_FILE
from tests.cli.calling import called
from tests.stages import tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which nothing is left but labels of other settings."""
    shards = tiny.write_shards(tmp_path / "images", sizes=(9, 4), bad=())
    root = tmp_path / "run"
    (Store(root).artifact("labels/k=3", {}, {}).begin() / "labels.npy").write_bytes(b"0" * 2048)
    Store(root).artifact("labels/k=3", {}, {}).commit()
    (root / CONFIG_FILE).write_text(tiny.config(shards).absolute(root).yaml())
    return root


def test_clean_lists_and_with_yes_removes_what_the_settings_of_the_run_do_not_need(run: Path) -> None:
    listed = called(clean.command, str(run))
    assert listed.status == 0
    assert "labels/k=3" in listed.out
    assert list(run.glob("labels/k=3-*"))
    removed = called(clean.command, str(run), "--yes")
    assert removed.status == 0
    assert not list(run.glob("labels/k=3-*"))


def test_plan_takes_settings_over_those_of_the_run_and_writes_nothing(run: Path) -> None:
    before = tiny.files_below(run)
    found = called(plan.command, str(run), "clustering.num_labels=[5]", "adapt.epochs=7")
    assert found.status == 0
    assert "epochs: 7" in found.out
    assert "num_labels:\n  - 5\n" in found.out
    assert tiny.files_below(run) == before


def test_a_folder_that_is_no_run_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    found = called(clean.command, str(tmp_path))
    assert (found.status, found.out) == (2, "")
    assert f"{tmp_path}: expected a run directory with its config.yaml" in found.err
