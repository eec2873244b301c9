"""What is known of fusions before they begin: whether there is anything to fuse, and what takes a rank's memory."""

from __future__ import annotations

from itertools import pairwise

from grappa_dist.config import FuseConfig
from grappa_dist.ops.correlation import rows_are_cheaper

BUCKET = 5 * 10**8  # gradients that the engine copies together at once, to add them up over the ranks, be it one alone


def unfused_in_words(fuse: FuseConfig, num_sets: int) -> str:
    """What the variants are where there is one adaptor set only; empty where there are several."""
    same = [variant for variant in fuse.variants if not variant.startswith("random")]
    if num_sets > 1 or not same:
        return ""
    return (
        f"one adaptor set only, so there is nothing to fuse: {', '.join(same)} will score as that set does "
        "(clustering.num_labels with two K or more gives several)"
    )


def projector_bytes(weights: int) -> int:
    """Of a projector of so many weights in float32: they, their gradients, these again on their way, and momentum."""
    return 4 * (3 * weights + min(weights, BUCKET))


def least_bytes(fuse: FuseConfig, ranks: int | None) -> int:
    """Memory that every rank of a fusion job needs, whatever the backbone: for the projector and C.

    Args:
        ranks: None where it is not known yet.
    """
    width = fuse.projector[-1]
    by_rows = rows_are_cheaper(fuse.global_batch, width, ranks or 2)
    weights = sum(before * after for before, after in pairwise(fuse.projector))
    return projector_bytes(weights) + 4 * (width**2 // ((ranks or width) if by_rows else 1))
