"""What entries of `data.train` and the files of a folder name: ranges in braces, and files that are no shards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import islice

from braceexpand import braceexpand

MOST_NAMES = 10**6  # that one entry may stand for
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", re.ASCII)
_COPY = "(?:copy of )?{}(?:[ (].*)?"  # how file managers name the copy of a file: x (copy), x copy 2, x - Copy (1)
_SHOWN = 5


def expand_braces(entry: str) -> list[str]:
    """What an entry in WebDataset's notation stands for, such as x-{000..127}.tar or {a,b}/x.tar; else the entry.

    Raises:
        ValueError: it stands for too many names.
    """
    if "{" not in entry:
        return [entry]
    number = math.prod(abs(int(last[:20]) - int(first[:20])) + 1 for first, last in _RANGE.findall(entry))
    try:
        names = list(islice(braceexpand(entry), MOST_NAMES + 1)) if number <= MOST_NAMES else []
    except ValueError:  # a brace without its other: part of a name
        return [entry]
    if not 0 < len(names) <= MOST_NAMES:
        raise ValueError(f"shards: {entry:.200} stands for more than {MOST_NAMES} names; expected fewer")
    return names


def is_shard_name(name: str) -> bool:
    """Whether a file of a folder is a shard by its name; hidden ones, such as `._x.tar`, are other programs'."""
    return name.endswith(".tar") and not name.startswith(".")


def resembles_shard(name: str) -> bool:
    """Whether a name that is none of a shard says that something of one is there: x.tar~, x.tar.part, ._x.tar."""
    return ".tar" in name.lower() and not is_shard_name(name) and not name.endswith(".npy")


def is_named_like_a_copy(name: str, of: str) -> bool:
    """Whether a tar has the name that a file manager gives to a copy of another one."""
    pattern = _COPY.format(re.escape(of.removesuffix(".tar")))
    return name != of and re.fullmatch(pattern, name.removesuffix(".tar"), re.IGNORECASE | re.DOTALL) is not None


def describe_passed_over(folder: str, names: Iterable[str], why: str) -> str:
    """A line about entries of a folder that are not read; "" without any."""
    names = sorted(names)
    shown = ", ".join(f"{name!r:.100}" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"passed over in {folder}, {why}: {shown}{more}" if names else ""


def copies_among(tars: Sequence[tuple[str, str]]) -> list[int]:
    """The places of the tars that are copies, by name and bytes, of another one.

    Args:
        tars: name and fingerprint of those of one folder.
    """
    by_bytes: dict[str, list[int]] = {}
    for place, (_, fingerprint) in enumerate(tars):
        by_bytes.setdefault(fingerprint, []).append(place)
    return [
        place
        for same in by_bytes.values()
        for place in same
        if any(is_named_like_a_copy(tars[place][0], tars[other][0]) for other in same)
    ]
