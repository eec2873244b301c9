"""`grappa-dist shards` takes the options of make_shards, and suggests one for what is misspelt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image


def shards(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grappa_dist", "shards", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_folder_becomes_shards_and_a_second_call_finds_them_finished(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (40 * i, 0, 99)).save(tmp_path / "photos" / label / f"{i}.png")
    first, second = (shards("--images", "photos", "--out", "made", "--workers", "1", cwd=tmp_path) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == second.stdout
    assert sorted(path.name for path in (tmp_path / "made").glob("*/*.tar")) == ["shard-000000.tar"] * 2


def test_a_misspelt_option_or_choice_gets_a_suggestion(tmp_path: Path) -> None:
    done = shards("--imges", "photos", "--out", "made", "--images", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "grappa-dist shards: error: unrecognized arguments: --imges photos; did you mean '--images'?\n"
    )
    done = shards("--images", "photos", "--out", "made", "--split", "folder", cwd=tmp_path)
    assert done.stderr.endswith("; did you mean 'folders'?\n")
