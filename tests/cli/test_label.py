"""`grappa-dist evaluate --label`: what it refuses, and a run whose questions are answered before."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.cli.evaluate import command
from grappa_dist.retrieval.answer_file import open_answers
from grappa_dist.retrieval.labelling import labelling_of
from grappa_dist.retrieval.map_images import images_of_run
from tests.cli.calling import called
from tests.retrieval.photos import model_in, write_photos
from tests.retrieval.test_map_images import finished_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model, photos, and a folder without images."""
    folder = tmp_path_factory.mktemp("world")
    model_in(folder / "run")
    write_photos(folder / "photos")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "run", "--images", "photos", "--at", "1,5"], "--at 1,5: with --label expected one number"),
        (["--model", "run", "--images", "photos", "--at", "0"], "--at 0: with --label expected one number"),
        (["--model", "run", "--queries", "photos"], "--queries is about labelled images; expected --images alone"),
        (["--model", "run", "--page", "p.html"], "--page is about labelled images"),
        (["--model", "timm:any"], "timm:any: is no run directory, so it has no images; expected --images PLACE"),
        (["--model", "run", "--against", "other"], "--against other: without --images a run is compared with its own"),
        (["--model", "run", "--strength", "0.5"], "--strength 0.5: without --images a run is compared with its own"),
        (["--model", "run"], "run: expected a run directory with its"),
        (["--model", "nowhere", "--images", "photos"], "nowhere: is no folder"),
        (["--model", "run", "--images", "nowhere"], "nowhere: does not exist"),
        (["--model", "run", "--images", "empty"], "empty: no images"),
        (["--model", "run", "--images", "photos", "--against", "none"], "--label compares two models, and neighbours"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    given: list[str], message: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    found = called(command, "--label", "10", "--port", "0", *given)
    assert (found.status, found.out) == (2, "")
    assert message in found.err.splitlines()[-1]
    assert not Path("answers.jsonl").exists()


def test_a_run_whose_questions_are_answered_has_its_result_without_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = labelling_of(images_of_run(finished_run(Path("run")), 1000), 10, 5)
    with open_answers(Path("answers.jsonl")) as answers:
        for pair in asked.pairs:
            asked.add(answers, pair, "same")
    found = called(command, "--model", "run", "--label", "10", "--port", "0", "--json", "found.json")
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert lines[0] == "Not shown: 1 image that could not be read."
    assert "serving" not in found.out
    assert f"answers: {len(asked.pairs)} of {len(asked.pairs)}, 0 unsure (each counts as half)" in lines
    assert lines[-1].startswith("average - backbone: +0.0 points")
    assert lines[-1].endswith("not shown to be better or worse")
    assert Path("found.json").exists()
