"""What submit.sh refuses before Slurm is asked, and the form of the shell scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

SCRIPTS = [*(ROOT / "cluster").rglob("*.sh"), *(ROOT / "cluster").rglob("*.sbatch"), *(ROOT / "tests").rglob("*.sh")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("RUN_DIR=runs/mine", "RUN_DIR=runs/mine must be an absolute path"),
        ("CONFIG=nowhere.yaml", "CONFIG=nowhere.yaml: no such file"),
        ("NODE_LOSS=ignore", "NODE_LOSS=ignore must be requeue or stay"),
        ("NODE=2", "NODE: no such setting"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mine.sh").write_text(f"RUN_DIR={tmp_path}/run\n{line}\n")
    command = [str(ROOT / "cluster" / "slurm" / "submit.sh"), str(tmp_path / "mine.sh")]
    ended = subprocess.run(command, text=True, capture_output=True)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_every_setting_of_a_job_is_explained_in_the_docs() -> None:
    settings = re.findall(r"^([A-Z_]+)=|^(activate)\(", (ROOT / "cluster" / "slurm" / "settings.sh").read_text(), re.M)
    page = (ROOT / "docs" / "clusters.md").read_text()
    explained = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert len(settings) > 15
    assert [name for name in map("".join, settings) if f"`{name}`" not in explained] == []


def test_shell_scripts_are_well_formed() -> None:
    assert len(SCRIPTS) >= 4
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], check=True, cwd=ROOT)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands in front of the real ones: they record their arguments, and do nothing."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "python3"):
        script = f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/{name}.arguments\nenv >{tmp_path}/{name}.env\necho 42\n'
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (tmp_path / "here").mkdir()
    return tmp_path


def submit(site: Path, *lines: str) -> list[str]:
    """The arguments of sbatch: all submitted from `here`, with settings by a relative path."""
    (site / "here" / "mine.sh").write_text("\n".join([f"RUN_DIR={site}/run", *lines, ""]))
    command = [str(ROOT / "cluster" / "slurm" / "submit.sh"), "mine.sh"]
    subprocess.run(command, check=True, cwd=site / "here")
    return (site / "sbatch.arguments").read_text().splitlines()


def run_batch(site: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Does what Slurm does with the batch script: another folder, and the arguments that sbatch was given."""
    variables = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.run(["bash", *arguments[-3:]], cwd=site, env=variables, text=True, capture_output=True)


def test_a_requeued_job_reads_the_config_that_was_submitted(site: Path) -> None:
    (site / "here" / "mine.yaml").write_text("name: before\n")
    arguments = submit(site, "CONFIG=mine.yaml", "activate() { :; }")
    (site / "here" / "mine.yaml").write_text("name: edited since\n")
    assert run_batch(site, arguments).returncode == 0
    given = (site / "python3.arguments").read_text().splitlines()
    config = Path(given[given.index("--config") + 1])
    assert config.parent == site / "run" / "slurm"
    assert config.read_text() == "name: before\n"


def test_a_config_of_the_repository_is_found_from_anywhere(site: Path) -> None:
    kept = Path(submit(site, "CONFIG=configs/demo.yaml")[-1])
    assert Path(f"{kept}.yaml").read_text() == (ROOT / "configs" / "demo.yaml").read_text()


def test_activate_may_read_unset_variables_and_go_on_after_failures(site: Path) -> None:
    hooks = 'activate() { if [ "$NOT_SET" ]; then :; fi; false; export HOOKED=yes; }'
    ended = run_batch(site, submit(site, "CONFIG=configs/demo.yaml", hooks))
    assert ended.returncode == 0, ended.stderr
    assert "HOOKED=yes" in (site / "python3.env").read_text()


def test_an_activate_that_fails_is_reported_in_one_line(site: Path) -> None:
    ended = run_batch(site, submit(site, "CONFIG=configs/demo.yaml", "activate() { return 3; }"))
    assert ended.returncode == 2
    assert "failed with 3: Python cannot be set up on" in ended.stderr
    assert not (site / "python3.arguments").exists()


def test_a_job_inherits_nothing_of_the_job_that_submits_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_CPUS_PER_TASK": "3", "SLURM_MEM_PER_NODE": "7", "SLURM_CONF": "/etc/conf"}.items():
        monkeypatch.setenv(name, value)
    arguments = submit(site, "CONFIG=configs/demo.yaml", "GPUS_PER_NODE=a100:4")
    assert "--gpus-per-node=a100:4" in arguments
    found = [line for line in (site / "sbatch.env").read_text().splitlines() if line.startswith("SLURM_")]
    assert found == ["SLURM_CONF=/etc/conf"]
