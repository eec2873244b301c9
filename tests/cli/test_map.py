"""`grappa-dist map` of a run and of images, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.cli.map import command
from tests.cli.calling import called
from tests.retrieval.photos import model_in, write_photos
from tests.retrieval.test_map_images import finished_run
from tests.test_docs_commands import run_by


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected one run directory, or --model and --images"),
        (["a", "b"], "expected one run directory, or --model and --images"),
        (["a", "--model", "m", "--images", "x"], "expected one run directory, or --model and --images"),
        (["--images", "x"], "expected one run directory, or --model and --images"),
        (["a", "backbone.image_size=32"], "backbone.image_size=32: settings are for a backbone that --model names"),
        (["a", "--keep", "k"], "--keep is for --model and --images; a run has its images and labels"),
        (["--model", "m", "--images", "x", "--name", "k=4"], "--name is for a run directory; --model names the model"),
        (["nowhere", "--fiftyone", "/"], "/ is there already; expected a folder that does not exist, or is empty"),
        (["nowhere"], "nowhere: expected a run directory with its"),
        (["--model", "nowhere", "--images", "x"], "nowhere: is no folder; expected a run directory"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = called(command, *args)
    assert found.status == 2
    assert message in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_commands_of_the_docs_draw_maps_and_kept_embeddings_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(Path("runs", "mine"))
    finished_run(Path("runs", "mine"))
    write_photos(Path("photos"), bad=("cat/1.png",))
    Path("photos", "<b>.png").write_bytes(Path("photos", "cat", "0.png").read_bytes())
    (lines,) = run_by("test_the_commands_of_the_docs_draw_maps_and_kept_embeddings_are_used_again")
    of_run, of_images = (called(command, *words[2:]) for words in lines)
    assert (of_run.status, of_images.status) == (0, 0), of_run.err + of_images.err
    assert of_run.out.startswith("map     runs/mine/map.html  (0.")
    assert Path("runs/mine/map.html").read_text().count('<div class="plane"') == 2
    assert of_images.out.splitlines()[0] == "left out: 1 of 13 images could not be read"
    assert of_images.out.splitlines()[-1].endswith("12 pictures)")
    kept = [*lines[1][2:], "--keep", "keep", "--out", "again.html"]
    assert called(command, *kept).status == 0
    assert Path("again.html").read_bytes() == Path("photos.html").read_bytes()
    assert "12 of 13 images were embedded before" in called(command, *kept).err
    assert sorted(path.name for path in Path("keep").iterdir()) == ["against", "model"]
    more = ("--against", "none", "--out", "single.html", "--fiftyone", "samples")
    single = called(command, *kept[:4], *more)
    assert single.status == 0
    assert single.out.splitlines()[-1] == "fiftyone  samples  (12 images)"
    assert Path("single.html").read_text().count('<div class="plane"') == 1
