"""The index beside tars, a list of the shards and a .npy of rows for each, read without trust in who wrote it."""

from __future__ import annotations

import os
import tarfile
import tokenize
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.index import ROW, OpenFile, Shard, refusal, shard_of
from grappa_dist.files import parse_json

REMADE = "; remove it, and it is made or fetched again"
# What numpy's reader of headers may raise
_UNREADABLE = (ValueError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)


def read_index(text: bytes, where: Path | str) -> list[Shard]:
    """The shards that the index file `where`, local or remote, says lie beside it; their paths are empty.

    Raises:
        ValueError: it is no such file.
    """
    content = parse_json(text, where)
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{where}: not an index of shards; expected an object with a list `shards`")
    shards = [shard_of(line, "", where) for line in content["shards"]]
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: has two shards of one name; expected each once")
    return shards


def read_rows(file: IO[bytes], shard: Shard, where: str, *, remedy: str = "") -> NDArray[Any]:
    """The rows that an index file `where` has of a shard, (P,) of ROW: mapped if it is a local file, else in memory.

    Args:
        remedy: what may be done about a file that is refused, as the end of the message.

    Raises:
        ValueError: it is no such file, or that of another shard as far as its length tells.
    """
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except _UNREADABLE as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not an index of a shard: {type(error).__name__}: {said}{remedy}") from None
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    if dtype != ROW or shape != (shard.rows,) or size != shard.rows * ROW.itemsize:
        raise ValueError(
            f"{where}: an array of {dtype}, shape {shape}, in {size} bytes, but {shard.path} needs {shard.rows} rows "
            f"of {ROW.itemsize} bytes; it is cut off, or the index of another shard{remedy}"
        )
    if isinstance(file, BufferedReader):
        return np.memmap(file, dtype=ROW, mode="r", offset=start, shape=shape)
    file.seek(start)
    return np.frombuffer(file.read(size), dtype=ROW)


def check_places(rows: NDArray[Any], shard: Shard, file: OpenFile, where: str) -> None:
    """Holds the first and the last image of an index against the headers in front of them.

    Raises:
        ValueError: there is no header of a file of that size, so this is the index of another shard.
    """
    places = [place for place in (rows[:1], rows[-1:]) if len(place) and not refusal(place[0])]
    for offset, size in ((int(place[0]["offset"]), int(place[0]["size"])) for place in places):
        try:
            header = file.read(offset - 512, 512) if 512 <= offset <= shard.bytes else b""
            said = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            said = -1
        if said != size:
            raise ValueError(
                f"{where}: has an image of {size} bytes at {offset}, where {shard.path} has none; it is the index of "
                "another shard"
            )
