"""The paper's tables from the original folders of the data sets: its benchmark in small, end to end."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grappa_dist.report.paper_tables import read_published
from tests.make_shards import miniature
from tests.structure import ROOT

SMALL = (
    "backbone.name=grappa_dist.demo.backbone:create",
    "clustering.num_labels=[2, 3, 4, 5, 6, 8, 12, 16]",
    "adapt.epochs=1",
    "adapt.global_batch=24",
    "adapt.bottleneck=8",
    "fuse.global_batch=24",
    "fuse.projector=[32, 32]",
    "evaluate.view_queries=8",
    "resources.num_cpus=2",
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def grappa(cwd: Path, *words: str, status: int = 0) -> str:
    """What the command prints."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "grappa_dist", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_benchmark_in_small_fills_every_row_of_the_tables_from_the_original_folders(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the annotations of Cars and Flowers are MATLAB files")
    miniature.mrt(tmp_path / "sets")
    found = grappa(tmp_path, "tables", "--check", "sets", status=1)  # all is there, but fewer than the paper has
    assert "not there" not in found
    assert "missing" not in found
    assert "2 train classes, expected 100; 8 train images, expected 5,864" in found
    for part in ("mrt", "zeroshot"):
        grappa(tmp_path, "shards", "--benchmark", "mrt", "--part", part, "--root", "sets", "--out", f"shards/{part}")
    config = str(ROOT / "configs" / "mrt_tables.yaml")
    grappa(tmp_path, "run", "--config", config, "--out", "runs/mrt", "--quiet", *SMALL)
    shown = grappa(tmp_path, "tables", "runs/mrt", "--out", "tables.csv")
    with (tmp_path / "tables.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for number, table in read_published().tables.items():
        rows = {line["row"] for line in lines if line["table"] == str(number)}
        assert rows == {row.name for row in table.rows}
    assert [line for line in lines if not 0 <= float(line["here"] or "nan") <= 100] == []
    assert "not in the run" not in shown
    assert "which the paper has none: it is another experiment" in shown
    assert "cub: 8 queries here, 5,924 test images in the paper's benchmark" in shown
    assert "dtd: 16 queries here, 5,640 test images in the paper's benchmark" in shown
