from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.config import load
from grappa_dist.report.paper_tables import (
    METRICS,
    Published,
    as_csv,
    as_html,
    as_markdown,
    as_text,
    compare,
    read_published,
    read_run,
)
from tests.structure import ROOT

PAPER = read_published()
TABLE_2 = PAPER.tables[2]


def rows(above: float = 0.1, renamed: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What metrics.json has of a run whose scores are those of Table 2, and so many points above."""
    found = []
    for row in TABLE_2.rows:
        for task, (r_precision, map_at_r) in zip(TABLE_2.tasks, row.figures, strict=True):
            scores = {"r_precision": (r_precision + above) / 100, "map_at_r": map_at_r / 100, "recall_at_1": 0.5}
            model = (renamed or {}).get(row.own, row.own)
            found.append({"model": model, "task": task, "queries": PAPER.test_images[task], **scores})
    return found


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": found, "verdict": None}))
    return path


def test_table_2_has_the_published_figures() -> None:
    """A few of all 192, some of them as the abstract's claims need them: which row is best where."""
    assert [row.name for row in TABLE_2.rows][:3] == ["DINO", "M+A_1", "M*"]
    assert [row.own for row in TABLE_2.rows][3:11] == [f"k={k}" for k in PAPER.ks]
    assert PAPER.ks == [256, 1024, 4096, 8192, 16384, 32768, 65536, 131072]
    assert [PAPER.figure("backbone", task, 0) for task in TABLE_2.tasks] == [17.5, 9.0, 33.6, 62.5, 27.0, 34.1]
    assert (PAPER.figure("k=131072", "products", 0), PAPER.figure("k=131072", "products", 1)) == (46.5, 43.7)
    assert all(len(row.figures) == 6 for row in TABLE_2.rows)
    for task in TABLE_2.tasks:  # the oracle is the best set of each task
        sets = [PAPER.figure(f"k={k}", task, 0) for k in PAPER.ks]
        assert PAPER.figure("oracle", task, 0) == max(sets)


def test_every_row_of_table_2_stands_beside_what_is_published(tmp_path: Path) -> None:
    found = compare(2, PAPER, read_run(written(tmp_path / "metrics.json", rows())))
    assert [line.name for line in found.lines] == [row.name for row in TABLE_2.rows]
    for line in found.lines:
        for task in TABLE_2.tasks:
            assert line.difference(task, "r_precision") == pytest.approx(0.1)
            assert line.difference(task, "map_at_r") == pytest.approx(0)
    assert found.remarks == ()
    shown = as_text(found)
    assert re.search(r"^M\+P_8 \(k=131072\) +12\.7/12\.6 \+0\.1 ", shown, re.MULTILINE)
    assert re.search(r"^Grappa-N .* 32\.9/32\.9 \+0\.0$", shown, re.MULTILINE)  # the mean, of what is printed of both
    assert max(map(len, shown.splitlines())) <= 140


def test_csv_markdown_and_html_have_the_same_figures(tmp_path: Path) -> None:
    found = compare(2, PAPER, read_run(written(tmp_path / "metrics.json", rows())))
    lines = list(csv.DictReader(io.StringIO(as_csv([found]))))
    assert len(lines) == len(TABLE_2.rows) * 7 * len(METRICS)
    (one,) = (x for x in lines if (x["row"], x["task"], x["metric"]) == ("M*", "cub", "r_precision"))
    assert (one["model"], one["here"], one["published"], one["difference"]) == ("random-all", "11.10", "11.00", "0.10")
    assert r"| M\* | 11.9/11.8 +0.1 | 6.3/6.2 +0.1 |" in as_markdown(found)
    page = as_html([found], "runs <mrt>")
    assert "runs &lt;mrt&gt;" in page
    assert '<th scope="row">M*</th><td>11.9 / 11.8<span class="delta up">+0.1</span></td>' in page


def test_what_a_run_lacks_is_named_with_the_setting_that_adds_it(tmp_path: Path) -> None:
    lacking = ("random-one", "oracle", "k=256")
    some = [row for row in rows() if row["model"] not in lacking and row["task"] != "cub"]
    some += [{**row, "model": "gallery"} for row in rows() if row["model"] == "average" and row["task"] == "cars"]
    found = compare(2, PAPER, read_run(written(tmp_path / "metrics.json", some)))
    assert list(found.remarks) == [
        "cub: not in the run; its shards are given in data.test",
        "M+A_1: not in the run; fuse.variants has no random-one",
        "M+P_1: not in the run; clustering.num_labels has no 256",
        "Oracle: not in the run; it needs labelled test images",
    ]
    assert found.lines[-1].name == "(gallery)"  # ours, which the paper has not
    assert re.search(r"^M\+A_1 +-/15\.4 +-/7\.9 +-/16\.2 ", as_text(found), re.MULTILINE)
    assert math.isnan(found.lines[-1].published["cars", "r_precision"])


def test_other_numbers_of_clusters_are_taken_in_order_and_said_to_be_another_experiment(tmp_path: Path) -> None:
    few = {f"k={k}": f"k={2 + place}" for place, k in enumerate(PAPER.ks)}
    some = [{**row, "queries": 12} for row in rows(renamed=few)]
    found = compare(2, PAPER, read_run(written(tmp_path / "metrics.json", some)))
    assert [line.model for line in found.lines if line.name.startswith("M+P")] == [f"k={k}" for k in range(2, 10)]
    assert found.remarks[0].startswith("P_1, P_2, ... are k=2, k=3, ")
    assert found.remarks[1] == "aircraft: 12 queries here, 5,000 test images in the paper's benchmark"


def test_several_seeds_are_averaged(tmp_path: Path) -> None:
    for seed, above in ((0, 0.0), (1, 1.0)):
        written(tmp_path / f"seed-{seed}" / "report" / "metrics.json", rows(above))
        settings = "name: x\ndata: {train: photos}\nbackbone: {name: 'timm:vit_tiny_patch16_224'}\n"
        (tmp_path / f"seed-{seed}" / "config.yaml").write_text(settings)
    found = compare(2, PAPER, read_run(tmp_path))
    assert found.lines[0].difference("cars", "r_precision") == pytest.approx(0.5)
    assert found.remarks == (
        "means over 2 seeds",
        "the backbone of the run is timm:vit_tiny_patch16_224; the paper's is timm:vit_small_patch16_224.dino",
    )


def test_tables_3_to_5_have_what_table_2_states_of_their_models_and_else_nothing(tmp_path: Path) -> None:
    run = read_run(written(tmp_path / "metrics.json", rows()))
    stated = {number: compare(number, PAPER, run) for number in (3, 4, 5)}
    assert {line.name: math.isfinite(line.published["cub", "r_precision"]) for line in stated[3].lines} == {
        "DINO": True,
        "supervised set": False,
    }
    assert stated[5].lines[-1].published["products", "map_at_r"] == 40.3
    assert stated[4].tasks == ("dtd", "eurosat", "pets")
    assert all(math.isnan(value) for line in stated[4].lines for value in line.published.values())
    assert "none was found" in stated[4].remarks[-1]
    assert "supervised set: not in the run; adapt.supervised=true adds it" in stated[3].remarks


def test_figures_are_added_from_a_file(tmp_path: Path) -> None:
    tree = PAPER.model_dump(mode="json", exclude_none=True)
    tree["tables"]["4"]["rows"][0]["figures"] = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(tree))
    assert read_published(path).figure("backbone", "eurosat", 1) == 4.0
    assert isinstance(read_published(path), Published)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tree: tree["tables"]["2"]["rows"][0].update(figures=[[1.0, 2.0]]),
            "tables.2, DINO: expected model or k",
        ),
        (
            lambda tree: tree["tables"]["2"]["rows"][0].update(figures=[[101.0, 2.0]] * 6),
            "less than or equal to 100, got '101.0'",
        ),
        (lambda tree: tree["tables"]["2"]["rows"][0].update(k=3), "expected model or k"),
        (lambda tree: tree.update(figures={}), "figures: Extra inputs"),
    ],
)
def test_a_wrong_file_of_figures_is_refused_by_its_place(change: Any, words: str, tmp_path: Path) -> None:
    tree = PAPER.model_dump(mode="json", exclude_none=True)
    change(tree)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not there: expected a finished run"),
        ('{"rows": []}', "has no scores"),
        ('{"row": []}', "no metrics.json of a run"),
        ('{"rows": [{"model": "backbone"}]}', "no metrics.json of a run"),
    ],
)
def test_a_run_without_scores_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_run(tmp_path)


def test_the_config_of_all_tables_is_that_of_the_benchmark_with_more_rows_and_tasks() -> None:
    plain, full = (load(ROOT / "configs" / f"{name}.yaml") for name in ("mrt", "mrt_tables"))
    models = {"backbone", "oracle", "supervised-set", *(f"k={k}" for k in full.clustering.num_labels)}
    models |= set(full.fuse.variants)
    assert {row.own for one in PAPER.tables.values() for row in one.rows} == models
    same = {
        "notes": plain.notes,
        "data": plain.data,
        "adapt": full.adapt.model_copy(update={"supervised": False}),
        "fuse": full.fuse.model_copy(update={"variants": plain.fuse.variants}),
    }
    assert full.model_copy(update=same) == plain
    assert full.adapt.supervised
    assert full.data.test == (*plain.data.test, "shards/zeroshot/test")
