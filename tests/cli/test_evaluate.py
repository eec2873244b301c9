"""`grappa-dist evaluate` on class folders, and the same in Python without what the light install lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grappa_dist.cli.evaluate import command
from tests.cli.calling import called
from tests.retrieval.photos import model_in, write_photos


def test_class_folders_are_scored_beside_the_backbone(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    out = tmp_path / "scores.json"
    given = ["--model", model_in(tmp_path / "run"), "--images", str(tmp_path / "photos"), "--json", str(out)]
    found = called(command, *given)
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert lines[1].startswith("backbone: the backbone of ")
    assert lines[-1].split(":")[0] in (
        "Better than the backbone",
        "Worse than the backbone",
        "Not shown to be better than the backbone",
    )
    assert any(line.startswith("  cat/1.png: no JPEG") for line in lines)
    assert list(json.loads(out.read_text())["scores"]) == ["neighbours", "backbone"]
    alone = called(command, *given, "--against", "none")
    assert "backbone" not in alone.out
    flat = called(command, *given[:3], str(tmp_path / "photos" / "cat"))
    assert flat.status == 2
    assert flat.err.startswith("error: ")


@pytest.mark.slow
def test_python_needs_neither_ray_nor_faiss_nor_deepspeed(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "deepspeed", "faiss", "webdataset", "aiohttp"):
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Blocked())
import grappa_dist
found = grappa_dist.evaluate({model_in(tmp_path / "run")!r}, {str(tmp_path / "photos")!r})
print(found.means["neighbours"].queries)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "12\n"), done.stderr
