"""Images that have no row: those behind the damage of a tar, and those whose names give them no key of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from grappa_dist.data.index import Lost, Shard

BEHIND = "lost behind the place from which on the shard is damaged or cut off, as an estimate"
MISNAMED = "a further dot in its name, which ends a key at the first one, and no image of just that key: rename it"
_SHOWN = 3  # shards of a kind that are named in words


@dataclass(frozen=True)
class Loss:
    """Some images of a shard without a row, for a list of what is bad."""

    shard: Shard
    key: str  # a member's name; "" where none is known
    reason: str
    images: int


def lost_images(shards: Sequence[Shard]) -> int:
    """How many images have no row, as far as one can say."""
    return sum(shard.lost.images for shard in shards)


def losses_of(shards: Sequence[Shard]) -> Iterator[Loss]:
    """What is lost by shard, the first of the names one by one."""
    for shard in shards:
        lost = shard.lost
        if lost.behind:
            yield Loss(shard, "", BEHIND, lost.behind)
        yield from (Loss(shard, name, MISNAMED, 1) for name in lost.names)
        if lost.misnamed > len(lost.names):
            yield Loss(shard, "and others", MISNAMED, lost.misnamed - len(lost.names))


def losses_in_words(shards: Sequence[Shard]) -> Iterator[str]:
    """A line for each way in which images are lost, with the first shards and what to do; none where none are."""
    damaged, said = _those(shards, lambda lost: lost.behind)
    if damaged:
        yield (
            f"about {damaged} images are lost in {said}: damaged, or cut off, after the rows that are read; "
            "fetch or make these shards again"
        )
    misnamed, said = _those(shards, lambda lost: lost.misnamed)
    if misnamed:
        name = next(name for shard in shards for name in shard.lost.names)
        stem, _, suffix = name.rpartition(".")
        folder, slash, base = stem.rpartition("/")
        right = f"{folder}{slash}{base.replace('.', '_')}.{suffix}"
        yield (
            f"{misnamed} images are left out in {said}: a key ends at the first dot of a name, and theirs have no "
            f"image of just that key; rename {name!r:.200} to {right!r:.200}, and so on"
        )


def _those(shards: Sequence[Shard], count: Callable[[Lost], int]) -> tuple[int, str]:
    """How many images are lost in one way, and where."""
    of = [shard for shard in shards if count(shard.lost)]
    more = f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else ""
    return sum(count(shard.lost) for shard in of), ", ".join(shard.path for shard in of[:_SHOWN]) + more
