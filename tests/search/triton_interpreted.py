"""Tests of the kernel for Triton's interpreter; test_triton_topk.py runs them with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.rerank import assign, best_of_all
from grappa_dist.search.triton_topk import PLACES, ROUNDING, TILE, top_scores, whole_tiles
from tests.search.test_candidates import cases, check, exact_squares

SHAPES = [(1, 1, 1), (1, 2, 5), (3, 300, 70), (130, 5, 64), (129, 257, 129)]


def best_scores(x: Tensor, y: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """All scores in float64, and the largest of each row, descending."""
    table = x.double() @ y.double().T + offsets.double()
    return table, table.topk(min(PLACES, len(y)), dim=1).values


@pytest.mark.parametrize(("num", "targets", "width"), SHAPES)
@pytest.mark.parametrize("programs", [1, 12])  # 12: several for the same rows
def test_the_three_largest_scores_are_found_in_order(num: int, targets: int, width: int, programs: int) -> None:
    draws = torch.Generator().manual_seed(num)
    x, y = (torch.randn(n, width, generator=draws).bfloat16() for n in (num, targets))
    offsets = torch.randn(targets, generator=draws)
    values, columns = top_scores(x, y, offsets, programs=programs)
    table, expected = best_scores(x, y, offsets)
    allowed = 2 * ROUNDING * expected.abs() + 1e-5
    assert bool(((values[:, :targets].double() - expected).abs() <= allowed).all())
    assert bool(((table.gather(1, columns[:, :targets]) - expected).abs() <= allowed).all())
    assert bool(values[:, targets:].isinf().all())


@pytest.mark.parametrize("programs", [1, 40])
def test_equal_targets_fill_different_places_and_zeros_are_no_exception(programs: int) -> None:
    for value in (1.0, 0.0, -1.0):
        x, y = torch.ones(2, 4).bfloat16(), torch.full((400, 4), value).bfloat16()
        values, columns = top_scores(x, y, torch.zeros(400), programs=programs)
        assert bool((values == 4 * value).all())
        assert all(len(set(row)) == 3 for row in columns.tolist())


def test_forms_of_whole_tiles_are_not_copied() -> None:
    generator = TritonGenerator(0.0)
    for dim in (1, 64, 100):
        x = torch.zeros(3, dim)
        prepared = generator.rows([x], exact_square(x), exact_square(x), within_base=False).form
        assert prepared.shape[1] - dim < TILE.columns
        assert whole_tiles(prepared).data_ptr() == prepared.data_ptr()


def test_no_rows_have_no_scores_and_other_types_are_refused() -> None:
    assert top_scores(torch.zeros(0, 4).bfloat16(), torch.zeros(3, 4).bfloat16(), torch.zeros(3))[0].shape == (0, 3)
    with pytest.raises(ValueError, match="bfloat16"):
        top_scores(torch.zeros(1, 4), torch.zeros(3, 4).bfloat16(), torch.zeros(3))


@pytest.mark.parametrize("dim", [1, 3, 80])
def test_fused_estimates_satisfy_their_error_bound(dim: int) -> None:
    for x, c in cases(dim):
        exact, generator = exact_squares(x, c), TritonGenerator(TritonGenerator.residual_norm(x))
        least = exact.min(1).values
        rows = generator.rows([x], exact_square(x), least, within_base=True)  # the base changes nothing
        found = generator.nearest(rows, Centroids.of(c, generator), min(3, len(c)))
        check(found, exact, None)
        check(found, exact, least)


def test_the_error_bound_is_hardly_wider_than_what_rounding_to_bfloat16_takes() -> None:
    x, c = cases(384)[0]
    generator = TritonGenerator(TritonGenerator.residual_norm(x))
    rows, centroids = (
        generator.rows([x], exact_square(x), exact_square(x), within_base=False),
        Centroids.of(c, generator),
    )
    rounding = generator.residual * centroids.norm + rows.norm * centroids.residual
    assert 2 * rounding < generator.nearest(rows, centroids, 3).error < 2.3 * rounding


def test_labels_by_the_kernel_are_those_of_exact_integers() -> None:
    for x, c in cases(24):
        centroids = Centroids.of(c, TritonGenerator(TritonGenerator.residual_norm(x)))
        assert torch.equal(assign(x, centroids).labels, best_of_all(x, centroids)[0])
