"""The table of gains: which images a cell has, what it counts, and a whole cell by the command itself."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gain
from benchmarks.gain import Cell, GainSettings, as_text, gains, measure_gain, rows_to_test, rows_to_train
from tests.stages import tiny

ROWS = {
    "birds": [{"file": f"b{c}_{i}.jpg", "fine": f"c{c:02}", "dataset": "birds"} for c in range(20) for i in range(12)],
    "food": [{"file": f"f{c}_{i}.jpg", "fine": f"c{c}", "dataset": "food"} for c in range(4) for i in range(30)],
    "tools": [{"file": f"t{c}_{i}.jpg", "fine": f"c{c}", "dataset": "tools"} for c in range(2) for i in range(5)],
}


def test_a_cell_has_as_many_images_of_each_task_and_all_of_a_small_one() -> None:
    taken = rows_to_train(ROWS, Cell(65, 1, 64, seed=0))
    assert {task: len(rows) for task, rows in taken.items()} == {"birds": 30, "food": 30, "tools": 5}
    assert sum(map(len, rows_to_train(ROWS, Cell(10_000, 1, 64, seed=0)).values())) == 120 + 60 + 5


def test_a_cell_has_ten_images_of_a_class_and_more_only_where_classes_are_used_up() -> None:
    taken = rows_to_train(ROWS, Cell(75, 1, 64, seed=0))
    assert sorted(Counter(row["fine"] for row in taken["birds"]).values()) == [5, 10, 10, 10]
    assert sorted(Counter(row["fine"] for row in taken["food"]).values()) == [15, 20]
    assert len({row["file"] for row in taken["food"]}) == 35


def test_only_the_first_half_of_the_classes_trains_and_only_the_other_tests() -> None:
    train = rows_to_train(ROWS, Cell(10_000, 1, 64, seed=0, task="birds"))
    assert list(train) == ["birds"]
    assert {row["fine"] for row in train["birds"]} == {f"c{c:02}" for c in range(10)}
    test = rows_to_test(ROWS, 10_000)
    assert {row["fine"] for row in test["birds"]} == {f"c{c:02}" for c in range(10, 20)}
    few = rows_to_test(ROWS, 36)
    assert Counter(row["fine"] for row in few["birds"]) == {"c10": 12, "c14": 12, "c19": 12}


def test_a_seed_draws_the_images_and_the_length_of_training_does_not() -> None:
    first = rows_to_train(ROWS, Cell(40, 1, 64, seed=0))
    assert rows_to_train(ROWS, Cell(40, 3, 16, seed=0)) == first
    assert rows_to_train(ROWS, Cell(40, 1, 64, seed=1)) != first


def test_the_table_has_the_mean_and_the_spread_over_seeds() -> None:
    cells = []
    for seed, value in enumerate((0.52, 0.54)):
        scores = {"backbone": {"birds": 0.5, "food": 0.3}, "average": {"birds": value, "food": 0.29}}
        cells.append({"task": None, "images": 250, "epochs": 3, "bottleneck": 64, "seed": seed, "scores": scores})
    assert gains(cells[0]["scores"], "average") == pytest.approx({"birds": 2, "food": -1})  # type: ignore[arg-type]
    table, summary = as_text({"command": "bench.py gain"}, cells).split("\n\n")[1:]
    line = table.splitlines()[-1]
    assert "+3.0 (+2.0 to +4.0)" in line
    assert "-1.0 (-1.0 to -1.0)" in line
    assert "+1.0 (+0.5 to +1.5)" in line
    assert summary.splitlines()[-1].split() == ["average", "2", "+1.00", "-1.00"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": (0,)}, "--images: must be 1 or more, got 0"),
        ({"only": ("fish",)}, "--only fish: expected of birds"),
        ({"tasks": Path("/nowhere")}, "--tasks /nowhere: holds no TASK.csv"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    (tmp_path / "birds.csv").touch()
    given = {"tasks": tmp_path, "out": tmp_path, "backbone": "", "images": (1,), "epochs": (1,), "bottlenecks": (1,)}
    settings = GainSettings(**(given | {"seeds": (0,), "only": (), "test_images": 1} | changed))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        measure_gain(settings, lambda line: None)


def test_cells_of_other_settings_are_not_put_into_one_table(tmp_path: Path) -> None:
    (tmp_path / "birds.csv").touch()
    one = GainSettings(tmp_path, tmp_path / "out", "demo", (8,), (1,), (4,), (0,), (), 12, ("adapt.batch=8",))
    gain._check_same(one, one.out)
    gain._check_same(one, one.out)
    with pytest.raises(ValueError, match=r'out: its cells have .*"test_images": 12.* not .*"test_images": 20'):
        measure_gain(replace(one, test_images=20), lambda line: None)


@pytest.mark.slow
def test_a_cell_is_a_run_which_a_second_call_does_not_repeat(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    names = [(label, place) for label in range(4) for place in range(6)]
    with tarfile.open(tasks / "photos.tar", "w") as tar, (tasks / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "fine", "dataset"])
        for label, place in names:
            member, image = tarfile.TarInfo(f"{label}_{place}.png"), tiny.picture(label + place * tiny.GROUPS)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
            writer.writerow([member.name, f"c{label}", "photos"])
    options = {"tasks": tasks, "out": tmp_path / "out", "backbone": "grappa_dist.demo.backbone:create"}
    options |= {
        "images": [12],
        "epochs": [1],
        "bottlenecks": [4],
        "seeds": [0],
        "only": [],
        "test_images": 12,
        "models": ["average"],
    }
    text, numbers = gain.run(
        {**options, "overrides": ["resources.workers=1", "resources.adapt_ranks=1"]}, lambda line: None
    )
    (cell,) = numbers["cells"]
    assert set(cell["scores"]["average"]) == {"photos"}
    assert cell["images"] == 12
    assert "photos" in text
    before = os.stat(tmp_path / "out/cells/all_n12_s0_e1_h4/config.yaml").st_mtime_ns
    again = {**options, "overrides": ["resources.workers=1", "resources.adapt_ranks=1"]}
    assert gain.run(again, lambda line: None)[1]["cells"] == [cell]
    assert os.stat(tmp_path / "out/cells/all_n12_s0_e1_h4/config.yaml").st_mtime_ns == before
