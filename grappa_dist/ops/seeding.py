"""k-means++ by rounds: what is drawn, and which draws are kept, as functions of integers alone.

Shapes: m candidate rows of one round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from grappa_dist.ops.exact import exact_dot, exact_square

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
    between = to_weights((squares[:, None] + squares - 2 * exact_dot(rows, rows)).long()).cpu().numpy()  # (m, m)
    now = np.asarray(weights, dtype=np.int64)
    accepted: list[int] = []
    for i, drawn in enumerate(draws):
        if len(accepted) == at_most:
            break
        if drawn < int(now[i]):
            accepted.append(i)
            now = np.minimum(now, between[i])
    return accepted
