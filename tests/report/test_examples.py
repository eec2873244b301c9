"""The images that the report shows: neighbours as the scores count them, names of files, thumbnails."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grappa_dist.artifacts import RowArrays
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.report import examples
from grappa_dist.report.examples import THUMBNAIL_PX, Pictures, nearest_rows


def features(tmp_path: Path, sizes: tuple[int, ...]) -> tuple[RowArrays, np.ndarray]:
    """Unit rows in files of uneven size, among them equal ones; and all of them."""
    z = np.random.default_rng(0).standard_normal((sum(sizes), 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    z[7] = z[3]
    starts = np.cumsum([0, *sizes])
    paths = [tmp_path / f"{i}.npy" for i in range(len(sizes))]
    for path, first, last in zip(paths, starts, starts[1:], strict=False):
        np.save(path, z[first:last])
    return RowArrays.of(paths, starts), z


@pytest.mark.parametrize("block_rows", [1, 4, 1000])
def test_neighbours_are_the_nearest_rows_of_the_task_without_the_query(
    block_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "BLOCK_ROWS", block_rows)
    stored, z = features(tmp_path, (5, 1, 14))
    rows, queries = np.setdiff1d(np.arange(20), [2, 11]), np.array([3, 0, 19])
    found = nearest_rows(stored, rows, queries, 4)
    for query, near in zip(queries, found, strict=True):
        others = rows[rows != query]
        cosines = z[others] @ z[query]
        expected = others[np.argsort(-cosines, kind="stable")[:4]]
        assert [row for row, _ in near] == expected.tolist()
        assert [cosine for _, cosine in near] == pytest.approx(np.sort(cosines)[::-1][:4])
    assert found[0][0][0] == 7  # its twin


def test_of_a_small_task_all_others_are_neighbours(tmp_path: Path) -> None:
    stored, _ = features(tmp_path, (20,))
    assert [len(near) for near in nearest_rows(stored, np.array([4, 9]), np.array([4, 9]), 5)] == [1, 1]


def test_pictures_are_small_and_named_by_their_files_or_else_by_their_keys(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(buffer, "JPEG")
    with ShardWriter(tmp_path / "images") as writer:
        writer.write(buffer.getvalue(), "jpg", name="birds/jay.jpg")
        writer.write(buffer.getvalue(), "jpg")
    pictures = Pictures(ImageShards.open([tmp_path / "images"], None))
    assert [pictures.name(row) for row in (0, 1)] == ["birds/jay.jpg", "000000001"]
    assert Image.open(io.BytesIO(pictures.thumbnail(0))).size == (THUMBNAIL_PX, THUMBNAIL_PX // 2)
    assert pictures.thumbnail(1) is pictures.thumbnail(1)
