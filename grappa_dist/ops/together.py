"""Which numbers of labels are fitted at the same time; a matter of memory and speed, never of a result.

A pass over the rows can serve several K (distributed/passes.py), so that they are read once in place of once for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from grappa_dist.ops.bounds import num_bounds


def groups(nums: Sequence[int], dim: int) -> list[list[int]]:
    """The numbers of labels in groups that are fitted at the same time: from the largest on, each joins the first group
    that has room for it.

    A group needs no more memory than the largest K of all needs alone, as it has no more centroids; and its bounds take
    at most half as much scratch as the rows themselves, or what the largest K takes if that is more.
    """
    most_centroids = max(nums, default=0)
    most_scratch = max(2 * dim, *(scratch_bytes(num, dim) for num in nums)) if nums else 0
    found: list[list[int]] = []
    for num in sorted(nums, reverse=True):
        for group in found:
            together = [*group, num]
            if sum(together) <= most_centroids and sum(scratch_bytes(k, dim) for k in together) <= most_scratch:
                group.append(num)
                break
        else:
            found.append([num])
    return [sorted(group) for group in reversed(found)]


def scratch_bytes(num_labels: int, dim: int) -> int:
    """Of a row: its bounds, label and squared norm, as ops/bounds.py keeps them."""
    return 4 * num_bounds(num_labels, dim) + 16
