"""What submit.sh refuses before Slurm is asked, and the form of the shell scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

SCRIPTS = [*(ROOT / "cluster").rglob("*.sh"), *(ROOT / "cluster").rglob("*.sbatch"), *(ROOT / "tests").rglob("*.sh")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("RUN_DIR=runs/mine", "RUN_DIR=runs/mine must be an absolute path"),
        ("CONFIG=nowhere.yaml", "CONFIG=nowhere.yaml: no such file"),
        ("NODE_LOSS=ignore", "NODE_LOSS=ignore must be requeue or stay"),
        ("NODE=2", "NODE: no such setting"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "mine.sh").write_text(f"RUN_DIR={tmp_path}/run\n{line}\n")
    command = [str(ROOT / "cluster" / "slurm" / "submit.sh"), str(tmp_path / "mine.sh")]
    ended = subprocess.run(command, text=True, capture_output=True)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


def test_shell_scripts_are_well_formed() -> None:
    assert len(SCRIPTS) >= 4
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], check=True, cwd=ROOT)
