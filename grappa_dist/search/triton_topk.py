"""The largest scores of each row with many targets, by one Triton kernel: no table of all scores is made.

A program takes 128 rows and walks through the targets, a tile of 128 at a time, in one loop over all columns of all
tiles, so that loads run ahead from tile to tile. A score's place in its tile is written into its lowest bits: the
maximum contains it, and no two scores of a tile are equal. Where there are few rows, several programs divide the
targets of the same rows among them.

Imported only where a GPU is used, since it needs triton. With TRITON_INTERPRET=1 it runs on a CPU, very slowly.

Shapes: P rows, K targets, E columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PLACES = 3  # scores found per row
ROUNDING = 2.0**-16
"""What a score loses at most to the place that is written into it, and again to taking that out, as a share of it."""

_MOST_SPLITS = 8  # among which the last programs that run at the same time are balanced


@dataclass(frozen=True)
class Tile:
    """What one program computes at a time. Multiples of 16 columns are what 16-byte asynchronous loads need."""

    rows: int = 128
    targets: int = 128  # a power of two up to 2**7, or ROUNDING is wrong
    columns: int = 64
    warps: int = 8  # with 4, sums and scores do not fit into registers (tests/search/triton_compiled.py)
    stages: int = 3  # tiles of columns that are on their way or in use


TILE = Tile()


def top_scores(x: Tensor, y: Tensor, offsets: Tensor, *, programs: int | None = None) -> tuple[Tensor, Tensor]:
    """The `PLACES` largest x.y + offset of each row x (P, E) with targets y (K, E), both bfloat16, summed in float32.

    Values (P, PLACES) float32, descending, and columns (P, PLACES) int64; where K < PLACES, the last ones are -inf. A
    target that is not found has a score above the last value by at most 2 `ROUNDING` of the larger of both.

    Args:
        offsets: (K,) float32.
        programs: that run at the same time; by default one for each multiprocessor, whose registers one program fills.
    """
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected bfloat16 (P, E) and (K, E), got {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if not len(x) or not len(y):
        columns = torch.zeros(len(x), PLACES, dtype=torch.int64, device=x.device)
        return torch.full(columns.shape, float("-inf"), device=x.device), columns
    tiles, blocks = -(-len(y) // TILE.targets), -(-len(x) // TILE.rows)
    tiles_of_one = -(-tiles // num_splits(blocks, tiles, programs or _multiprocessors(x.device)))
    splits = -(-tiles // tiles_of_one)
    values = torch.empty(splits, len(x), PLACES, device=x.device)
    columns = torch.empty(values.shape, dtype=torch.int32, device=x.device)
    x, y = whole_tiles(x), whole_tiles(y)
    sizes, tile = (len(x), len(y), tiles_of_one), (TILE.rows, TILE.targets, TILE.columns)
    on_gpu = {} if x.device.type == "cpu" else {"num_warps": TILE.warps, "num_stages": TILE.stages}
    arguments = (x, y, offsets.float().contiguous(), values, columns, *sizes, x.shape[1], *tile, not on_gpu)
    top_scores_kernel[(blocks, splits)](*arguments, **on_gpu)
    if splits == 1:
        return values[0], columns[0].long()
    best = values.transpose(0, 1).flatten(1).topk(PLACES, dim=1)  # (P, splits * PLACES)
    return best.values, columns.transpose(0, 1).flatten(1).gather(1, best.indices).long()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_splits(blocks: int, tiles: int, programs: int) -> int:
    """Among how many programs the targets of each block of rows are divided; 1 where the blocks alone fill a GPU.

    Programs run in rounds: s of them for a block take ceil(blocks s / programs) rounds of ceil(tiles / s) tiles each.
    The fewest that come within 5 % of the least time are taken.
    """
    most = min(tiles, max(_MOST_SPLITS, programs // blocks))
    times = [-(-blocks * splits // programs) * -(-tiles // splits) for splits in range(1, most + 1)]
    return next(splits for splits, time in enumerate(times, 1) if time <= 1.05 * min(times))


def whole_tiles(form: Tensor) -> Tensor:
    """The form (n, E) with columns of zeros up to whole tiles; as it is where it has such a width."""
    spare = -form.shape[1] % TILE.columns
    return F.pad(form, (0, spare)) if spare else form.contiguous()


@triton.jit(do_not_specialize=["num_rows", "num_targets", "tiles_of_one"])  # else compiled anew for 1 and 16, 32, ...
def top_scores_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    offsets,
    values,
    columns,
    num_rows,
    num_targets,
    tiles_of_one,
    WIDTH: tl.constexpr,  # a multiple of COLUMNS; known when compiled, so that rows are known to be aligned
    ROWS: tl.constexpr,
    TARGETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter has no bfloat16 products; in float32 they are the same numbers
):
    """Rows and targets that do not exist are the last ones again, so no load has a mask; they are left out later."""
    STEPS: tl.constexpr = WIDTH // COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_rows = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * WIDTH
    begin = tl.program_id(1) * tiles_of_one * TARGETS
    end = tl.minimum(begin + tiles_of_one * TARGETS, num_targets)
    lowest, nowhere = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.int32)
    first, second, third, first_at, second_at, third_at = lowest, lowest, lowest, nowhere, nowhere, nowhere
    scores = tl.zeros((ROWS, TARGETS), tl.float32)
    for step in range(0, tl.cdiv(end - begin, TARGETS) * STEPS):
        start = begin + step // STEPS * TARGETS
        targets = start + tl.arange(0, TARGETS)
        existing = tl.minimum(targets, num_targets - 1)
        some = step % STEPS * COLUMNS + tl.arange(0, COLUMNS)
        of_targets = y + existing.to(tl.int64)[None, :] * WIDTH
        scores = _add_products(scores, of_rows + some[None, :], of_targets + some[:, None], WIDEN)
        if step % STEPS == STEPS - 1:
            scores = _with_places(scores + tl.load(offsets + existing)[None, :], targets < num_targets, TARGETS)
            first, second, third, first_at, second_at, third_at = _sort_in(
                scores, start, first, second, third, first_at, second_at, third_at, TARGETS
            )
            scores = tl.zeros((ROWS, TARGETS), tl.float32)
    out, within = (tl.program_id(1).to(tl.int64) * num_rows + rows) * 3, rows < num_rows
    _store(values + out, _unmarked(first, TARGETS), _unmarked(second, TARGETS), _unmarked(third, TARGETS), within)
    _store(columns + out, first_at, second_at, third_at, within)


@triton.jit
def _add_products(total, x, y, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the products of what these two tiles of pointers point to."""
    a, b = tl.load(x), tl.load(y)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _sort_in(  # type: ignore[no-untyped-def]
    scores, start, first, second, third, first_at, second_at, third_at, TARGETS: tl.constexpr
):
    """The three best and their targets, with a tile of scores of which the first target is `start`.

    It takes three rounds at most, and hardly ever more than one in later tiles.
    """
    best = tl.max(scores, 1)
    while tl.max((best > third).to(tl.int32), 0) > 0:
        at = start + (best.to(tl.int32, bitcast=True) & (TARGETS - 1))
        third, third_at = _better(second, second_at, best, at, third, third_at)
        second, second_at = _better(first, first_at, best, at, second, second_at)
        first, first_at = tl.maximum(first, best), tl.where(best > first, at, first_at)
        scores = tl.where(scores == best[:, None], float("-inf"), scores)
        best = tl.max(scores, 1)
    return first, second, third, first_at, second_at, third_at


@triton.jit
def _better(above, above_at, new, at, own, own_at):  # type: ignore[no-untyped-def]
    """The score and target of a place, once a new score is sorted in: what is above it may move down."""
    moves, enters = new > above, new > own
    return (
        tl.where(moves, above, tl.where(enters, new, own)),
        tl.where(moves, above_at, tl.where(enters, at, own_at)),
    )


@triton.jit
def _with_places(scores, exist, TARGETS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores with their place in the tile as their lowest bits; -inf for targets that do not exist."""
    places = tl.arange(0, TARGETS)[None, :]
    marked = (scores.to(tl.int32, bitcast=True) & -TARGETS) | places
    return tl.where(exist[None, :], marked.to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def _unmarked(scores, TARGETS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores without their places; the lowest bits of -inf are zero, so it stays what it is."""
    return (scores.to(tl.int32, bitcast=True) & -TARGETS).to(tl.float32, bitcast=True)


@triton.jit
def _store(out, first, second, third, within):  # type: ignore[no-untyped-def]
    tl.store(out, first, mask=within)
    tl.store(out + 1, second, mask=within)
    tl.store(out + 2, third, mask=within)
