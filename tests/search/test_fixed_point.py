from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid


def unit_rows(num: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def integers(x: Tensor) -> list[list[int]]:
    return [[int(v) for v in row] for row in (x.double() * GRID).tolist()]


@pytest.mark.parametrize("dim", [1, 2, 3, 192, 2048])
def test_dots_and_squares_are_those_of_python_integers(dim: int) -> None:
    x, c = to_grid(unit_rows(5, dim, seed=0)), to_grid(unit_rows(3, dim, seed=1))
    dots = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in integers(c)] for u in integers(x)]
    squares = [sum(a * a for a in u) for u in integers(x)]
    assert exact_dot(x, c).tolist() == dots
    assert exact_square(x).tolist() == squares
    assert max(map(abs, squares)) < 2**53


def test_dots_at_the_edge_of_the_bound_are_exact() -> None:
    x = torch.full((1, 16), 1.0)  # |x||c| = 16: far from a unit row
    c = torch.full((1, 16), 1.0)
    c[0, 3] = 1 - 1 / GRID
    assert int(exact_dot(x, c)) == 16 * GRID**2 - GRID
    assert int(exact_square(c)) == 15 * GRID**2 + (GRID - 1) ** 2


def test_dots_do_not_depend_on_blocks_order_of_dimensions_or_threads() -> None:
    x, c = to_grid(unit_rows(70, 513, seed=0)), to_grid(unit_rows(41, 513, seed=1))
    whole = exact_dot(x, c)
    assert whole.dtype == torch.float64
    for rows in (1, 7, 69):
        assert torch.equal(torch.cat([exact_dot(block, c) for block in torch.split(x, rows)]), whole)
        assert torch.equal(torch.cat([exact_dot(x, block) for block in torch.split(c, rows)], dim=1), whole)
        assert torch.equal(torch.cat([exact_square(block) for block in torch.split(x, rows)]), exact_square(x))
    order = torch.randperm(513, generator=torch.Generator().manual_seed(2))
    assert torch.equal(exact_dot(x[:, order], c[:, order]), whole)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(exact_dot(x, c), whole)
    finally:
        torch.set_num_threads(num_threads)


def test_duplicate_rows_tie_exactly() -> None:
    x = to_grid(unit_rows(9, 384, seed=0))
    dots = exact_dot(x, torch.cat([x, x.flip(0)]))
    assert torch.equal(dots[:, :9], dots[:, 9:].flip(1))
    assert torch.equal(exact_dot(x, x), exact_dot(x, x).T)
    assert torch.equal(exact_dot(x, x).diagonal(), exact_square(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_grid_is_the_nearest_multiple_and_is_its_own_image(dtype: torch.dtype) -> None:
    x = unit_rows(11, 33, seed=0).to(dtype)
    grid = to_grid(x)
    steps = grid.double() * GRID
    assert grid.dtype == torch.float32
    assert torch.equal(steps, steps.round())
    assert float((grid.double() - x.double()).abs().max()) <= 0.5 / GRID
    assert torch.equal(to_grid(grid), grid)
    assert torch.equal(to_grid(-x), -grid)


def test_float64_rows_are_rounded_once() -> None:
    near_half = torch.tensor([[0.5 + 0.5 / GRID + 2.0**-50, 0.5 + 0.5 / GRID - 2.0**-50]], dtype=torch.float64)
    assert (to_grid(near_half).double() * GRID).tolist() == [[GRID / 2 + 1, GRID / 2]]


def test_a_tiny_excess_over_one_is_clamped() -> None:
    assert to_grid(torch.tensor([1.0 + 1e-6, -1.0 - 1e-6])).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.01, -2.0])
def test_values_that_no_unit_row_has_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="to_grid"):
        to_grid(torch.tensor([[0.5, value]]))


def test_empty_shards_have_empty_dots() -> None:
    none, x = to_grid(torch.empty(0, 4)), to_grid(unit_rows(3, 4, seed=0))
    assert exact_dot(none, x).shape == (0, 3)
    assert exact_dot(x, none).shape == (3, 0)
    assert exact_square(none).shape == (0,)
