"""Batches of images, read ahead in threads: decoding and resizing release the interpreter lock.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.decoding import BadImage, Picture, Pixels, open_picture
from grappa_dist.prefetch import Prefetched, Threads, prefetch, threads_here

Job = TypeVar("Job")
Result = TypeVar("Result")
Make = Callable[[Picture, int], Pixels]  # image and row id -> the pixels of that row, all of one shape


class Images(Protocol):
    """Images by row id: shards (data/shards.py), or files that lie in folders (retrieval/images.py)."""

    def __len__(self) -> int: ...

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The image files of some rows, or why one is bad, in their order."""

    def where(self, row: int) -> str:
        """Where the image of a row lies, for messages."""

    def name(self, row: int) -> str:
        """The name of a row's file; "" where it is not known."""

    def key(self, row: int) -> str:
        """The name of a row in its shard, or of its file."""

    def labels(self, row: int) -> dict[str, Any] | None:
        """What is noted of a row, such as `label` and `task`."""


def read_batches(
    jobs: Iterable[Job], read: Callable[[Job], Result], *, threads: Threads, depth: int | None = None
) -> Prefetched[Result]:
    """read(job) of every job, in their order, while later jobs are read in threads; closing it ends the threads.

    Args:
        threads: 0 reads in the caller's thread.
        depth: results under way or waiting to be taken, at most; twice the threads by default.
    """
    count = threads_here(threads)
    if count < 0 or (depth is not None and depth < 1):
        raise ValueError(f"threads must be at least 0 and depth at least 1, got {count} and {depth}")
    if not count:
        return Prefetched((read(job) for job in jobs), deque())
    return prefetch(read, jobs, threads=count, depth=depth or 2 * count)


def load_or_skip(
    images: Images,
    rows: Sequence[int] | NDArray[np.int64],
    make: Make,
    shape: tuple[int, ...],
    *,
    into: Pixels | None = None,
) -> tuple[Pixels, dict[int, str]]:
    """What `make` makes of each row, (B, *shape), and why for the rows that do not decode; those are black.

    Args:
        into: memory for it, (B, *shape), whatever is in it.
    """
    pixels = np.empty((len(rows), *shape), dtype=np.uint8) if into is None else into
    reasons: dict[int, str] = {}
    numbers = [int(row) for row in rows]
    for line, row, data in zip(pixels, numbers, images.images(numbers), strict=True):
        try:
            if isinstance(data, BadImage):
                raise data
            line[...] = make(open_picture(data), row)
        except BadImage as error:
            line[...] = 0
            reasons[row] = str(error)
    return pixels, reasons


def load_images(
    images: Images,
    rows: Sequence[int] | NDArray[np.int64],
    make: Make,
    shape: tuple[int, ...],
    *,
    into: Pixels | None = None,
) -> Pixels:
    """What `make` makes of each row, (B, *shape), where every row is known to decode.

    Args:
        into: as of `load_or_skip`.
    """
    pixels, reasons = load_or_skip(images, rows, make, shape, into=into)
    for row, reason in reasons.items():
        raise ValueError(f"{images.where(row)} (row {row}) does not decode: {reason}")
    return pixels
