from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.cli.tables import command
from tests.cli.calling import called
from tests.report.test_paper_tables import rows, written


def test_tables_are_printed_and_written_by_suffix(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mrt"
    written(run / "report" / "metrics.json", rows())
    names = [str(tmp_path / f"tables{suffix}") for suffix in (".md", ".csv", ".html")]
    found = called(command, str(run), *(word for name in names for word in ("--out", name)))
    assert (found.status, found.err) == (0, "")
    assert [f"Table {number}: " in found.out for number in range(1, 6)] == [False, True, True, True, True]
    assert (tmp_path / "tables.csv").read_text().startswith("table,row,model,task")
    assert "## Table 5" in (tmp_path / "tables.md").read_text()
    assert "<title>mrt: the paper&#x27;s tables</title>" in (tmp_path / "tables.html").read_text()
    assert "Table 3" not in called(command, str(run), "--table", "2").out


def test_what_is_missing_is_printed_and_is_the_exit_status(tmp_path: Path) -> None:
    found = called(command, "--check", str(tmp_path), "--table", "4", "--list", str(tmp_path / "missing.csv"))
    assert found.status == 1
    assert found.out.endswith("0 of 3 data sets complete; not: dtd, eurosat, pets\n")
    assert "aircraft" not in found.out
    assert len((tmp_path / "missing.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "expected a RUN, or --check DATASETS"),
        (("run", "--check", "x"), "expected a RUN, or --check DATASETS"),
        (("run", "--list", "x.csv"), "--list belongs to --check"),
        (("--check", "x", "--out", "x.md"), "belong to a RUN"),
        (("run", "--out", "x.pdf"), "expected a file that ends in .md or .csv or .html"),
        (("run", "--table", "6"), "6 is not in the range 2<=x<=5"),
    ],
)
def test_words_that_do_not_go_together_are_refused(args: tuple[str, ...], words: str) -> None:
    found = called(command, *args)
    assert found.status == 2
    assert words in found.err


def test_a_run_on_other_images_has_tables_without_figures_of_its_own(tmp_path: Path) -> None:
    own = [
        {**row, "task": "photos"} for row in rows() if row["task"] == "cub" and row["model"] in ("backbone", "k=256")
    ]
    found = called(command, str(written(tmp_path / "metrics.json", own)), "--table", "2")
    assert found.status == 0
    assert "-/17.5" in found.out
    assert "note: aircraft: not in the run" in found.out
