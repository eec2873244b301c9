"""The command: rows, budget, endings, and that it needs no more packages than docs/gpu.md lists."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from grappa_dist.gpu_check.checks import CHECKS, Check, Figure, Found, Machine, NotHere
from grappa_dist.gpu_check.main import LEFT_OVER_S, checked, main, parser, run_all, status_of
from grappa_dist.gpu_check.report import FAILED, OK, SKIPPED, WRONG, Report, Row
from tests.structure import ROOT

BARE = ("torch", "torchvision", "timm", "safetensors", "numpy")  # of a machine that has these and what they need
QUICK = ("limit-fp32", "softmax", "kmeans", "knn", "resume")  # the others: where every check is run
HERE = "tests.gpu_check.test_main"
NEEDS_GPU = re.compile(r"skipif\(\s*not torch\.cuda\.is_available\(\)")


def right(machine: Machine) -> Found:
    return Found(
        "all is well", (Figure("", 2e12, "FLOP/s", machine.share(2e12, "fp32"), "fp32"),), limits={"fp32": 4e12}
    )


def wrong(machine: Machine) -> Found:
    return Found("1 differs", wrong="2 | 3")


def raises(machine: Machine) -> Found:
    raise RuntimeError("an illegal\nmemory access")


def lacks(machine: Machine) -> Found:
    raise NotHere("there is no kernel")


def dies(machine: Machine) -> Found:
    os.kill(os.getpid(), signal.SIGKILL)
    return Found()


def hangs(machine: Machine) -> Found:
    signal.pause()
    return Found()


def check_of(function: Any, seconds: float = 1.0) -> Check:
    return Check(function.__name__, "a test", f"{HERE}:{function.__name__}", seconds)


def rows_of(folder: Path, *functions: Any, budget_s: float = 600.0) -> list[Row]:
    report = Report(folder, "test", budget_s)
    run_all([check_of(function) for function in functions], report, "cpu", budget_s)
    return report.rows


@pytest.mark.slow
def test_an_error_a_crash_and_a_wrong_result_are_rows_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path, right, raises, dies, lacks, wrong, right)
    assert [row.state for row in rows] == [OK, FAILED, FAILED, SKIPPED, WRONG, OK]
    assert rows[1].found.text.startswith("RuntimeError: an illegal memory access")
    assert rows[2].found.text == "its process died (signal SIGKILL)"
    assert rows[3].found.text == "there is no kernel"
    assert rows[5].found.line() == "all is well; 2,000,000,000,000 FLOP/s (50.0% of fp32)"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows)
    assert printed[4].startswith("wrong    wrong")
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["state"] for row in written["rows"]] == [row.state for row in rows]
    assert "torch" in written["machine"]["versions"]
    assert "| wrong | wrong |" in (tmp_path / "gpu_check.md").read_text()
    assert "2 &#124; 3; 1 differs" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.slow
def test_a_check_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa_dist.gpu_check.main.LEFT_OVER_S", -3.9)
    (row,) = rows_of(tmp_path, hangs)
    assert (row.state, row.found.text) == (FAILED, "did not end within 0 s")


def test_what_does_not_fit_the_budget_is_named(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, right, right, budget_s=1e-9)
    assert [row.state for row in rows] == [SKIPPED, SKIPPED]
    assert rows[0].found.text == "takes about 1 s, 0 s of the budget are left"


def test_on_a_gpu_a_check_begins_only_if_its_time_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, "test", 50.0)
    run_all([check_of(right, 60.0), check_of(hangs, 90.0)], report, "cuda", 50.0)  # nothing is asked of a GPU
    assert [row.state for row in report.rows] == [SKIPPED, SKIPPED]
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"skipped  right +takes about 60 s, \d+ s of the budget are left", first)
    assert re.fullmatch(r"skipped  hangs +takes about 90 s, \d+ s of the budget are left", second)
    assert f"| right | skipped | 0.0 | {report.rows[0].found.text} |" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize(
    ("states", "status"), [([OK], 0), ([OK, SKIPPED], 3), ([WRONG, SKIPPED], 1), ([OK, FAILED], 1), ([], 0)]
)
def test_the_exit_status_tells_right_from_wrong_and_from_skipped(states: list[str], status: int) -> None:
    assert status_of([Row("a", state, 0.0, Found()) for state in states]) == status


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x", "--only", "speed"], "--only speed: there is no such check"),
        (["--out", "x", "--budget-s", "0"], "--budget-s 0: must be above 0"),
        ([], "--out DIR is needed"),
    ],
)
def test_a_wrong_call_ends_with_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        checked(parser().parse_args(words))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a file", "below a file", "results taken by a folder"])
def test_a_place_that_cannot_be_written_is_refused_before_any_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    out = tmp_path / "out" / "deeper" if place == "below a file" else tmp_path / "out"
    if place == "results taken by a folder":
        (out / "gpu_check.json").mkdir(parents=True)
    else:
        (tmp_path / "out").touch()
    with pytest.raises(SystemExit) as ended:
        main(parser().parse_args(["--out", str(out), "--device", "cpu", "--only", "softmax"]))
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert f"--out {out}: " in written.err
    assert "expected a folder to write to" in written.err
    assert "softmax" not in written.out


def test_a_machine_without_a_gpu_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(parser().parse_args(["--out", str(tmp_path)]))
    assert ended.value.code == 2
    assert "sees no GPU here; --device cpu tests the checks themselves" in capsys.readouterr().err


def test_the_list_names_every_check_and_the_documents_explain_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(parser().parse_args(["--list"])) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [check.name for check in CHECKS]
    explained = re.findall(r"^\| `([^|]+)` \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    named = {name for cell in explained for name in re.split(r"`, `", cell)}
    assert set(listed) - named == set()
    total = sum(check.seconds for check in CHECKS)
    assert total < 600
    assert f"come to {total:.0f} s" in (ROOT / "docs" / "gpu.md").read_text()


def test_what_the_default_budget_leaves_out_are_the_last_checks_alone() -> None:
    left, names = parser().parse_args([]).budget_s, []
    for check in CHECKS:
        if check.seconds <= left:
            left -= check.seconds
            names.append(check.name)
    assert names == [check.name for check in CHECKS][:-2]
    assert parser().parse_args([]).budget_s + LEFT_OVER_S <= 480  # so it ends within eight minutes whatever hangs
    assert names.index("demo") < names.index("rate-graph") < names.index("embed-16")  # a slow machine loses rates first


def test_every_function_of_the_table_exists() -> None:
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        assert callable(getattr(importlib.import_module(f"grappa_dist.gpu_check.{module}"), name)), check.name


def listed_packages() -> list[str]:
    """Those of the table in docs/gpu.md."""
    text = (ROOT / "docs" / "gpu.md").read_text().partition("## What it needs")[2].partition("\n## ")[0]
    return re.findall(r"^\| ([a-z0-9-]+) \|", text, re.MULTILINE)[1:]


def modules_of(packages: tuple[str, ...]) -> list[str]:
    """The modules of some packages and of all that they need."""
    left, known = list(packages), set[str]()
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in known:
            known.add(name)
            try:
                needed = [Requirement(line) for line in requires(name) or ()]
            except PackageNotFoundError:
                continue
            left += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    own = listed_packages()
    by_module = {m: {re.sub(r"[-_.]+", "-", d).lower() for d in ds} for m, ds in packages_distributions().items()}
    return [module for module, of in by_module.items() if of & (known | set(own))]


def run_with_listed_packages(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command where nothing can be imported but what docs/gpu.md lists."""
    paths = [str(ROOT / "tests" / "gpu_check" / "blocking"), str(ROOT)]
    hidden = {"GPU_CHECK_PACKAGES": json.dumps(modules_of(BARE)), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "launch/gpu_check.py", "--device", "cpu", "--out", str(out), *words]
    environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_checks_pass_on_a_cpu_with_the_listed_packages_alone(tmp_path: Path) -> None:
    ended = run_with_listed_packages(tmp_path, "--only", *QUICK)
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["rows"]}
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(QUICK, OK), ended.stdout
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_make_collects_every_test_that_needs_a_gpu_and_no_others_files() -> None:
    """Those of other files may import packages that are not listed, which would end the run."""
    need = {path for path in (ROOT / "tests").rglob("test_*.py") if NEEDS_GPU.search(path.read_text())}
    (line,) = re.findall(r"^GPU_TESTS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [ROOT / name for name in line.split()]
    assert all(path.exists() for path in made)
    assert {path for path in need if not any(path.is_relative_to(one) for one in made)} == set()
    for path in need:
        assert len(NEEDS_GPU.findall(path.read_text())) == path.read_text().count("pytest.mark.gpu"), path


@pytest.mark.long
def test_all_checks_pass_on_a_cpu_with_the_listed_packages_alone(tmp_path: Path) -> None:
    ended = run_with_listed_packages(tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["rows"]}
    assert {name: row["state"] for name, row in rows.items() if row["state"] != OK} == {"kernel": SKIPPED}, ended.stdout
    assert ended.returncode == 3, ended.stderr[-2000:]  # triton is not listed
