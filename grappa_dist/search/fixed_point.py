"""Dot products without rounding, for decisions that must not depend on block size, threads, workers or device.

Rows live on a grid: every value is a multiple of 2**-24 and at most 1 in size, so float32 holds it exactly. In units of
2**-48 each product of two such values is an integer, and so is every partial sum. By Cauchy-Schwarz no partial sum, in
whatever order, exceeds |x||c| * 2**48, which stays below 2**53 (where float64 still has every integer) while
|x||c| <= 16, with a spare bit. Nothing is ever rounded: a float64 matrix product on grid rows *is* the integer
arithmetic, with or without fused multiply-add, at the speed of BLAS. Unit rows and means of unit rows are far inside
the bound.

Shapes: n and m rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 2**24
"""Steps of the grid in 1; a dot product of two grid rows counts in units of 1 / GRID**2."""

NORM_LIMIT = 1 + 2**-7
"""The largest norm of a unit row, up to rounding: the integer sums of kmeans/update.py are sized for it."""

LARGEST = 1 + 2**-12
"""Rounding of a norm may lift a value above 1 by less than this; no unit row has a larger value."""

_CACHE, _GPU_TILE = 2**17, 2**26  # elements


def to_grid(x: Tensor) -> Tensor:
    """The nearest grid values, float32, same shape; for unit rows and means of unit rows (each |value| <= 1)."""
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"to_grid: {int((~torch.isfinite(x)).sum())} values are NaN or infinite, all must be finite")
    if x.numel() and float(x.abs().max()) > LARGEST:
        raise ValueError(f"to_grid: found a value of size {float(x.abs().max()):.6g}, unit rows have none above 1")
    return rounded(x)


def rounded(x: Tensor) -> Tensor:
    """As `to_grid`, of rows that have been checked: a GPU does not wait."""
    # Scaling by a power of two is exact, so the rounding to the grid is the only one, in float32 as in float64.
    return ((x * GRID).round().clamp(-GRID, GRID) / GRID).float()


def exact_dot(x: Tensor, c: Tensor) -> Tensor:
    """Dot products of grid rows (n, D) and (m, D): (n, m) float64 integers, in units of 1 / GRID**2.

    A `c` that is used repeatedly may be kept as float64, which spares its conversion.
    """
    return (x.double() * GRID**2) @ c.double().T


def exact_square(x: Tensor) -> Tensor:
    """Squared norms of grid rows (n, D): (n,) float64 integers, in units of 1 / GRID**2."""
    parts = [(part.double() * GRID).square_().sum(1) for part in torch.split(x, cached_rows(x))]
    return torch.cat(parts)


def cached_rows(x: Tensor) -> int:
    """How many rows at once have a float64 copy that stays in a core's cache, three times as fast; 512 MiB on a GPU."""
    return max(1, (_GPU_TILE if x.is_cuda else _CACHE) // x.shape[1])
