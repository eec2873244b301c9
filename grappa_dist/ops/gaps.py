"""By how much the best score of a row may mislead: which centroids can be the nearest although others score higher.

A score s_j of a row x estimates S_j, which is -|x - c_j|^2 / 2 plus the same for all j, from forms x' and c'_j that are
rounded to bfloat16 (search/bf16.py). With d_j = c_j - c'_j,

    S_j - s_j = (x - x').c_j + x'.d_j + a_j + r_j,

where a_j, |a_j| <= a, is the error of adding up and of the offsets, and r_j that of rounding s_j itself to bfloat16,
|r_j| <= 2**-8 |s_j|. Of two centroids the large parts of these errors are alike. If c_j is the nearest, S_j >= S_i for
the best score s_i too, so by Cauchy-Schwarz

    s_i - s_j <= (S_j - s_j) - (S_i - s_i) <= p_ij + 2**-8 (|s_i| + |s_j|),
    p_ij = rest |c_i - c_j| + |x'||d_i - d_j| + 2 a,    rest >= |x - x'|.

As |s_j| <= |s_i| + (s_i - s_j), this gives s_i - s_j <= (p_ij + 2**-7 |s_i|) / (1 - 2**-8). A centroid below that is
not the nearest. Without regard to the pair, p_ij is at most twice the largest error of all scores before r_j.

Shapes: P rows, K centroids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

HALF = 2.0**-8
"""Rounding to bfloat16 errs by this share of the result at most."""


@dataclass(frozen=True)
class Gaps:
    """By how much the score of the nearest centroid can lie below the best score of a row."""

    error: float  # of any score before its own rounding
    pairs: Tensor | None = None  # (K, K) float32, at least p_ij; by default 2 error for any two

    def to_any(self, scores: Tensor, columns: Tensor) -> Tensor:
        """Below the best scores (P,), those of some columns (P,), to any other, (P,)."""
        return _rounded(scores, 2 * self.error if self.pairs is None else self._widest[columns])

    def to(self, others: Tensor, scores: Tensor, columns: Tensor) -> Tensor:
        """The same to other columns (P,) that are named."""
        if self.pairs is None:
            return _rounded(scores, 2 * self.error)
        return _rounded(scores, self.pairs.flatten()[columns * len(self.pairs) + others])

    @cached_property
    def _widest(self) -> Tensor:
        assert self.pairs is not None
        return self.pairs.amax(1)


def _rounded(scores: Tensor, pairs: Tensor | float) -> Tensor:
    """Gaps with the scores' own rounding.

    1 + 2**-7 exceeds 1 / (1 - 2**-8) by more than 2**-9, which is more than what float32 takes from the gap and from
    its difference to the score: the gap is at least 2**-7 of that.
    """
    return (scores.abs() * (2 * HALF) + pairs) * (1 + 2 * HALF)
