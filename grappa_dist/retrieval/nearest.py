"""The nearest images of queries by cosine, exactly, a block of rows at a time.

Shapes: q queries, n rows, b rows of a block, D channels, k neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.search.candidates import true_products

BLOCK = 65_536  # rows of a block
QUERIES, GPU_QUERIES = 256, 4096  # at a time
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
        places = torch.nonzero(good).flatten().to(device)
        at_once = GPU_QUERIES if z.is_cuda else QUERIES
        with true_products():
            of_parts = [_best(part @ rows.T[:, places], places + first, k) for part in z.split(at_once)]
        cosines = torch.cat([cosines, torch.cat([part.cosines for part in of_parts])], 1)
        ids = torch.cat([ids, torch.cat([part.rows for part in of_parts])], 1)
        cosines, ids = _kept(cosines, ids, k)
    return Found(cosines.cpu(), ids.cpu())


def _best(scores: Tensor, ids: Tensor, k: int) -> Found:
    """The k best of a block's scores (q, b); equal ones in the order of rows, as a sort that is stable leaves them."""
    return Found(*_kept(scores, ids.expand(len(scores), -1), k))


def _kept(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, scores.shape[1])
    top = scores.topk(k, dim=1)
    last = top.values[:, k - 1 :]  # of those that are equal to it, topk takes any
    tied = ((scores == last).sum(1) > (top.values == last).sum(1)).nonzero().flatten()
    places = top.indices.sort(dim=1).values
    if len(tied):
        places[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    cosines, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return cosines, ids.gather(1, places.gather(1, order))


def blocks_of(parts: Iterable[Rows], size: int) -> Iterator[tuple[int, Rows]]:
    """The id of the first row and the rows of each block of at most `size`, in order; small parts share a block."""
    first, waiting, count = 0, list[Rows](), 0
    for part in parts:
        for start in range(0, len(part), size):
            piece = part[start : start + size]
            if count + len(piece) > size:
                yield first, _joined(waiting)
                first, waiting, count = first + count, [], 0
            waiting.append(piece)
            count += len(piece)
    if count:
        yield first, _joined(waiting)


def _joined(pieces: Sequence[Rows]) -> Rows:
    return np.ascontiguousarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)
