"""What an entry of `data.train` names, told from its name and, for a folder, from the files in it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Literal

from grappa_dist.data.decoding import TAKEN
from grappa_dist.data.entries import is_shard_name
from grappa_dist.data.index import COMMITTED
from grappa_dist.inputs.tables import ARROW, PARQUET, is_saved
from grappa_dist.make_shards.lists import LINES
from grappa_dist.make_shards.sources import FOREIGN
from grappa_dist.object_store import is_remote

Kind = Literal["shards", "folder", "table", "list"]
_LISTS = (".csv", ".tsv", LINES)
_LOOKED_AT = 10_000  # entries below a folder, at most


def kind_of(entry: str) -> Kind:
    """What an entry is: shards, a folder of images, a table with images, or a list of images.

    All that is none of ours counts as shards, whose errors say what is expected. A folder with tars is one of shards,
    whatever else lies in it: programs that write shards leave parquet, JSON and other files there.
    """
    if is_remote(entry):
        return "shards"
    if os.path.isdir(entry):
        return _kind_of_folder(entry)
    if entry.endswith((PARQUET, ARROW)):
        return "table"
    return "list" if entry.endswith(_LISTS) else "shards"


def _kind_of_folder(folder: str) -> Kind:
    names = os.listdir(folder)
    if COMMITTED in names or any(map(is_shard_name, names)):
        return "shards"
    if is_saved(folder):
        return "table"
    images = tables = 0
    for path in islice(_files(folder), _LOOKED_AT):
        if is_shard_name(os.path.basename(path)):
            return "shards"  # one level or more below: an error names these folders
        images += path.lower().endswith(tuple(f".{suffix}" for suffix in TAKEN))
        tables += path.endswith(PARQUET)
    if not images and not tables:
        return "shards"
    return "folder" if images > tables else "table"  # a picture or two beside tables belongs to a description of them


def _files(folder: str) -> Iterator[str]:
    """The files below a folder, nearer ones first, without hidden ones and those of the system."""
    folders, seen = deque([folder]), {os.path.realpath(folder)}
    while folders:
        with suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in FOREIGN:
                    continue
                if not entry.is_dir():
                    yield entry.path
                elif (real := os.path.realpath(entry.path)) not in seen:
                    seen.add(real)
                    folders.append(entry.path)
