"""How many of K labels each coarse cluster gets.

Shapes: C coarse clusters.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def apportion(sizes: Sequence[int], num_labels: int) -> list[int]:
    """Labels per coarse cluster, (C,), in proportion to its rows by largest remainders; they add up to `num_labels`.

    A cluster with rows gets at least one label and no more than it has rows; one without gets none. Of equal claims the
    lowest cluster's counts first.

    Raises:
        ValueError: there are more labels than rows, or fewer than clusters with rows.
    """
    total, occupied = sum(sizes), sum(n > 0 for n in sizes)
    if not occupied <= num_labels <= total:
        raise ValueError(f"num_labels must be from {occupied} (clusters with rows) to {total} (rows), got {num_labels}")
    labels = [max(1, num_labels * n // total) if n else 0 for n in sizes]
    claims = sorted(range(len(sizes)), key=lambda i: (-(num_labels * sizes[i] % total), i))
    missing = num_labels - sum(labels)
    while missing > 0:
        for i in claims:
            if missing and labels[i] < sizes[i]:
                labels[i] += 1
                missing -= 1
    largest = [(-n, i) for i, n in enumerate(labels) if n > 1]
    heapq.heapify(largest)
    for _ in range(-missing):  # the single labels of small clusters were too many
        n, i = heapq.heappop(largest)
        labels[i] -= 1
        if labels[i] > 1:
            heapq.heappush(largest, (n + 1, i))
    return labels
