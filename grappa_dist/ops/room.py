"""How much of a batch, and how many adaptor sets, the memory of a worker holds: arithmetic, without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What training may take of one worker's memory, and what an image takes of it."""

    usable_bytes: int
    image_bytes: int  # of all adaptor sets that were counted, at the most at one time

    def images(self, most: int) -> int:
        """How many images at a time, from 1 to `most`."""
        return max(1, min(most, self.usable_bytes // self.image_bytes)) if self.image_bytes else most

    def sets(self, set_bytes: Sequence[int], images: int) -> int:
        """How many sets a job may train, at least 1, on so many images at a time.

        Whichever sets they are: those that take most are counted first.

        Args:
            set_bytes: what each set takes whatever the batch: its classifier's part of a rank.
        """
        left, count = self.usable_bytes, 0
        for own in sorted(set_bytes, reverse=True):
            left -= own + images * self.image_bytes
            if left < 0:
                break
            count += 1
        return max(1, count)


def even_size(count: int, most: int) -> int:
    """The size of the fewest parts of at most `most` of `count` items, as alike as can be; the last may be smaller."""
    parts = -(-count // most)
    return -(-count // parts) if parts else most
