from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search import rerank
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import CandidateGenerator, Centroids, Float32Generator, float_error
from grappa_dist.search.fixed_point import GRID, exact_square, to_grid
from grappa_dist.search.rerank import (
    FAR,
    Competitors,
    assign,
    decide_competitors,
    decide_pairs,
    nearest_of_pairs,
    pair_dots,
    pair_squares,
)


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def integers(x: Tensor) -> np.ndarray:
    return (x.double() * GRID).long().numpy()


def squares_in_integers(x: Tensor, c: Tensor) -> np.ndarray:
    return np.square(integers(x)[:, None] - integers(c)).sum(2)  # int64: no rounding anywhere


def near_ties(dim: int) -> tuple[Tensor, Tensor]:
    """Rows about midway between centroids that differ by a few steps of the grid, and centroids that are equal."""
    c = unit_rows(6, dim)
    moved = c + torch.randint(-2, 3, c.shape, generator=torch.Generator().manual_seed(1)) / GRID
    centroids = to_grid(torch.cat([c, moved.clamp(-1, 1), c[:2], c[:2], c[:2]]))
    return to_grid(torch.cat([unit_rows(20, dim, seed=2), centroids, (centroids[:6] + centroids[6:12]) / 2])), centroids


def generators(x: Tensor) -> list[CandidateGenerator]:
    return [Float32Generator(), Bf16Generator(Bf16Generator.residual_norm(x))]


@pytest.mark.parametrize("dim", [1, 2, 7, 192])
def test_labels_and_distances_are_those_of_integer_arithmetic(dim: int) -> None:
    for x, c in (
        near_ties(dim),
        (unit_rows(50, dim), unit_rows(9, dim, seed=3)),
        (unit_rows(3, dim), unit_rows(1, dim)),
    ):
        wanted = squares_in_integers(x, c)
        for generator in generators(x):
            found = assign(x, Centroids.of(c, generator))
            assert found.labels.tolist() == wanted.argmin(1).tolist()  # argmin: the first of equal ones
            assert found.squares.tolist() == wanted.min(1).tolist()


