"""The command line of the benchmark: what it refuses, in one line, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import bench
from launch.bench import main

TINY = ["kmeans", "--rows", "400", "--dim", "32", "--num-labels", "5", "--iterations", "2", "--threads", "1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: kmeans|methods|assign|data|knn|fuse|adapt|embed|passes|evaluate|"),
        (["graph"], "invalid choice: 'graph'"),
        (["knn", "--neighbours", "0"], "--neighbours must be at least 1, got 0"),
        (["knn", "--recall-floor", "1"], "--recall-floor must be from 0 to less than 1, got 1.0"),
        (["knn", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["kmeans", "--rows", "many"], "invalid int value: 'many'"),
        (
            ["methods", "--rows", "50", "--num-labels", "51"],
            "--num-labels must be from 1 to the number of rows, 50",
        ),
        (["data", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["data", "--views", "both"], "invalid choice: 'both'"),
        (["data", "--shards", "nowhere"], "nothing at nowhere"),
        (["fuse", "--ranks", "1"], "--ranks must be at least 2, got 1"),
        (["embed", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["evaluate", "--rows", "1"], "--rows must be at least 2, got 1"),
        (["adapt", "--classes", "0"], "--classes must be at least 1, got 0"),
        (["adapt", "--sets", "0"], "--sets must be at least 1, got 0"),
        (["adapt", "--sections", "step", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["kmeans", "--speed"], "unrecognized arguments: --speed"),
        ([*TINY, "--rows", "5"], "--num-labels must be from 1 to less than the number of rows, 5, got 5"),
        ([*TINY, "--dim", "8"], "--dim must be at least 32, got 8"),
        ([*TINY, "--iterations", "0"], "--iterations must be at least 1, got 0"),
        ([*TINY, "--features", "rows.npy"], "--dim is that of the rows of --features"),
        (["kmeans", "--features", "nowhere"], "nowhere is no .npy file and no folder with any"),
        ([*TINY, "--scaling-labels", "400"], "--scaling-labels must be from 1 to less than"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(argv)
    except SystemExit as left:  # as argparse does
        status = int(left.code or 0)
    printed = capsys.readouterr()
    lines = [
        line for line in printed.err.splitlines() if line not in ("bench: rows", "bench: images")
    ]  # that one is progress
    assert (status, printed.out, len(lines)) == (2, "", 1)
    assert message in lines[0]


def test_a_run_prints_a_table_and_writes_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kmeans.json"
    assert main([*TINY, "--workers", "1", "--init", "none", "--repeats", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "K=5: ours" in printed.out
    assert all(line.startswith("bench: ") for line in printed.err.splitlines())
    written = json.loads(path.read_text())
    assert written["rows"] == {
        "source": "drawn: 400 rows, 8 tasks > 60 classes > 8 sub-classes, seed 0",
        "rows": 400,
        "dim": 32,
    }
    assert written["scaling"] == written["seeding"] == []
    assert np.isfinite(written["kmeans"][0]["ratio_to_faster_baseline"])
    assert {len(side["runs_s"]) for side in written["kmeans"][0]["sides"]} == {2}


def test_a_run_on_images_prints_a_table_and_writes_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    small = ["--rows", "8", "--width", "40", "--height", "30", "--image-size", "8", "--views", "test"]
    assert main(["data", *small, "--threads", "1", "--repeats", "1", "--json", str(path)]) == 0
    assert "test: ours" in capsys.readouterr().out
    assert [found["view"] for found in json.loads(path.read_text())["views"]] == ["test"]


@pytest.mark.long
def test_a_run_from_another_folder_finds_the_benchmarks_in_worker_processes_too(tmp_path: Path) -> None:
    small = ["--sets", "2", "--backbone", "vit_tiny_patch16_224", "--image-size", "32", "--images", "4"]
    command = [sys.executable, str(Path(bench.__file__).resolve()), "adapt", "--sections", "packing", *small]
    done = subprocess.run(
        [*command, "--steps", "1", "--repeats", "1"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "x one after the other" in done.stdout


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["kmeans", "--help"])
    assert left.value.code == 0
    assert "python launch/bench.py kmeans --rows" in capsys.readouterr().out
