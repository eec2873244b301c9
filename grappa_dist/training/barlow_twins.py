"""Barlow Twins, Eq. (4), on the batch of all ranks. Shapes: B pairs of one rank, D projected dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
Penalty = Callable[[Tensor, Tensor, float], Tensor]


def barlow_twins(
    za: Tensor, zb: Tensor, beta: float, allsum: AllSum = lambda t: t, *, penalty: Penalty | None = None
) -> Tensor:
    """Eq. (4) on the global batch, a scalar that is the same on every rank.

    Ranks may hold uneven shares, one of them none (0, D); the za and zb of every rank must need gradients all the same,
    since the backward pass sums over ranks too and waits for all of them.

    Args:
        za, zb: (B, D), row i of both from one pair; computed in float32 at least, whatever autocast says.
        allsum: adds over ranks and lets gradients through (see distributed/collectives.py).
        penalty: Eq. (4) of C = A^T B over all ranks, from a rank's A and B (B, D) and beta, where C itself is to be
            made otherwise (see distributed/correlation.py).
    """
    if za.shape != zb.shape or za.ndim != 2:
        raise ValueError(f"barlow_twins: za {tuple(za.shape)} and zb {tuple(zb.shape)} must both be (B, D), row by row")
    dtype = torch.promote_types(torch.promote_types(za.dtype, zb.dtype), torch.float32)
    za, zb = za.to(dtype), zb.to(dtype)  # bf16 cannot count past 256
    size = allsum(za.new_tensor(len(za)))

    def standardise(z: Tensor) -> Tensor:  # (B, D), by the statistics of all ranks
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) / torch.sqrt(var + 1e-5)

    with torch.autocast(za.device.type, enabled=False):
        a, b = standardise(za) / size, standardise(zb)
        return _penalty(a, b, beta, allsum) if penalty is None else penalty(a, b, beta)


def _penalty(a: Tensor, b: Tensor, beta: float, allsum: AllSum) -> Tensor:
    c = allsum(a.T @ b)  # (D, D)
    on = (1 - torch.diagonal(c)).square().sum()
    off = c.square().fill_diagonal_(0).sum()  # D = 8192 makes c 256 MiB: no further copies of it
    return on + beta * off
