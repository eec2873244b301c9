"""Embeddings made in this process are those of the model; images that do not decode are listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grappa_dist.data.decoding import decode
from grappa_dist.export import load_model
from grappa_dist.retrieval.embedding import describe_bad
from grappa_dist.retrieval.images import open_images
from tests.retrieval.photos import embedder, model_in, write_photos


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_embeddings_are_the_models_whatever_the_batch_and_bad_images_are_zero(batch_size: int, tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos", bad=("cat/1.png",))
    Image.new("RGB", (1, 1)).save(tmp_path / "photos" / "cat" / "tiny.png")
    images = open_images([str(tmp_path / "photos")])
    found = embedder(model_in(tmp_path / "run"), batch_size).embed(images)
    bad = names.index("cat/1.png")
    assert list(found.bad) == [bad]
    assert not found.rows[bad].any()
    model = load_model(tmp_path / "run")
    good = [row for row in range(len(images)) if row != bad]
    pixels = torch.stack([model.transform(decode(data)) for data in images.images(good) if isinstance(data, bytes)])
    torch.testing.assert_close(torch.from_numpy(found.rows[good]), model(pixels), atol=1e-5, rtol=0)


def test_some_rows_or_none(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    images = open_images([str(tmp_path / "photos")])
    run = embedder(model_in(tmp_path / "run"))
    some = run.embed(images, np.array([7, 2]))
    np.testing.assert_allclose(some.rows, run.embed(images).rows[[7, 2]], atol=1e-6)
    assert run.embed(images, np.array([], dtype=np.int64)).rows.shape == (0, some.rows.shape[1])


def test_bad_images_are_counted_and_named_on_lines_of_their_own_or_in_a_file() -> None:
    assert list(describe_bad([], 9)) == []
    lines = list(describe_bad([("a\n\x1b.png", "empty file"), ("b.png", "no\nimage")], 9))
    assert lines == [
        "left out: 2 of 9 images could not be read",
        r"  a\n\x1b.png: empty file",
        r"  b.png: no\nimage",
    ]
    many = list(describe_bad([("same.png", "why")] * 25, 30))
    assert len(many) == 22
    assert many[-1] == "  and 5 more (--left-out FILE lists all)"
    path = Path("left_out.csv")
    assert list(describe_bad([("a.png", "empty file")], 9, path)) == [
        "left out: 1 of 9 images could not be read; named in left_out.csv"
    ]
