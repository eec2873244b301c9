"""Where one shard ends and the next begins, decided before any is written. Shapes: n images in the order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", re.IGNORECASE)
_RECORD = 10240  # a tar ends with two empty blocks and is filled up to whole records
_END = 1024


def parse_bytes(text: str) -> int:
    """A number of bytes such as 500MB, 1.5GiB or 1000000."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes; expected one such as 500MB, 2GiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def tar_size(content: int) -> int:
    """Size of a tar whose members take `content` bytes with their headers."""
    return -(-(content + _END) // _RECORD) * _RECORD


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
