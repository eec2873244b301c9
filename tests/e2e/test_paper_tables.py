"""The paper's tables from the original folders of the data sets: its benchmark in small, without Ray."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grappa_dist import pipeline
from grappa_dist.cli.tables import command
from grappa_dist.config import CONFIG_FILE, load
from grappa_dist.make_shards.cli import main as make_shards
from grappa_dist.report.paper_tables import read_published
from tests.cli.calling import called
from tests.make_shards import miniature
from tests.stages import tiny
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
)


@pytest.mark.long
def test_the_benchmark_in_small_fills_every_row_of_the_tables_from_the_original_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="the annotations of Cars and Flowers are MATLAB files")
    monkeypatch.chdir(tmp_path)
    miniature.mrt(tmp_path / "sets")
    found = called(command, "--check", "sets")
    assert found.status == 1  # all is there, but fewer than the paper has
    assert "not there" not in found.out
    assert "missing" not in found.out
    assert "2 train classes, expected 100; 8 train images, expected 5,864" in found.out
    for part in ("mrt", "zeroshot"):
        words = ("--benchmark", "mrt", "--part", part, "--root", "sets", "--out", f"shards/{part}", "--workers", "1")
        assert make_shards(words) == 0
    settings, root = load(ROOT / "configs" / "mrt_tables.yaml", SMALL), tmp_path / "runs" / "mrt"
    pipeline.run_in(tiny.run_in(settings, root, tiny.Here(num_workers=1)))
    (root / CONFIG_FILE).write_text(settings.yaml())
    shown = called(command, "runs/mrt", "--out", "tables.csv")
    assert (shown.status, shown.err) == (0, "")
    with open("tables.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for number, table in read_published().tables.items():
        rows = {line["row"] for line in lines if line["table"] == str(number)}
        assert rows == {row.name for row in table.rows}
    assert [line for line in lines if not 0 <= float(line["here"] or "nan") <= 100] == []
    assert "not in the run" not in shown.out
    assert "which the paper has none: it is another experiment" in shown.out
    assert "cub: 8 queries here, 5,924 test images in the paper's benchmark" in shown.out
    assert "dtd: 16 queries here, 5,640 test images in the paper's benchmark" in shown.out
