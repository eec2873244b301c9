"""The largest inner products of each row with many targets, by one Triton kernel: no table of all products is made.

Imported only where a GPU is used, since it needs triton. With TRITON_INTERPRET=1 it runs on a CPU, very slowly.

Shapes: P rows, K targets, E columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 3  # products found per row
_ROWS, _TARGETS, _COLUMNS = 128, 128, 64  # of one tile; not tuned on any GPU yet


def top_products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The `PLACES` largest products of each row x (P, E) with targets y (K, E), both bfloat16, summed in float32.

    Values (P, PLACES) float32, descending, and columns (P, PLACES) int64; where K < PLACES, the last ones are -inf.
    """
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected bfloat16 (P, E) and (K, E), got {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    values = torch.empty(len(x), PLACES, device=x.device)
    columns = torch.zeros(len(x), PLACES, dtype=torch.int64, device=x.device)
    if len(x):
        grid = (triton.cdiv(len(x), _ROWS),)
        sizes = (len(x), len(y), x.shape[1])
        _kernel[grid](
            x.contiguous(), y.contiguous(), values, columns, *sizes, _ROWS, _TARGETS, _COLUMNS, x.device.type == "cpu"
        )
    return values, columns


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    values,
    columns,
    num_rows,
    num_targets,
    width,
    ROWS: tl.constexpr,
    TARGETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter has no bfloat16 products; in float32 they are the same numbers
):
    """One tile of rows against all targets, tile by tile, keeping the three largest products of each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.full((ROWS,), float("-inf"), tl.float32)
    second, third = first, first
    first_at = tl.zeros((ROWS,), tl.int32)
    second_at, third_at = first_at, first_at
    for start in range(0, num_targets, TARGETS):
        targets = start + tl.arange(0, TARGETS)
        products = _products(x, y, rows, targets, num_rows, num_targets, width, COLUMNS, WIDEN)
        for _ in tl.static_range(3):
            best, place = tl.max(products, 1, return_indices=True)
            at = start + place
            products = tl.where(targets[None, :] == at[:, None], float("-inf"), products)
            above_first, above_second, above_third = best > first, best > second, best > third
            third_at = tl.where(above_second, second_at, tl.where(above_third, at, third_at))
            third = tl.where(above_second, second, tl.where(above_third, best, third))
            second_at = tl.where(above_first, first_at, tl.where(above_second, at, second_at))
            second = tl.where(above_first, first, tl.where(above_second, best, second))
            first_at = tl.where(above_first, at, first_at)
            first = tl.where(above_first, best, first)
    within = rows < num_rows
    out = rows.to(tl.int64) * 3
    _store(values + out, first, second, third, within)
    _store(columns + out, first_at.to(tl.int64), second_at.to(tl.int64), third_at.to(tl.int64), within)


@triton.jit
def _store(out, first, second, third, within):  # type: ignore[no-untyped-def]
    tl.store(out, first, mask=within)
    tl.store(out + 1, second, mask=within)
    tl.store(out + 2, third, mask=within)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, y, rows, targets, num_rows, num_targets, width, COLUMNS: tl.constexpr, WIDEN: tl.constexpr
):
    """One tile of products, (ROWS, TARGETS) float32; -inf for targets that do not exist."""
    total = tl.zeros((rows.shape[0], targets.shape[0]), tl.float32)
    for start in range(0, width, COLUMNS):
        some = start + tl.arange(0, COLUMNS)
        inside = some < width
        of_rows = rows.to(tl.int64)[:, None] * width + some[None, :]
        of_targets = targets.to(tl.int64)[None, :] * width + some[:, None]
        a = tl.load(x + of_rows, mask=(rows[:, None] < num_rows) & inside[None, :], other=0.0)
        b = tl.load(y + of_targets, mask=(targets[None, :] < num_targets) & inside[:, None], other=0.0)
        if WIDEN:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
    return tl.where(targets[None, :] < num_targets, total, float("-inf"))
