"""Tests of the kernel for Triton's interpreter; test_top_products.py runs them with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID, exact_square
from grappa_dist.search.rerank import assign, best_of_all
from grappa_dist.search.triton_topk import PLACES, top_products
from tests.search.test_candidates import cases, check, exact_squares


@pytest.mark.parametrize(
    ("num", "targets", "width"), [(1, 1, 1), (1, 2, 5), (3, 300, 70), (130, 5, 64), (129, 257, 129)]
)
def test_the_three_largest_products_are_found_in_order(num: int, targets: int, width: int) -> None:
    draws = torch.Generator().manual_seed(num)
    x, y = (torch.randn(n, width, generator=draws).bfloat16() for n in (num, targets))
    values, columns = top_products(x, y)
    table = x.double() @ y.double().T
    expected = table.topk(min(PLACES, targets), dim=1).values
    found = values[:, :targets].double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(table.gather(1, columns[:, :targets]), expected, atol=1e-4, rtol=1e-5)
    assert bool(values[:, targets:].isinf().all())


def test_equal_targets_fill_different_places() -> None:
    x, y = torch.ones(2, 4).bfloat16(), torch.ones(200, 4).bfloat16()
    values, columns = top_products(x, y)
    assert bool((values == 4).all())
    assert all(len(set(row)) == 3 for row in columns.tolist())


def test_no_rows_have_no_products_and_other_types_are_refused() -> None:
    assert top_products(torch.zeros(0, 4).bfloat16(), torch.zeros(3, 4).bfloat16())[0].shape == (0, 3)
    with pytest.raises(ValueError, match="bfloat16"):
        top_products(torch.zeros(1, 4), torch.zeros(3, 4).bfloat16())


@pytest.mark.parametrize("dim", [1, 3, 48])
def test_fused_estimates_satisfy_their_error_bound(dim: int) -> None:
    for x, c in cases(dim):
        exact, generator = exact_squares(x, c), TritonGenerator(TritonGenerator.residual_norm(x))
        least, most = exact.min(1).values, exact.max(1).values
        for base in (exact_square(x) / GRID**2, least, most, (least + most) / 2):
            for within_base in (False, True):
                rows = generator.rows([x], exact_square(x), base, within_base=within_base)
                found = generator.nearest(rows, Centroids.of(c, generator), min(3, len(c)))
                check(found, exact, base if within_base else None)


def test_labels_by_the_kernel_are_those_of_exact_integers() -> None:
    for x, c in cases(24):
        centroids = Centroids.of(c, TritonGenerator(TritonGenerator.residual_norm(x)))
        assert torch.equal(assign(x, centroids).labels, best_of_all(x, centroids)[0])
