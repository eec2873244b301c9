"""The columns: which models and embeddings they have, and answers that are those of `search`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.data.decoding import open_picture
from grappa_dist.export import load_model
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.nearest import nearest
from grappa_dist.retrieval.opening import open_model
from grappa_dist.retrieval.search import search
from grappa_dist.serving.searcher import Answer, Column, Searcher, open_columns
from tests.retrieval.photos import embedder, model_in, write_photos
from tests.serving.served import world_in


def test_a_batch_has_the_hits_of_search_and_the_weights_of_the_model(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    names = ["anemone/0.png", "cat/3.png", "cat/0.png"]
    pictures = [open_picture(world.file(name)) for name in names]
    answers = world.searcher.answer([world.searcher.query(p, 2 + n) for n, p in enumerate(pictures)])
    model = load_model(tmp_path / "run")
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert isinstance(answer, Answer)
        for column, hits in zip(world.searcher.columns, answer.hits, strict=True):
            with_model = Embedder(column.model, Console())
            query = str(tmp_path / "photos" / name)
            (expected,) = search([query], column.collection, with_model, k=2 + number).answers
            assert (hits[0].row, hits[0].name) == (expected.hits[0].row, name)
            assert [hit.cosine for hit in hits] == pytest.approx([hit.cosine for hit in expected.hits], abs=1e-5)
        pixels = torch.from_numpy(model.transform.preprocess.test(pictures[number])).permute(2, 0, 1)[None] / 255
        assert answer.weights is not None
        np.testing.assert_allclose(answer.weights, model.attention(pixels)[0].numpy(), atol=1e-5)


def test_both_models_keep_their_embeddings_and_the_second_start_embeds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos")
    keep, images = tmp_path / "keep", [str(tmp_path / "photos")]
    model = embedder(model_in(tmp_path / "run"))
    first = open_columns(model, images, keep)
    assert sorted(path.name.rpartition("-")[0] for path in keep.iterdir()) == ["backbone", "neighbours"]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("grappa_dist.retrieval.embedding.embed_rows", refused)
    second = open_columns(model, images, keep)
    for a, b in zip(first.columns, second.columns, strict=True):
        np.testing.assert_array_equal(np.concatenate(a.collection.rows), np.concatenate(b.collection.rows))


def test_a_backbone_alone_has_one_column_and_no_weights(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    adapted = embedder(model_in(tmp_path / "run"))
    bare = replace(adapted, model=adapted.model.backbone())
    searcher = open_columns(bare, [str(tmp_path / "photos")], None)
    picture = open_picture((tmp_path / "photos" / "cat" / "0.png").read_bytes())
    (answer,) = searcher.answer([searcher.query(picture, 3)])
    assert isinstance(answer, Answer)
    assert (len(answer.hits), answer.weights, searcher.sets) == (1, None, ())


def test_features_that_are_not_finite_are_the_failure_of_their_query(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    (backbone, adapted) = world.searcher.columns
    picture = open_picture(world.file("cat/0.png"))
    broken = open_model(tmp_path / "run")
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    searcher = Searcher((backbone, replace(adapted, model=broken)))
    (answer,) = searcher.answer([searcher.query(picture, 3)])
    assert "not finite" in str(answer)


def test_an_index_is_asked_in_place_of_the_exact_search(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    (column, _) = world.searcher.columns
    asked = list[int]()

    def find(queries, k):  # type: ignore[no-untyped-def]
        asked.append(k)
        return nearest(queries, column.collection.rows, column.collection.bad, k, torch.device("cpu"))

    searcher = Searcher((Column(column.model, column.collection, find),))
    (answer,) = searcher.answer([searcher.query(open_picture(world.file("cat/0.png")), 3)])
    assert isinstance(answer, Answer)
    assert (asked, answer.hits[0][0].name) == ([3], "cat/0.png")


def test_folders_without_an_image_that_can_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="there is nothing to search: none of 1 images could be read"):
        open_columns(embedder(model_in(tmp_path / "run")), [str(tmp_path / "photos")], None)
