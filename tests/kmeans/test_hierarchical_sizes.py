from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from grappa_dist.kmeans.hierarchical import apportion


@pytest.mark.parametrize(
    ("sizes", "num_labels", "expected"),
    [
        ([10, 10, 10], 3, [1, 1, 1]),
        ([10, 10, 10], 4, [2, 1, 1]),  # equal remainders: the lowest first
        ([1, 0, 99], 10, [1, 0, 9]),
        ([100, 1, 1, 1], 4, [1, 1, 1, 1]),  # the single rows take what the large one could claim
        ([3, 3, 1], 7, [3, 3, 1]),
        ([5], 3, [3]),
    ],
)
def test_labels_go_by_size(sizes: list[int], num_labels: int, expected: list[int]) -> None:
    assert apportion(sizes, num_labels) == expected


@pytest.mark.parametrize("seed", range(20))
def test_every_share_is_fair_and_possible(seed: int) -> None:
    draws = np.random.default_rng(seed)
    sizes = (draws.pareto(0.7, 30) * 3).astype(int).tolist()
    num_labels = int(draws.integers(sum(n > 0 for n in sizes), sum(sizes) + 1))
    labels = apportion(sizes, num_labels)
    assert sum(labels) == num_labels
    assert all(min(n, 1) <= k <= n for n, k in zip(sizes, labels, strict=True))
    quotas = [Fraction(num_labels * n, sum(sizes)) for n in sizes]
    if all(q >= 1 for q, n in zip(quotas, sizes, strict=True) if n):
        assert all(abs(k - q) < 1 for q, k in zip(quotas, labels, strict=True))


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from 2 \(clusters with rows\) to 5 \(rows\), got 6"):
        apportion([3, 0, 2], 6)
    with pytest.raises(ValueError, match="got 1"):
        apportion([3, 0, 2], 1)