def test_float_noise_within_the_bound_changes_no_label() -> None:
    x, c = near_ties(32)
    error = float_error(32, 4.0)
    generator = torch.Generator().manual_seed(5)

    def noisy(x: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        distances = torch.cdist(x.double(), c.double()).square()
        noise = (torch.rand(distances.shape, generator=generator, dtype=torch.float64) * 2 - 1) * error * 0.7
        best = (distances + noise).topk(t, largest=False)
        return best.values.float(), best.indices

    exact = assign(x, Centroids.of(c))
    for _ in range(10):
        found = assign(x, Centroids.of(c, Float32Generator(noisy)))
        assert torch.equal(found.labels, exact.labels)
        assert torch.equal(found.squares, exact.squares)


def test_centroids_within_reach_are_found_and_others_need_not_be() -> None:
    x, c = unit_rows(60, 16), unit_rows(20, 16, seed=1)
    wanted = squares_in_integers(x, c)
    least = wanted.min(1)
    for generator in generators(x):
        for factor in (0.0, 0.5, 1.0, 2.0):
            within = torch.from_numpy(least * factor / GRID**2)
            found = assign(x, Centroids.of(c, generator), within=within)
            seen = (found.labels >= 0).numpy()
            assert seen.all() if factor >= 1 else seen.mean() < 0.2
            assert found.labels[seen].tolist() == wanted.argmin(1)[seen].tolist()
            assert found.squares[seen].tolist() == least[seen].tolist()


def test_more_equal_centroids_than_candidates_still_give_the_lowest_index() -> None:
    c = torch.cat([unit_rows(3, 8, seed=1), unit_rows(1, 8).repeat(20, 1)])
    x = unit_rows(1, 8).repeat(4, 1)
    for generator in generators(x):
        found = assign(x, Centroids.of(c, generator))
        assert found.labels.tolist() == [3] * 4
        assert found.squares.tolist() == [0] * 4


def test_tiles_do_not_change_an_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = near_ties(16)
    whole = assign(x, Centroids.of(c))
    for tile in (1, 40, 100):
        monkeypatch.setattr(rerank, "_TILE", tile)
        cut = assign(x, Centroids.of(c))
        assert torch.equal(cut.labels, whole.labels)
        assert torch.equal(cut.squares, whole.squares)


def test_no_rows_have_no_labels() -> None:
    found = assign(torch.zeros(0, 4), Centroids.of(unit_rows(3, 4)))
    assert (len(found.labels), len(found.squares)) == (0, 0)


def test_pairs_have_the_dots_and_squares_of_integer_arithmetic() -> None:
    x, c = unit_rows(40, 500), unit_rows(7, 500, seed=1)
    rows, labels = torch.arange(280) % 40, torch.arange(280) % 7
    wanted = (integers(x)[rows] * integers(c)[labels]).sum(1)
    assert pair_dots(x, c, (rows, labels)).tolist() == wanted.tolist()
    squares = pair_squares(x, exact_square(x), Centroids.of(c), (rows, labels))
    assert squares.tolist() == squares_in_integers(x, c)[rows, labels].tolist()


def test_of_pairs_the_nearest_is_taken_and_the_lowest_of_equal_ones() -> None:
    x, c = unit_rows(4, 6), torch.cat([unit_rows(2, 6, seed=1), unit_rows(2, 6, seed=1)])
    pairs = (torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([2, 0, 3, 3, 2, 1]))
    found = nearest_of_pairs(x, exact_square(x), Centroids.of(c), pairs)
    exact = squares_in_integers(x, c)
    assert found.labels.tolist() == [0, 3, -1, 1 if exact[3, 1] <= exact[3, 2] else 2]
    assert found.squares.tolist() == [exact[0, 0], exact[1, 3], FAR, min(exact[3, 1], exact[3, 2])]


@pytest.mark.parametrize("dim", [1, 16, 384])
def test_pairs_are_decided_as_by_exact_distances_and_no_row_is_farther_than_its_bound(dim: int) -> None:
    x, c = unit_rows(60, dim), unit_rows(20, dim, seed=1)
    shaken = c + torch.randint(-1, 2, c.shape, generator=torch.Generator().manual_seed(2)) / GRID
    c = to_grid(torch.cat([c, c[:5], shaken.clamp(-1, 1)]))  # equal ones, and ties that float32 does not see
    rows = torch.cat([torch.arange(60), torch.randint(0, 60, (900,), generator=torch.Generator().manual_seed(3))])
    pairs = (rows, torch.randint(0, len(c), rows.shape, generator=torch.Generator().manual_seed(4)))
    exact = nearest_of_pairs(x, exact_square(x), Centroids.of(c), pairs)
    found = decide_pairs(x, exact_square(x), Centroids.of(c), pairs)
    assert torch.equal(found.labels, exact.labels)
    assert 0 < int(found.by_integers.sum()) < len(x) or dim == 1
    over = found.above - exact.squares.double() / GRID**2
    assert bool((over >= 0).all())
    assert float(over.max()) < 4 * float_error(dim, 2.01)


@pytest.mark.parametrize("dim", [1, 16, 384])
def test_competitors_are_decided_as_by_exact_distances(dim: int) -> None:
    x, c = unit_rows(60, dim), unit_rows(20, dim, seed=1)
    draws = torch.Generator().manual_seed(2)
    shaken = c + torch.randint(-1, 2, c.shape, generator=draws) / GRID
    c = to_grid(torch.cat([c, c[:5], -c[:3], shaken.clamp(-1, 1)]))  # equal ones, and ties that float32 does not see
    first, left_open = torch.randint(0, len(c), (60,), generator=draws), 0
    for rows in (torch.arange(60), torch.arange(60).flip(0), torch.randint(0, 60, (900,), generator=draws)):
        labels = torch.randint(0, len(c), rows.shape, generator=draws)
        rows, labels = rows[labels != first[rows]], labels[labels != first[rows]]
        pairs = (torch.cat([torch.arange(60), rows]), torch.cat([first, labels]))
        exact = nearest_of_pairs(x, exact_square(x), Centroids.of(c), pairs)
        found, undecided = decide_competitors(x, exact_square(x), Centroids.of(c), Competitors(first, rows, labels))
        assert torch.equal(found, exact.labels)
        assert int(undecided.sum()) < len(x) or dim == 1
        left_open += int(undecided.sum())
    assert left_open


def test_a_competitor_that_differs_by_one_step_of_the_grid_is_distinguished_from_the_first() -> None:
    x = unit_rows(40, 64)
    c = to_grid(torch.cat([0.9 * x, 0.9 * x]))
    c[torch.arange(40), torch.arange(40)] += 1 / GRID
    for first, other in ((0, 40), (40, 0)):
        competitors = Competitors(torch.arange(40) + first, torch.arange(40), torch.arange(40) + other)
        found, undecided = decide_competitors(x, exact_square(x), Centroids.of(c), competitors)
        assert bool(undecided.all())
        near = squares_in_integers(x, c)[np.arange(40)[:, None], np.arange(40)[:, None] + [0, 40]]
        assert found.tolist() == (np.arange(40) + 40 * near.argmin(1)).tolist()
