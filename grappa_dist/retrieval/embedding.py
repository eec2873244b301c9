"""Images to unit embeddings in this process, by batches, with progress; images that do not decode are listed.

The computation is that of a run's stage embed. Memory: the rows, (n, D) float32, and the batches that are read ahead.
Shapes: n images, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import Console, pluralize
from grappa_dist.data.loader import Images
from grappa_dist.output import printable_line
from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS
from grappa_dist.retrieval.opening import OpenModel
from grappa_dist.stages.embed import Embedding, embed_rows

NAMED = 20  # images that could not be read, named in messages


@dataclass(frozen=True)
class Embedded:
    """Unit rows of images, zeros for those that do not decode, and why these do not."""

    rows: NDArray[np.float32]  # (n, D)
    bad: dict[int, str]  # by row


@dataclass(frozen=True)
class Embedder:
    """A model with how it is run."""

    model: OpenModel
    console: Console
    batch_size: int = BATCH_SIZE
    threads: int = DECODE_THREADS

    def embed(self, images: Images, rows: NDArray[np.int64] | None = None) -> Embedded:
        """Embeds some images, by default all.

        Args:
            rows: (n,) row ids.

        Raises:
            ValueError: an embedding of an image that decodes is not finite.
        """
        rows = np.arange(len(images)) if rows is None else rows
        found = np.zeros((len(rows), self.dim), np.float32)
        bad: dict[int, str] = {}
        for start, unit, reasons in self.blocks(images, rows, 1):
            found[start : start + len(unit)] = unit
            bad |= reasons
        return Embedded(found, bad)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.model.model.embed_dim)  # type: ignore[arg-type]

    def blocks(
        self, images: Images, rows: NDArray[np.int64], size: int
    ) -> Iterator[tuple[int, NDArray[np.float32], dict[int, str]]]:
        """Embeds some images, block after block, so that not all rows need to fit into memory.

        Args:
            rows: (n,) row ids.
            size: rows of a block, rounded up to whole batches.

        Yields:
            The place in `rows`, unit rows with zeros for those that do not decode, and why these do not, by row.
        """
        if not len(rows):
            return
        how = Embedding(max(1, min(self.batch_size, len(rows))), self.threads, "--batch-size")
        batches = embed_rows(self.model.model, images, rows, device=self.model.device, how=how)
        with self.console.stage("embed", f"{self.model.variant}, {pluralize(len(rows), 'image')}"):
            counter, began = self.console.counter(f"embed {self.model.variant}", [len(rows)]), time.monotonic()
            start, parts, bad = 0, list[NDArray[np.float32]](), dict[int, str]()
            for place, unit, reasons in batches:
                parts.append(unit)
                bad |= reasons
                done = place.start + len(unit)
                counter.running([{"done": done, "seconds": time.monotonic() - began}])
                if done - start >= size or done == len(rows):
                    yield start, np.concatenate(parts), bad
                    start, parts, bad = done, [], {}


def describe_bad(bad: Sequence[tuple[str, str]], images: int, path: Path | None = None) -> Iterator[str]:
    """Lines that count the images which could not be read and name them with the reason, the first of very many.

    Args:
        bad: names of images, and why.
        images: how many were tried.
        path: a CSV that names all of them.
    """
    if not bad:
        return
    where = f"; named in {printable_line(str(path))}" if path else ""
    yield f"left out: {len(bad):,} of {pluralize(images, 'image')} could not be read{where}"
    for name, why in bad[: 0 if path else NAMED]:
        yield f"  {printable_line(name)}: {printable_line(why)}"
    if len(bad) > NAMED and not path:
        yield f"  and {len(bad) - NAMED:,} more (--left-out FILE lists all)"
