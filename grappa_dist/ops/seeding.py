"""k-means++ by rounds: what is drawn, and which draws are kept, as functions of integers alone.

Shapes: m candidate rows of one round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from grappa_dist.search.fixed_point import exact_dot, exact_square

_TABLE = 2048  # candidates of which distances to each other are a square table
_SHARE = 64  # a round adds at most this share of the centroids, where that is more than a table of candidates
LARGER_ROUNDS_ABOVE = _TABLE * _SHARE  # centroids
OVERSAMPLING_ROUNDS = 5  # of k-means||, after its first row
_SHIFT = 21  # from units of 2**-48 to units of 2**-27


def to_weights(squares: Tensor) -> Tensor:
    """Squared distances from units of 2**-48 to units of 2**-27, rounded up so that only equal rows are at 0.

    Each is at most 4 and a bit, so the weights of 2**33 rows add up to less than 2**63.
    """
    return -((-squares) >> _SHIFT)


def from_weights(weights: Tensor) -> Tensor:
    """The largest squared distances, float64, that have these weights or lower ones."""
    return weights.double() / 2**27


def draw(limit: int, *key: int) -> int:
    """An integer in [0, limit), a function of the key alone: no generator, so no state and no library version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=24).digest()
    return int.from_bytes(digest, "big") % limit


def candidates_of(num: int, missing: int) -> int:
    """How many rows a round draws when there are `num` centroids and `missing` are still to be found.

    More of them make fewer rounds; those that lie near to each other are drawn in vain.
    """
    return max(1, min(num // 2, missing, max(_TABLE, num // _SHARE)))


def oversampled_at_once(num_labels: int) -> int:
    """How many rows each round of k-means|| draws: all together 2.5 times as many as there are centroids to be.

    Of its paper's factors 0.1 to 10 per centroid (Bahmani et al., 2012, section 5) this is the least with which five
    rounds are more than enough.
    """
    return -(-num_labels // 2)


def accept(rows: Tensor, weights: Sequence[int], draws: Sequence[int], at_most: int) -> list[int]:
    """Which of m candidates become centroids, as ascending positions, so that their law is that of k-means++.

    Candidates were drawn in proportion to their squared distances `weights` before this round. Taken in order, each is
    kept with probability (distance by now) / (distance then), so the kept one follows the distances by now, as if the
    distances of all rows had been updated after every single choice.

    Args:
        draws: for each candidate an integer drawn from [0, weight).
        at_most: no more are accepted than this.
    """
    squares = exact_square(rows)
    accepted: list[int] = []
    for first in range(0, len(rows), _TABLE):  # so no table has more than this many rows and columns
        block = range(first, min(first + _TABLE, len(rows)))
        now = np.asarray(weights[block.start : block.stop], dtype=np.int64)
        for start in range(0, len(accepted), _TABLE):
            now = np.minimum(now, _between(rows, squares, block, accepted[start : start + _TABLE]).min(1))
        between = _between(rows, squares, block, block)
        for i in block:
            if len(accepted) == at_most:
                return accepted
            if draws[i] < int(now[i - first]):
                accepted.append(i)
                now = np.minimum(now, between[i - first])
    return accepted


def _between(rows: Tensor, squares: Tensor, some: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """Weights (a, b) of some candidates by their distances from others."""
    a, b = list(some), list(others)
    table = squares[a][:, None] + squares[b] - 2 * exact_dot(rows[a], rows[b])
    return to_weights(table.long()).cpu().numpy()
