"""`grappa-dist serve`: what it refuses before anything is embedded, and an index for each model. As a process:
tests/serving/test_server.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from grappa_dist.cli.serve import command
from grappa_dist.export import embed_images
from grappa_dist.retrieval.index import build_index
from tests.cli.calling import called
from tests.retrieval.embedded import here
from tests.retrieval.photos import model_in, write_photos


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected --model M and --images PLACE, or --index DIR"),
        (["--model", "run"], "expected --model M and --images PLACE, or --index DIR"),
        (["--index", "i", "--images", "photos"], "--index, once or twice, has its images"),
        (["--index", "i", "--index", "i", "--index", "i"], "--index, once or twice, has its images"),
        (["--model", "run", "--images", "photos", "photos"], "photos: expected no more places"),
        (["--model", "run", "--images", "photos", "--host", "0.0.0.0"], "--host 0.0.0.0: other machines could see"),
        (["--model", "run", "--images", "photos", "--port", "65536"], "65536 is not in the range"),
        (["--model", "run", "--images", "photos", "--max-megapixels", "65"], "65.0 is not in the range"),
        (["--model", "nowhere", "--images", "photos", "--port", "0"], "nowhere: is no folder"),
        (["--model", "run", "--images", "nowhere", "--port", "0"], "nowhere: does not exist"),
        (["--index", "photos", "--port", "0"], "photos: there is no index"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(tmp_path / "run")
    write_photos(tmp_path / "photos")
    found = called(command, *given)
    assert (found.status, found.out) == (2, "")
    assert message in found.err.splitlines()[-1]


def test_a_missing_package_is_named_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = called(command, "--model", "run", "--images", "photos")
    assert (found.status, found.err) == (
        2,
        "error: starlette is not installed: pip install 'grappa-dist[serve]'\n",
    )


def test_each_index_is_a_column_and_the_bad_image_is_in_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here(monkeypatch)
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    served = dict[str, Any]()
    monkeypatch.setattr("grappa_dist.serving.server.serve", lambda app, bound, ready: served.update(app=app))
    model = model_in(tmp_path / "run")
    embed_images(Path(model), ["photos"], tmp_path / "embeddings", ["data.max_bad_share=0.5"])
    from grappa_dist.console import Console

    build_index(tmp_path / "embeddings", Path(model), Console())
    found = called(command, "--index", "embeddings", "--index", "embeddings", "--port", "0")
    assert found.status == 0, found.err
    assert found.out.splitlines()[0] == "left out: 1 of 12 images could not be read"
    with TestClient(served["app"], base_url="http://localhost") as client:
        query = (tmp_path / "photos" / "cat" / "3.png").read_bytes()
        columns = client.post("/search?k=100", content=query).json()["columns"]
        assert [(column["model"], column["hits"][0]["name"]) for column in columns] == [("neighbours", "cat/3.png")] * 2
        assert len(columns[0]["hits"]) == 11
        assert client.get(f"/{columns[0]['hits'][0]['image']}").content == query
