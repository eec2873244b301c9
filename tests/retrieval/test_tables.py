"""Parquet files of embeddings: what they hold, which are written again, and a vector database that reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as datasets
import pytest
from pyarrow import parquet

from grappa_dist.console import Console
from grappa_dist.files import Sum, write_json
from grappa_dist.retrieval import tables
from grappa_dist.retrieval.index import build_index, open_index
from tests.retrieval.embedded import BAD, CHANNELS, EACH, write_embeddings
from tests.test_artifacts import flip


def built(folder: Path) -> dict[str, Any]:
    """The list of the folder's index."""
    return json.loads(build_index(folder, folder / "model", Console()).read_text())


def content(folder: Path) -> list[dict[str, Any]]:
    files = [folder / "search" / table["path"] for table in built(folder)["tables"]]
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def test_every_image_with_an_embedding_is_a_row_with_its_id_key_name_task_and_vector(tmp_path: Path) -> None:
    write_embeddings(tmp_path, [0, 1], gone={1: [0, 5]})
    listed = json.loads((tmp_path / "embeddings.json").read_text())
    tasks, names = [None, "birds"] * (EACH // 2), ["caf\udce9.png", *[f"{place}.png" for place in range(1, EACH)]]
    for what, values in (("tasks", tasks), ("names", names)):
        write_json(tmp_path / f"{what}.json", values)
        listed["shards"][0] |= {what: f"{what}.json"}
        listed["shards"][0]["xxh3"] |= {what: Sum.of(tmp_path / f"{what}.json").xxh3}
    listed["shards"][1]["names"] = None
    write_json(tmp_path / "embeddings.json", listed)
    rows = content(tmp_path)
    places = [*range(EACH), *range(EACH)]
    expected = [i for i, place in enumerate(places) if place != BAD and i not in (EACH, EACH + 5)]
    assert [row["id"] for row in rows] == expected
    assert [row["key"] for row in rows] == [f"{places[i]:09d}" for i in expected]
    assert [row["task"] for row in rows] == [tasks[i] if i < EACH else None for i in expected]
    assert [row["name"] for row in rows][:3] == ["caf\N{REPLACEMENT CHARACTER}.png", "1.png", "2.png"]
    assert {row["name"] for row in rows[EACH:]} == {None}
    index = open_index(tmp_path)
    vectors = np.array([row["vector"] for row in rows], np.float32)
    assert vectors.shape == (2 * EACH - 4, CHANNELS)
    good = [row for row in range(len(index.collection)) if row not in index.collection.bad]
    assert np.array_equal(vectors, np.concatenate(index.collection.rows)[good])
    (file,) = (tmp_path / "search").glob("*.parquet")
    assert str(parquet.read_schema(file).field("vector").type) == f"fixed_size_list<element: float>[{CHANNELS}]"


def test_files_whose_rows_are_the_same_are_kept_and_damaged_ones_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "TABLE_ROWS", 2 * EACH)
    first = built(write_embeddings(tmp_path, range(5)))["tables"]
    assert [table["rows"] for table in first] == [2 * EACH - 2, 2 * EACH - 2, EACH - 1]
    write_embeddings(tmp_path, range(6), gone={2: [7]})
    second = built(tmp_path)["tables"]
    assert second[0] == first[0]
    assert [table["rows"] for table in second] == [2 * EACH - 2, 2 * EACH - 3, 2 * EACH - 2]
    assert not {table["path"] for table in second[1:]} & {table["path"] for table in first}
    files = {path.name for path in (tmp_path / "search").glob("*.parquet")}
    assert files == {table["path"] for table in second}
    flip(tmp_path / "search" / second[1]["path"], -3)
    third = built(tmp_path)["tables"]
    assert [third[0], third[2]] == [second[0], second[2]]
    assert third[1]["path"] != second[1]["path"]
    assert third[1]["xxh3"] == second[1]["xxh3"]
    assert built(tmp_path)["tables"] == third


def test_without_pyarrow_the_index_is_built_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert built(write_embeddings(tmp_path, [0]))["tables"] == []
    assert "no parquet is written: needs pyarrow: pip install 'grappa-dist[parquet]'" in capsys.readouterr().err
    assert len(built(tmp_path)["tables"]) == 1


@pytest.mark.slow
def test_a_vector_database_of_these_files_finds_what_the_index_finds(tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    built(write_embeddings(tmp_path, range(4), gone={1: [2]}))
    index = open_index(tmp_path)
    files = datasets.dataset(sorted((tmp_path / "search").glob("*.parquet")))
    table = lancedb.connect(tmp_path / "lance").create_table("photos", files.scanner().to_reader())
    queries = np.concatenate(index.collection.rows)[[0, 50, 100]] + np.float32(0.01)
    found = index.nearest(queries, 5)
    for query, rows, cosines in zip(queries, found.rows.tolist(), found.cosines.tolist(), strict=True):
        hits = table.search(query).distance_type("dot").limit(5).to_list()
        assert [hit["name"] for hit in hits] == [index.collection.name(row) for row in rows]
        assert [1 - hit["_distance"] for hit in hits] == pytest.approx(cosines, abs=1e-5)
