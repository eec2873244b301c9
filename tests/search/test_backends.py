from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grappa_dist.search.backends import largest, nearest
from grappa_dist.search.candidates import float_error
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid

pytestmark = pytest.mark.usefixtures("two_threads")


def unit_rows(num: int, dim: int, seed: int = 0) -> np.ndarray:
    rows: np.ndarray = F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()
    return rows


@pytest.mark.parametrize("num", [1, 25])  # faiss takes another path for few queries
@pytest.mark.parametrize("dim", [3, 48, 768])
def test_faiss_lists_the_best_first_within_the_error_bound(num: int, dim: int) -> None:
    x, y = to_grid(torch.from_numpy(unit_rows(num, dim))), to_grid(torch.from_numpy(unit_rows(60, dim, seed=1)))
    dots = exact_dot(x, y)
    squares = exact_square(x)[:, None] + exact_square(y) - 2 * dots
    for search, exact, size, sign in ((nearest, squares, 4.01, 1), (largest, dots, 1.01, -1)):
        values, index = search(x, y, 60)
        assert (values.double() - exact.gather(1, index) / GRID**2).abs().max() < float_error(dim, size)
        assert (sign * values).diff(dim=1).min() >= 0
        assert torch.equal(index.sort(dim=1).values, torch.arange(60).expand(num, 60))
