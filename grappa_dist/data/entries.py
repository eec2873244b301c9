"""What entries of `data.train` and the files of a folder name: ranges in braces, and files that are no shards."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from braceexpand import braceexpand

MOST_NAMES = 10**6  # that one entry may stand for
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", re.ASCII)
_COPY_OF, _BEHIND_A_NAME = "copy of ", " ("  # how file managers name the copy of a file: x (copy), x - Copy (1)
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
    return name != of and stem_of(of) in originals_of(name)


def describe_passed_over(folder: str, names: Iterable[str], why: str) -> str:
    """A line about entries of a folder that are not read; "" without any."""
    names = sorted(names)
    shown = ", ".join(f"{name!r:.100}" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"passed over in {folder}, {why}: {shown}{more}" if names else ""


def copies_among(tars: Sequence[tuple[str, str]]) -> list[int]:
    """The places of the tars that are copies, by name and bytes, of another one; in time linear in their number.

    Args:
        tars: name and fingerprint of those of one folder.
    """
    alike = Counter(fingerprint for _, fingerprint in tars)
    stems = {(fingerprint, stem_of(name)) for name, fingerprint in tars if alike[fingerprint] > 1}
    return [
        place
        for place, (name, fingerprint) in enumerate(tars)
        if alike[fingerprint] > 1 and any((fingerprint, stem) in stems for stem in originals_of(name))
    ]


def originals_of(name: str) -> list[str]:
    """The stems, in small letters, of the tars of which one may be a copy by its name (`is_named_like_a_copy`).

    Its own is none of them: of two tars whose names differ in capital letters alone, neither is a copy.
    """
    stem, found = stem_of(name), list[str]()
    for text in dict.fromkeys((stem, stem.removeprefix(_COPY_OF))):
        found += [text[:end] for end, letter in enumerate(text) if letter in _BEHIND_A_NAME]
        found += [text] if text != stem else []
    return found


def stem_of(name: str) -> str:
    return name.removesuffix(".tar").lower()
