from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.kmeans.update import Stats, update_centroids
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID, exact_square, to_grid
from grappa_dist.search.rerank import assign


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def integers(x: Tensor) -> np.ndarray:
    return (x.double() * GRID).long().numpy()


def squares_in_integers(x: Tensor, c: Tensor) -> np.ndarray:
    return np.square(integers(x)[:, None] - integers(c)).sum(2)  # int64: no rounding anywhere


def stats_of(x: Tensor, c: Tensor) -> Stats:
    stats = Stats.zeros(len(c), c.shape[1])
    stats.add_(x, exact_square(x), assign(x, Centroids.of(c)).labels)
    return stats


def finished(c: Tensor, stats: Stats, step: int = 0, *, spherical: bool = False) -> tuple[Tensor, int]:
    return update_centroids(c, stats, stats.spreads(Centroids.of(c)), step, spherical=spherical)


def test_stats_add_in_any_order_and_to_the_sums_of_python() -> None:
    x, c = unit_rows(30, 5), unit_rows(4, 5, seed=1)
    whole, parts = stats_of(x, c), Stats.zeros(4, 5)
    for block in reversed(torch.split(x, 7)):
        parts.add_(block, exact_square(block), assign(block, Centroids.of(c)).labels)
    assert all(torch.equal(a, b) for a, b in zip(parts.tensors, whole.tensors, strict=True))
    labels = squares_in_integers(x, c).argmin(1)
    assert whole.sums.tolist() == [integers(x)[labels == k].sum(0).tolist() for k in range(4)]


@pytest.mark.parametrize("num_labels", [4, 11, 40])  # as many rows as labels pay for a table, fewer do not
def test_rows_that_change_their_label_leave_no_trace_at_the_old_one(num_labels: int) -> None:
    x, draws = unit_rows(30, 5), torch.Generator().manual_seed(0)
    before, after = torch.randint(0, num_labels, (2, 30), generator=draws)
    after[11:] = before[11:]
    stats, expected = Stats.zeros(num_labels, 5), Stats.zeros(num_labels, 5)
    stats.add_(x, exact_square(x), before)
    stats.add_(x[:11], exact_square(x[:11]), after[:11], before[:11])
    expected.add_(x, exact_square(x), after)
    assert all(torch.equal(a, b) for a, b in zip(stats.tensors, expected.tensors, strict=True))


@pytest.mark.parametrize("dim", [1, 5, 192, 2048])
def test_spreads_from_sums_are_those_of_integer_arithmetic_over_rows(dim: int) -> None:
    x, c = unit_rows(60, dim), unit_rows(7, dim, seed=1)
    squares = squares_in_integers(x, c)
    labels = squares.argmin(1)
    expected = [sum(squares[labels == k, k].tolist()) for k in range(7)]
    assert stats_of(x, c).spreads(Centroids.of(c)) == expected


def test_spreads_hold_where_64_bits_would_not() -> None:
    row = to_grid(torch.tensor([[0.6, -0.8]]))
    stats, num = stats_of(row, row), 2**33
    many = Stats(*(t * num for t in stats.tensors))
    other = to_grid(torch.tensor([[-0.6, 0.8]]))
    assert many.spreads(Centroids.of(row)) == [0]
    assert many.spreads(Centroids.of(other)) == [num * int(squares_in_integers(row, other)[0, 0])]


def test_means_are_the_nearest_grid_points_and_halves_go_up() -> None:
    stats = Stats(torch.tensor([2, 2, 3]), torch.tensor([[3], [-3], [-4]]), torch.zeros(2, 3, dtype=torch.int64))
    means, repaired = update_centroids(torch.zeros(3, 1), stats, [0, 0, 0], 0)
    assert integers(means).tolist() == [[2], [-1], [-1]]
    assert repaired == 0


def test_a_mean_of_equal_rows_is_that_row() -> None:
    row = unit_rows(1, 192)
    assert torch.equal(finished(row, stats_of(row.repeat(7, 1), row))[0], row)


def test_spherical_means_are_unit_rows_on_the_grid() -> None:
    x, c = unit_rows(40, 12), unit_rows(3, 12, seed=1)
    means, _ = finished(c, stats_of(x, c), spherical=True)
    assert torch.equal(means, to_grid(means))
    assert torch.allclose(means.double().norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_an_empty_cluster_takes_rows_of_the_largest_that_has_unequal_ones() -> None:
    spread, equal = unit_rows(12, 3), unit_rows(1, 3, seed=1).repeat(20, 1)
    counts = torch.tensor([12, 20, 0, 0])
    sums = torch.stack([torch.from_numpy(integers(r)).sum(0) for r in (spread, equal, spread[:0], spread[:0])])
    centroids = torch.cat([to_grid(spread.mean(0, keepdim=True)), equal[:1], torch.zeros(2, 3)])
    stats, spreads = Stats(counts, sums, torch.zeros(2, 4, dtype=torch.int64)), [2**48, 0, 0, 0]
    new, repaired = update_centroids(centroids, stats, spreads, step=3)
    assert repaired == 2
    assert torch.equal(new[:2], update_centroids(centroids, stats, [0] * 4, step=3)[0][:2])
    assert 0 < (new[2] - new[0]).norm() < 0.3
    assert 0 < (new[3] - new[0]).norm() < 0.3
    shared, unshared = stats_of(spread, new), stats_of(spread, new[:2])
    assert (shared.counts[[0, 2, 3]] > 0).sum() >= 2
    assert sum(shared.spreads(Centroids.of(new))) < sum(unshared.spreads(Centroids.of(new[:2])))
    assert torch.equal(update_centroids(centroids, stats, spreads, step=3)[0], new)
    later = [update_centroids(centroids, stats, spreads, step=step)[0] for step in range(4, 9)]
    assert not all(torch.equal(other, new) for other in later)  # another step tries another direction


def test_clusters_of_equal_rows_are_not_split() -> None:
    row = unit_rows(1, 3)
    c = row.repeat(3, 1)
    new, repaired = finished(c, stats_of(row.repeat(9, 1), c))
    assert repaired == 0
    assert torch.equal(new, c)


def test_a_cluster_near_an_axis_is_split_inside_of_the_grid() -> None:
    rows = to_grid(torch.tensor([[-0.9922, 0.1247], [-0.9922, -0.1247]]))
    counts, sums = torch.tensor([2, 0]), torch.stack([torch.from_numpy(integers(rows)).sum(0), torch.zeros(2)]).long()
    stats = Stats(counts, sums, torch.zeros(2, 2, dtype=torch.int64))
    new, repaired = update_centroids(rows[:1].repeat(2, 1), stats, [2**50, 0], 0)
    assert repaired == 1
    assert float(new.abs().max()) <= 1
    assert not torch.equal(new[0], new[1])
