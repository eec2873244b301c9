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
from tests.stages import tiny


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


def test_a_model_is_scored_at_a_strength_beside_itself(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    model, out = model_in(tmp_path / "run"), tmp_path / "scores.json"
    given = ["--model", model, "--images", str(tmp_path / "photos"), "--json", str(out)]
    found = called(command, *given, "--against", model, "--strength", "0.5")
    assert found.status == 0, found.err
    assert list(json.loads(out.read_text())["scores"]) == ["neighbours@0.5", "neighbours"]
    found = called(command, *given, "--strength", "0")
    assert found.status == 0, found.err
    scores = json.loads(out.read_text())["scores"]
    assert list(scores) == ["neighbours@0", "backbone"]
    assert scores["neighbours@0"] == scores["backbone"]
    found = called(command, *given, "--strength", "5")
    assert (found.status, found.err[:53]) == (2, "error: strength=5.0: expected a number from 0, the ba")


@pytest.mark.long
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


def test_queries_gallery_distractors_and_every_output(tmp_path: Path) -> None:
    write_photos(tmp_path / "shop", bad=("cat/1.png",))
    for name in ("asked/cat", "crawl"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "new.png").write_bytes(tiny.picture(98 + len(name)))
    sides = ["--queries", str(tmp_path / "asked"), "--gallery", str(tmp_path / "shop")]
    files = {name: tmp_path / f"{name}.csv" for name in ("csv", "csv-classes", "csv-queries")} | {
        "json": tmp_path / "scores.json",
        "page": tmp_path / "scores.html",
    }
    given = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    model = ["--model", "tests.models.tiny:create", "--at", "1,3"]
    found = called(command, *model, *sides, "--distractors", str(tmp_path / "crawl"), *given)
    assert found.status == 0, found.err
    assert "1 query among the images of their task in a gallery of 11, and 1 distractor" in found.out
    figures = json.loads(files["json"].read_text())
    assert [hit["file"] for hit in figures["worst"]["backbone"][0]["models"]["backbone"]["found"]].count("new.png") == 1
    assert files["csv-queries"].read_text().splitlines()[1].startswith("cat/new.png,shop,cat,backbone,")
    assert files["csv-classes"].read_text().splitlines()[1].startswith("backbone,shop,cat,1,")
    assert "recall_at_3" in files["csv"].read_text()
    assert "<h2>Scores</h2>" in files["page"].read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images", "a", "--gallery", "birds"], "--gallery-weights"),
        (["--images", "a", "--at", "1,x"], "--at 1,x: expected numbers with commas"),
        (["--images", "a", "--at", "0"], "expected different numbers of at least 1"),
        (["--images", "a", "--page", "a.png"], "a.png: expected a name that ends in .html"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_embedded(args: list[str], message: str) -> None:
    found = called(command, "--model", "tests.models.tiny:create", *args)
    assert found.status == 2
    assert message in found.err
