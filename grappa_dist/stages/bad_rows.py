"""Rows that do not decode: counted, named and left out, from the lists that `embed` writes for each shard.

Most shards have none, and their lists are not opened: a manifest tells how long a list is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import nsmallest

import numpy as np
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, finished
from grappa_dist.checksums import load_json
from grappa_dist.console import pluralize
from grappa_dist.data.index import count_missing, describe_missing
from grappa_dist.data.shards import ImageShards

BAD_FILE = "bad.json"  # of features of a shard: {position: reason}
CHECK_INTERVAL_S = 5.0  # between counts of the bad rows of finished shards
NAMED_BAD = 3  # bad rows that the error names
_READ_AT_ONCE = 8  # lists of bad rows: many small files, which take long on a network file system
_TOGETHER = 64  # shards that a thread looks at before it takes others
_EMPTY_BYTES = len("{}\n")  # of a list of none


class BadRows(Mapping[int, str]):
    """Why rows are bad, by row id in ascending order: 12 bytes a row, and each reason once.

    Args:
        rows: (n,) ascending.
        whys: why each is.
    """

    def __init__(self, rows: Sequence[int] | NDArray[np.int64], whys: Iterable[str]) -> None:
        known = dict[str, int]()
        self.rows = np.asarray(rows, dtype=np.int64)
        self._kinds = np.fromiter((known.setdefault(why, len(known)) for why in whys), np.int32, len(self.rows))
        self._reasons = tuple(known)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.rows)

    def __getitem__(self, row: int) -> str:
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise KeyError(row)
        return self._reasons[self._kinds[place]]

    def without(self, rows: frozenset[int]) -> BadRows:
        """Those that are not among some others."""
        kept = [(row, why) for row, why in self.items() if row not in rows] if rows else None
        return self if kept is None else BadRows([row for row, _ in kept], [why for _, why in kept])


def bad_reasons(images: ImageShards, features: Sequence[Artifact]) -> BadRows:
    """Why rows are bad, over all shards.

    Raises:
        DamagedArtifact: a list is not what was written.
    """
    found = _read(images, enumerate(features))
    return BadRows([row for row, _ in found], (why for _, why in found))


def bad_rows(images: ImageShards, features: Sequence[Artifact]) -> NDArray[np.int64]:
    """Sorted ids of the rows that are bad."""
    return bad_reasons(images, features).rows


def _read(images: ImageShards, features: Iterable[tuple[int, Artifact]]) -> list[tuple[int, str]]:
    """Row and reason of what is bad in shards, given with their numbers, in this order."""
    firsts = images.starts

    def of_some(some: Sequence[tuple[int, Artifact]]) -> list[tuple[int, str]]:
        lists = [(int(firsts[shard]), _list_of(artifact)) for shard, artifact in some]
        return [(first + position, why) for first, found in lists for position, why in sorted(found.items())]

    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return [one for part in pool.map(of_some, _in_parts(features)) for one in part]


def _in_parts(features: Iterable[tuple[int, Artifact]]) -> Iterator[tuple[tuple[int, Artifact], ...]]:
    left = list(features)
    return (tuple(left[start : start + _TOGETHER]) for start in range(0, len(left), _TOGETHER))


def _list_of(artifact: Artifact) -> dict[int, str]:
    """Position and reason of what is bad in one shard."""
    listed = artifact.files.get(BAD_FILE)
    if listed is not None and listed.bytes <= _EMPTY_BYTES:
        return {}
    return {int(position): why for position, why in load_json(artifact.path / BAD_FILE).items()}


class EarlyCheck:
    """Stops a run as soon as it is certain that too many rows are bad, not only when all are embedded."""

    def __init__(
        self, images: ImageShards, features: Sequence[Artifact], limit: float, gone: frozenset[int] = frozenset()
    ) -> None:
        self._images, self._limit, self._gone = images, limit, gone
        self._left = dict(enumerate(features))
        self._bad: dict[int, str] = {}
        self._rows = 0  # of the shards that were counted
        self._checked = time.monotonic()

    def check(self) -> None:
        """Counts the shards that have been finished, CHECK_INTERVAL_S after it last did so.

        Raises:
            ValueError: as `check_bad_share`.
        """
        if time.monotonic() - self._checked < CHECK_INTERVAL_S:
            return
        self._checked = time.monotonic()
        done = [shard for shard, is_done in zip(self._left, finished(self._left.values()), strict=True) if is_done]
        found = _read(self._images, [(shard, self._left.pop(shard)) for shard in done])
        self._bad |= {row: why for row, why in found if row not in self._gone}
        self._rows += sum(self._images.shards[shard].rows for shard in done)
        check_bad_share(self._images, self._bad, self._limit, rows=self._rows)


def check_bad_share(images: ImageShards, bad: Mapping[int, str], limit: float, rows: int | None = None) -> None:
    """Compares the bad rows, and the missing images that have no row, with the share that is allowed.

    Args:
        rows: how many rows were checked, if not all; the share that the error names assumes that the others are alike.

    Raises:
        ValueError: they are more.
    """
    missing = count_missing(images.shards)
    count, total = len(bad) + missing, len(images) + missing
    if count <= limit * total:
        return
    kinds = Counter(why.partition(":")[0].partition(" (")[0] for why in bad.values()).most_common(3)
    first = "; ".join(f"{images.where(row)}: {bad[row]}" for row in nsmallest(NAMED_BAD, bad))
    counts = [f"{n} x {why}" for why, n in kinds] + [f"about {missing} have no row"] * (missing > 0)
    so_far = f", of {rows} looked at so far" if rows is not None and rows < len(images) else ""
    checked = rows if so_far and rows else len(images)
    expected = len(bad) * len(images) + missing * checked  # bad and missing images of all, times `checked`
    enough = min(1.0, (100 * expected // (checked * total) + 1) / 100 if checked else 1.0)
    unless = ", unless more of the others are bad," if so_far else ""
    kept = f". What is embedded is kept, and{unless} reused with data.max_bad_share={enough}"
    raise ValueError(
        f"embed: {count} of {pluralize(total, 'image')} are bad{so_far} ({', '.join(counts)}), "
        f"data.max_bad_share={limit} allows {limit * total:.0f}. "
        f"The first: {'; '.join([first] * bool(bad) + list(describe_missing(images.shards)))}. "
        "Mend or leave out these shards, or raise data.max_bad_share: bad images take no part in anything"
        f"{kept if bad else ''}"
    )
