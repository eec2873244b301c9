"""How much of a batch, and how many adaptor sets, the memory of a worker holds: arithmetic, without a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Room:
    """What training may take of one worker's memory, and what an image takes of it."""

    usable_bytes: int
    image_bytes: int  # of all adaptor sets that were counted, at the most at one time

    def images(self, most: int) -> int:
        """How many images at a time, from 1 to `most`."""
        return max(1, min(most, self.usable_bytes // self.image_bytes)) if self.image_bytes else most

    def sets(self, set_bytes: Sequence[int], images: Callable[[int], int]) -> int:
        """How many sets a job may train, at least 1, whichever sets they are: those that take most count first.

        Args:
            set_bytes: what each set takes whatever the batch: its classifier's part of a rank.
            images: how many are trained on at a time by a job of so many sets.
        """
        largest = accumulate(sorted(set_bytes, reverse=True))  # what the first set takes, the first two, ...
        taken = (own + num * images(num) * self.image_bytes for num, own in enumerate(largest, start=1))
        return max((num for num, size in enumerate(taken, start=1) if size <= self.usable_bytes), default=1)


def even_size(count: int, most: int) -> int:
    """The size of the fewest parts of at most `most` of `count` items, as alike as can be; the last may be smaller."""
    parts = -(-count // most)
    return -(-count // parts) if parts else most
