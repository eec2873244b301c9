from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.data.rng import draw
from grappa_dist.kmeans import seeding
from grappa_dist.kmeans.seeding import accept, candidates_per_round, to_weights
from grappa_dist.search.fixed_point import GRID, to_grid


def unit_rows(num: int, dim: int) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)), dim=1))


def squares_in_integers(x: Tensor, c: Tensor) -> np.ndarray:
    a, b = ((t.double() * GRID).long().numpy() for t in (x, c))
    return np.square(a[:, None] - b).sum(2)


def test_only_equal_rows_have_no_weight() -> None:
    squares = torch.tensor([0, 1, 2**21, 2**21 + 1, 4 * 2**48])
    assert to_weights(squares).tolist() == [0, 1, 1, 2, 2**29]


def test_draws_are_the_same_on_every_machine_and_cover_their_range() -> None:
    assert [draw(10**18, 0, 64, j) for j in range(3)] == [51017153478879224, 118348137470695837, 749094768012719914]
    assert {draw(5, 1, 2, j) for j in range(100)} == set(range(5))
    assert draw(1, 7, 8, 9) == 0


def test_accepted_candidates_follow_the_law_of_one_draw_at_a_time() -> None:
    rows = to_grid(torch.tensor([[0.0], [0.05], [0.4], [0.9], [-0.6]]))
    squares = (squares_in_integers(rows, rows) // 2**21).tolist()
    weights = squares[0]  # row 0 is a centroid already
    wanted: dict[tuple[int, int], float] = {}
    for a in range(1, 5):
        now = [min(w, s) for w, s in zip(weights, squares[a], strict=True)]
        for b in range(5):
            wanted[a, b] = weights[a] / sum(weights) * now[b] / sum(now)
    rng, trials = np.random.default_rng(0), 6000
    found: dict[tuple[int, int], int] = {}
    for _ in range(trials):
        drawn = rng.choice(5, size=40, p=np.array(weights) / sum(weights)).tolist()
        kept = accept(rows[drawn], [weights[i] for i in drawn], [int(rng.integers(weights[i])) for i in drawn], 2)
        pair = (drawn[kept[0]], drawn[kept[1]])
        found[pair] = found.get(pair, 0) + 1
    for pair, p in wanted.items():
        assert abs(found.get(pair, 0) - trials * p) <= 4 * math.sqrt(trials * p * (1 - p)) + 1


def test_a_candidate_is_accepted_once_and_no_more_than_asked() -> None:
    rows = unit_rows(3, 4)
    weights = [2**26] * 6
    assert accept(torch.cat([rows, rows]), weights, [0] * 6, 6) == [0, 1, 2]
    assert accept(torch.cat([rows, rows]), weights, [0] * 6, 2) == [0, 1]
    assert accept(rows, weights[:3], [2**26 - 1] * 3, 3)[0] == 0  # the first of a round always is


def test_many_candidates_are_thinned_out_block_by_block_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(60, 3)
    weights = np.random.default_rng(0).integers(1, 2**28, 60).tolist()
    draws = [draw(w, 0, i) for i, w in enumerate(weights)]
    for at_most in (60, 11, 5):
        expected = accept(rows, weights, draws, at_most)
        for table in (1, 7, 59):
            monkeypatch.setattr(seeding, "_TABLE", table)
            assert accept(rows, weights, draws, at_most) == expected
        monkeypatch.undo()
    assert 11 < len(accept(rows, weights, draws, 60)) < 60


def test_a_round_draws_half_a_table_or_a_share_of_the_centroids() -> None:
    few = [candidates_per_round(num, 10**6) for num in (0, 1, 2, 3, 100, 4096, 5000, 131_072 + 63)]
    assert few == [1, 1, 1, 1, 50, 2048, 2048, 2048]
    assert candidates_per_round(131_072 + 64, 10**6) == 2049
    assert candidates_per_round(640_000, 10**6) == 10_000
    assert [candidates_per_round(100, 7), candidates_per_round(640_000, 1)] == [7, 1]


def test_a_million_centroids_take_some_two_hundred_rounds() -> None:
    num, rounds = 1, 1
    while num < 10**6:
        num, rounds = num + candidates_per_round(num, 10**6 - num), rounds + 1
    assert 200 < rounds < 230  # where all candidates are kept
