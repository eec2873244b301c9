"""The plan of a folder: what its shards hold and where each ends, decided before any is written.

Shapes: n images in the order of rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.decoding import COPIED
from grappa_dist.data.loader import read_batches
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.data.writer import member_bytes, members
from grappa_dist.make_shards.filling import Row, ShardJob
from grappa_dist.make_shards.sources import Item, as_utf8, encoded, encoder

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", re.IGNORECASE)
_RECORD = 10240  # a tar ends with two empty blocks and is filled up to whole records
_END = 1024
_CHUNK = 1024  # files whose sizes a thread asks for at a time
_THREADS = 16  # asking for sizes waits for the file system only
_SAMPLED = 2048  # images that are re-encoded to learn their size, over all tasks
_SAMPLED_PER_TASK = 64


@dataclass(frozen=True)
class Limits:
    """Where a shard ends."""

    rows: int | None
    bytes: int | None


@dataclass(frozen=True)
class FolderPlan:
    """The shards of a folder: the same plan makes the same bytes, in any number of processes."""

    folder: Path
    items: Sequence[Item]
    starts: Sequence[int]  # first row of every shard and, last, n
    image_size: int | None
    settings: dict[str, Any]
    prefixes: Mapping[Path, str]  # by source, what comes before the names of its files
    fingerprint: str

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    def job(self, number: int, partial: Path) -> ShardJob:
        first, end = self.starts[number], self.starts[number + 1]
        rows = [_row(item, self.prefixes) for item in self.items[first:end]]
        return ShardJob(str(partial), number, first, rows, self.image_size)


def plan_folder(
    folder: Path, items: Sequence[Item], limits: Limits, image_size: int | None, *, prefixes: Mapping[Path, str]
) -> FolderPlan:
    """The shards that hold the items in their order.

    Args:
        prefixes: by the path of a source, what comes before the names of its files.
    """
    sizes = file_sizes(items)
    starts = cut(_row_sizes(items, sizes, limits, image_size, prefixes=prefixes), limits.rows, limits.bytes)
    encoded_ones = {item.suffix for item in items if _is_encoded(item, image_size)}
    settings = {
        "images": len(items),
        "images_per_shard": limits.rows,
        "shard_bytes": limits.bytes,
        "image_size": image_size,
        "encoder": encoder(encoded_ones) if encoded_ones else None,
        "names": True,  # the JSON of a row holds the name of its file
    }
    files = (prefixes[item.source.path] + item.name for item in items)
    return FolderPlan(
        folder, items, starts, image_size, settings, prefixes, _fingerprint([settings, starts], items, sizes, files)
    )


def cut(sizes: Iterable[int], rows: int | None, max_bytes: int | None) -> list[int]:
    """First row of every shard and, last, n.

    Args:
        sizes: bytes of each row in a tar, with headers.
        rows: of a shard, at most; None: any number.
        max_bytes: of a tar, at most, unless one row alone is larger.
    """
    starts, held, number = [0], 0, -1
    for number, size in enumerate(sizes):
        here = number - starts[-1]
        full = rows is not None and here >= rows
        if full or (max_bytes is not None and here > 0 and tar_size(held + size) > max_bytes):
            starts.append(number)
            held = 0
        held += size
    return [*starts, number + 1]


def tar_size(content: int) -> int:
    """Size of a tar whose members take `content` bytes with their headers."""
    return -(-(content + _END) // _RECORD) * _RECORD


def _fingerprint(settings: object, items: Sequence[Item], sizes: NDArray[np.int64], files: Iterable[str]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for item, file, size in zip(items, files, sizes, strict=True):
        line = f"{file}\0{item.task}\0{item.label}\0{size}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _is_encoded(item: Item, image_size: int | None) -> bool:
    """Whether a file is not simply copied, so that its size in a shard is not known beforehand."""
    return image_size is not None or (item.suffix != "" and item.suffix not in COPIED)


def file_sizes(items: Sequence[Item]) -> NDArray[np.int64]:
    """Bytes of every file as it lies there, (n,)."""
    chunks = [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]
    sizes = np.zeros(len(items), dtype=np.int64)
    found = read_batches(chunks, lambda chunk: [item.source.size(item.name) for item in chunk], threads=_THREADS)
    for at, chunk in enumerate(found):
        sizes[at * _CHUNK : at * _CHUNK + len(chunk)] = chunk
    return sizes


def _row_sizes(
    items: Sequence[Item],
    sizes: NDArray[np.int64],
    limits: Limits,
    image_size: int | None,
    *,
    prefixes: Mapping[Path, str],
) -> Iterator[int]:
    """Bytes of every row in its tar: exact for copies, the mean of a sample of the task where images are re-encoded."""
    if limits.bytes is None:
        return iter([0] * len(items))
    means = _sampled_sizes([item for item in items if _is_encoded(item, image_size)], image_size)
    return (
        _in_tar(_row(item, prefixes), means[item.task] if _is_encoded(item, image_size) else int(size))
        for item, size in zip(items, sizes, strict=True)
    )


def _in_tar(row: Row, size: int) -> int:
    (_, _), *others = members(b"", row.suffix, row.label, row.task, name=row.name)
    return member_bytes(size) + sum(member_bytes(len(data)) for _, data in others)


def _sampled_sizes(items: Sequence[Item], image_size: int | None) -> dict[str, int]:
    """Mean bytes of a re-encoded image, by task."""
    of_task: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        of_task[item.task].append(number)
    each = max(1, min(_SAMPLED_PER_TASK, _SAMPLED // max(1, len(of_task))))
    means = {}
    for task, numbers in of_task.items():
        drawn = [items[numbers[i]] for i in permutation(len(numbers), Purpose.ENCODED_SIZES)[:each].tolist()]
        files = read_batches(drawn, lambda item: encoded(item.place.read(), item.suffix, image_size).data, threads=4)
        means[task] = sum(map(len, files)) // len(drawn)
    return means


def prefixes_of(sources: Iterable[Path], base: Path | None = None) -> dict[Path, str]:
    """What comes before the names of the files of each folder or tar, so that no two files share one.

    Nothing where there is one source; of several, its path from the deepest folder that holds them all.

    Args:
        base: that folder, where it is to be the same whichever sources there are.
    """
    paths = {source: os.path.normpath(source) for source in sources}
    above = os.path.normpath(base) if base is not None else os.path.commonpath(paths.values())
    relative = {source: os.path.relpath(path, above) for source, path in paths.items()}
    relative |= {source: "" for source, path in paths.items() if path == os.sep != above}  # of absolute names
    return {source: "" if path == "." else f"{as_utf8(path)}/" for source, path in relative.items()}


def _row(item: Item, prefixes: Mapping[Path, str]) -> Row:
    name = prefixes[item.source.path] + item.name
    return Row(item.place, item.suffix, item.label, _task_of(item), name, item.where)


def _task_of(item: Item) -> str | None:
    """The task goes into the JSON with a label only."""
    return None if item.label is None else item.task


def parse_bytes(text: str) -> int:
    """A number of bytes such as 500MB, 1.5GiB or 1000000."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes; expected one such as 500MB, 2GiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2].upper()])
