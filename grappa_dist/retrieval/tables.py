"""Embeddings as parquet, which vector databases read: id, key, name, task and vector of every image that has one.

A file holds the rows of shards that follow each other, some TABLE_ROWS, and is kept while these are the same. Rows are
written from where they are mapped. Shapes: P rows of a shard, D channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from grappa_dist.files import Sum, replace
from grappa_dist.retrieval.collection import Part, texts_in

TABLE_ROWS, GROUP_ROWS = 65_536, 8192  # of a file, and of what is written of it at a time
COLUMNS = {"key": "keys", "name": "names", "task": "tasks"}  # and the file of a shard that has them
Entry = Mapping[str, Any]  # a shard as an index lists it
Shard = tuple[Entry, tuple[Part, ...]]
Ids = NDArray[np.int64]


def write_tables(
    folder: Path, home: Path, shards: Sequence[Shard], before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Writes the files that are missing into a folder; the list of all: path, rows, size, checksum, and `of`, a
    checksum of what the rows are of.

    Args:
        home: what the paths of the shards begin at.
        before: the list of an earlier call.
    """
    known = {table["of"]: dict(table) for table in before}
    listed = []
    for group in _grouped(shards):
        of = _mark(group)
        if of in known and _is_whole(folder / known[of]["path"], known[of]):
            listed.append(known[of])
            continue
        file, rows = folder / f"images-{os.urandom(8).hex()}.parquet", 0

        def write(temporary: Path, group: Sequence[Shard] = group) -> None:
            nonlocal rows
            rows = _write(temporary, home, group)

        replace(file, write)
        if rows:
            listed.append({"path": file.name, "rows": rows, **asdict(Sum.of(file)), "of": of})
        else:  # all images of these shards are bad
            file.unlink()
    return listed


def _grouped(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    group, rows = list[Shard](), 0
    for shard in shards:
        group.append(shard)
        rows += shard[0]["images"]
        if rows >= TABLE_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _mark(group: Sequence[Shard]) -> str:
    """What tells the rows of some shards from those of others."""
    return xxh3_128_hexdigest(
        json.dumps([[e["first_id"], e.get("xxh3", {}), e.get("gone", [])] for e, _ in group]).encode()
    )


def _is_whole(path: Path, listed: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == listed["bytes"] and Sum.of(path).xxh3 == listed["xxh3"]


def _write(path: Path, home: Path, group: Sequence[Shard]) -> int:
    """Writes the rows of some shards; how many these are."""
    import pyarrow as pa
    from pyarrow import parquet

    channels = next(part.rows.shape[1] for _, parts in group for part in parts)
    vector = pa.list_(pa.float32(), channels)
    texts = [(name, pa.string()) for name in COLUMNS]
    schema = pa.schema([("id", pa.int64()), *texts, ("vector", vector)])
    pieces = []
    for entry, part, places in _pieces(group):
        columns = [pa.array([_utf8(values[i]) for i in places], pa.string()) for values in _texts(home, entry)]
        flat = pa.array(_rows_at(part, places).reshape(-1))
        arrays = [pa.array(places + entry["first_id"]), *columns, pa.FixedSizeListArray.from_arrays(flat, type=vector)]
        pieces.append(pa.Table.from_arrays(arrays, schema=schema))
    table = pa.concat_tables(pieces) if pieces else schema.empty_table()  # the rows stay where they are mapped
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=["task"]) as writer:
        writer.write_table(table, row_group_size=GROUP_ROWS)
    return int(table.num_rows)


def _pieces(group: Sequence[Shard]) -> Iterator[tuple[Entry, Part, Ids]]:
    """The parts of some shards, and the positions in the shard of the images that have an embedding."""
    for entry, parts in group:
        for part in parts:
            good = np.setdiff1d(np.arange(len(part.rows)), list(part.bad), assume_unique=True)
            if len(good):
                yield entry, part, good + part.first


def _rows_at(part: Part, places: Ids) -> NDArray[np.float32]:
    return part.rows if len(places) == len(part.rows) else part.rows[places - part.first]


def _texts(home: Path, entry: Entry) -> list[Sequence[str | None]]:
    """The columns of a shard, by position."""
    nothing = [None] * entry["images"]
    return [
        nothing if entry.get(what) is None else texts_in(home / entry[what], len(nothing)) for what in COLUMNS.values()
    ]


def _utf8(text: str | None) -> str | None:
    """A text of parquet; bytes of a name that are not UTF-8 are shown as such."""
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
