"""The nearest images of queries by cosine, exactly, a block of rows at a time.

Shapes: q queries, n rows, b rows of a block, D channels, k neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 65_536  # rows of a block
QUERIES = 256  # at a time
Rows = NDArray[np.float32]


class Found(NamedTuple):
    """The nearest rows of each query, best first."""

    cosines: Tensor  # (q, k) float32
    rows: Tensor  # (q, k) row ids


def nearest(queries: Rows, parts: Iterable[Rows], bad: Collection[int], k: int, device: torch.device) -> Found:
    """The k rows of the largest cosine with each query; of equal ones the first, and fewer where there are not k.

    Args:
        queries: (q, D) unit rows.
        parts: the rows that are searched, one after the other, (n_i, D) each, unit rows or zero.
        bad: ids of the rows that are no embeddings.
    """
    z = torch.from_numpy(queries).to(device)
    cosines = torch.empty(len(z), 0, device=device)
    ids = torch.empty(len(z), 0, dtype=torch.int64, device=device)
    left_out = np.array(sorted(bad), dtype=np.int64)
    for first, block in blocks_of(parts, BLOCK):
        rows = torch.from_numpy(block).to(device)
        inside = left_out[(left_out >= first) & (left_out < first + len(block))] - first
        good = torch.ones(len(block), dtype=torch.bool)
        good[torch.from_numpy(inside)] = False
        places = torch.nonzero(good.to(device)).flatten()
        of_parts = [_best(part @ rows.T[:, places], places + first, k) for part in z.split(QUERIES)]
        cosines = torch.cat([cosines, torch.cat([part.cosines for part in of_parts])], 1)
        ids = torch.cat([ids, torch.cat([part.rows for part in of_parts])], 1)
        cosines, ids = _kept(cosines, ids, k)
    return Found(cosines.cpu(), ids.cpu())


def _best(scores: Tensor, ids: Tensor, k: int) -> Found:
    """The k best of a block's scores (q, b); equal ones in the order of rows, as a sort that is stable leaves them."""
    return Found(*_kept(scores, ids.expand(len(scores), -1), k))


def _kept(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def blocks_of(parts: Iterable[Rows], size: int) -> Iterator[tuple[int, Rows]]:
    """The id of the first row and the rows of each block of at most `size`, in order."""
    first = 0
    for part in parts:
        for start in range(0, len(part), size):
            block = np.ascontiguousarray(part[start : start + size])
            yield first + start, block
        first += len(part)
