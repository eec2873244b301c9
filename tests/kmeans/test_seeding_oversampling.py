from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import drawn_rows
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, ShardedRows, join_rows
from grappa_dist.distributed.worker import Stopped
from grappa_dist.kmeans import seeding
from grappa_dist.kmeans.sampling import race_keys, row_hashes
from grappa_dist.kmeans.seeding import (
    D2Weights,
    SeedingCandidates,
    SeedingState,
    draw_centroids,
    oversampled_places,
    rows_at,
    to_weights,
)
from grappa_dist.search.fixed_point import GRID, to_grid
from tests.kmeans.test_lloyd import clustered, cuts, good_rows, lattice, part_of
from tests.kmeans.test_seeding import at, seed_centroids
from tests.processes import run_ranks

CASES = {
    "clusters": (clustered(400, 8, 30), 60),
    "fewer distinct rows than labels": (np.repeat(clustered(20, 6, 5), 11, axis=0), 40),
    "many copies of few rows": (np.repeat(clustered(70, 6, 50), 30, axis=0), 60),
    "all equal": (np.repeat(clustered(1, 5, 1), 40, axis=0), 4),
    "exact ties": (lattice(), 12),
    "each its own": (clustered(37, 4, 9), 37),
    "one label": (clustered(30, 3, 3), 1),
    "one dimension": (np.linspace(-1, 1, 101, dtype=np.float32)[:, None], 10),
}


def oversampled_centroids(sharded: ShardedRows, num: int, seed: int, **how: Any) -> Tensor:
    return rows_at(sharded, oversampled_places(sharded, num, seed, **how))


def shard_rows(comm: Comm, x: np.ndarray, block_rows: int = 64) -> ShardedRows:
    edges = cuts(len(x), comm.size)
    rows = part_of(x, edges[comm.rank], edges[comm.rank + 1])
    return join_rows(comm, rows, block_rows=block_rows, device=torch.device("cpu"))


def candidates_at(*places: int) -> SeedingCandidates:
    return SeedingCandidates(torch.tensor(places), torch.ones(len(places), dtype=torch.int64))


@cache
def alone() -> dict[str, np.ndarray]:
    return centroids_of(Comm(), 64)


def centroids_of(comm: Comm, block_rows: int) -> dict[str, np.ndarray]:
    return {
        name: oversampled_centroids(shard_rows(comm, x, block_rows), num, 5).numpy() for name, (x, num) in CASES.items()
    }


@pytest.mark.parametrize(
    ("ranks", "block_rows"),
    [(1, 7), (2, 64), pytest.param(3, 50, marks=pytest.mark.slow), pytest.param(5, 16384, marks=pytest.mark.slow)],
)
def test_centroids_are_the_same_on_any_number_of_ranks_and_blocks(ranks: int, block_rows: int) -> None:
    for found in run_ranks(centroids_of, ranks, block_rows):
        for name, centroids in alone().items():
            assert np.array_equal(found[name], centroids), name


@pytest.mark.parametrize("name", CASES)
def test_centroids_are_good_rows_and_different_as_long_as_there_are_such(name: str) -> None:
    x, num = CASES[name]
    good = to_grid(torch.from_numpy(x))[torch.from_numpy(good_rows(x))].numpy()
    centroids = oversampled_centroids(shard_rows(Comm(), x), num, 5).numpy()
    assert centroids.shape == (num, x.shape[1])
    rows = {row.tobytes() for row in good + np.float32(0)}
    assert {row.tobytes() for row in centroids} <= rows
    assert len({row.tobytes() for row in centroids}) == min(num, len(rows))


def naive_candidates(x: np.ndarray, num: int, seed: int) -> tuple[list[int], Tensor]:
    """Places in the order in which they are drawn, and the rows that each is nearest to; all distances in integers."""
    grid = (to_grid(torch.from_numpy(x)).double() * GRID).long()
    weights = torch.from_numpy(good_rows(x)).long()
    found, nearest = list[int](), torch.full((len(x),), -1)
    for at_once in (1, *[-(-num // 2)] * 5):
        hashes = row_hashes(torch.arange(len(x)), seed, num, 6, len(found))
        keys = race_keys(hashes, weights, max(0, int(weights.max()).bit_length() - 24)).tolist()
        left = [row for row in range(len(x)) if weights[row] > 0]
        new = sorted(sorted(left, key=lambda row: (keys[row], row))[:at_once])
        if not new:
            break
        weights = weights if found else torch.where(weights > 0, 2**62, 0)
        squares, labels = (grid[:, None] - grid[new]).square().sum(2).min(1)
        nearer = to_weights(squares) < weights
        weights[nearer], nearest[nearer] = to_weights(squares)[nearer], labels[nearer] + len(found)
        found += new
    return found, torch.bincount(nearest[nearest >= 0], minlength=len(found))


@pytest.mark.parametrize("name", CASES)
def test_candidates_and_what_they_stand_for_are_those_of_the_plain_algorithm(name: str) -> None:
    x, num = CASES[name]
    states = list[SeedingState]()
    sharded = shard_rows(Comm(), x)
    weights = D2Weights.of(sharded, nearest=True)
    drawn = seeding._seed_candidates(weights, num, 5, SeedingState(), lambda seeded, wanted: states.append(seeded))
    places, times = drawn.places.tolist(), drawn.times.tolist()
    found, counts = naive_candidates(x, num, 5)
    assert states[-1].places.tolist() == found
    assert places == sorted(found)
    assert dict(zip(places, times, strict=True)) == dict(zip(found, counts.tolist(), strict=True))
    assert sum(times) == good_rows(x).sum()


def test_a_row_that_counts_several_times_is_drawn_like_so_many_rows() -> None:
    x = clustered(60, 5, 12)
    times = np.random.default_rng(0).integers(0, 9, len(x))
    rows = [Rows([some], [np.ones(len(some), dtype=bool)]) for some in (x, np.repeat(x, times, axis=0))]
    once, repeated = (join_rows(Comm(), some, device=torch.device("cpu")) for some in rows)
    weights = D2Weights.of(once, times=torch.from_numpy(times))
    seeded = draw_centroids(weights, 25, 3, SeedingState())
    assert torch.equal(rows_at(once, seeded.places), seed_centroids(repeated, 25, 3))
    assert all(times[seeded.places] > 0)


def rounds_of(name: str) -> tuple[np.ndarray, list[tuple[SeedingState, int]]]:
    """Centroids of an initialisation that nothing interrupts, and its state after each round."""
    (x, num), states = CASES[name], list[tuple[SeedingState, int]]()
    sharded = shard_rows(Comm(), x)
    return oversampled_centroids(sharded, num, 5, on_round=lambda *state: states.append(state)).numpy(), states


def resumed(comm: Comm, name: str, states: list[SeedingState]) -> list[np.ndarray]:
    x, num = CASES[name]
    return [oversampled_centroids(shard_rows(comm, x), num, 5, resume=seeded).numpy() for seeded in states]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("clusters", 1),
        pytest.param("clusters", 3, marks=pytest.mark.slow),
        pytest.param("exact ties", 3, marks=pytest.mark.slow),
        ("each its own", 2),
    ],
)
def test_an_initialisation_resumed_after_any_round_ends_as_if_it_had_not_stopped(name: str, ranks: int) -> None:
    whole, states = rounds_of(name)
    for found in run_ranks(resumed, ranks, name, [seeded for seeded, _ in states]):
        assert len(found) == len(states) > 1
        assert all(np.array_equal(centroids, whole) for centroids in found)


def test_every_round_adds_half_as_many_rows_as_there_are_labels() -> None:
    _, states = rounds_of("clusters")
    sizes = [(len(seeded.places), wanted) for seeded, wanted in states if seeded.candidates is None]
    assert sizes == [(n, 151) for n in (1, 31, 61, 91, 121, 151)]
    picks = [(len(seeded.places), wanted) for seeded, wanted in states[len(sizes) :]]
    assert picks[0] == (0, 60)
    assert picks[-1] == (60, 60)
    assert picks == sorted(picks)


@pytest.mark.parametrize(
    "wrong",
    [
        at((0, 5), 2),
        at((0, 0), 2),
        at((0, 900), 2),
        at(range(170), 170),
        replace(at((0,), 1), candidates=candidates_at(1, 5, 8)),
        replace(at((2,), 1), candidates=candidates_at(0, 1, 3)),
    ],
    ids=["a bad row", "one twice", "no row", "more than are drawn", "a bad candidate", "no candidate"],
)
def test_a_resume_of_another_initialisation_is_refused(wrong: SeedingState) -> None:
    x, num = CASES["clusters"]
    with pytest.raises(ValueError, match=r"resume has .* candidates"):
        oversampled_centroids(shard_rows(Comm(), x), num, 5, resume=wrong)


class Reads:
    """Counts the rows that one rank reads by blocks."""

    def __init__(self, sharded: ShardedRows, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, pieces = 0, ShardedRows.pieces

        def counting(which: ShardedRows, positions: Tensor) -> list[Tensor]:
            self.rows += len(positions) if which is sharded else 0
            return pieces(which, positions)

        monkeypatch.setattr(ShardedRows, "pieces", counting)


def test_rows_are_read_six_times_and_fewer_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, states = rounds_of("clusters")
    sharded = shard_rows(Comm(), CASES["clusters"][0])
    reads, good = Reads(sharded, monkeypatch), sharded.num_good
    first_pick = [seeded.candidates is None for seeded, _ in states].index(False)
    for resume, times in (
        (None, 6),
        (states[0][0], 6),
        (states[2][0], 4),
        (states[first_pick][0], 0),
        (states[-1][0], 0),
    ):
        reads.rows = 0
        assert np.array_equal(oversampled_centroids(sharded, 60, 5, resume=resume).numpy(), whole)
        assert reads.rows == times * good + 151  # rounds, all before in one; candidates


@pytest.mark.parametrize("dim", [2, 8])  # in two dimensions many rows are about as near to several candidates
def test_rows_compared_with_few_candidates_at_a_time_change_no_bit(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(600, dim, 30)
    whole = oversampled_centroids(shard_rows(Comm(), x), 120, 5)
    monkeypatch.setattr(seeding, "_AT_ONCE", 7)
    assert torch.equal(oversampled_centroids(shard_rows(Comm(), x), 120, 5), whole)


def slow_look_up(comm: Comm) -> int:
    """On the last rank, which has nearly all rows, each row that is drawn takes its time."""
    seeding._READ, seeding.OVERSAMPLING_ROUNDS = 8, 2
    x = clustered(300, 4, 9)
    own = x[:3] if comm.rank == 0 else x[3:]
    sharded = join_rows(comm, Rows([own], [np.ones(len(own), dtype=bool)]), device=torch.device("cpu"))
    take = sharded.rows.take
    object.__setattr__(sharded.rows, "take", lambda at: time.sleep(0.05 * len(at)) or take(at))
    return len(oversampled_centroids(sharded, 60, 0))


@pytest.mark.slow
def test_a_rank_that_looks_up_many_rows_holds_the_others_up_and_no_more() -> None:
    assert 30 * 0.05 > 1.0  # a round of it takes longer than a collective waits
    assert run_ranks(slow_look_up, 2, collective_s=1.0) == [60, 60]


def stopped_after(comm: Comm, looks: int) -> bool:
    polls = iter(range(looks))
    sharded = shard_rows(comm, CASES["clusters"][0])
    last = comm.rank == comm.size - 1
    sharded = replace(sharded, stop_requested=lambda: last and next(polls, None) is None)
    try:
        oversampled_centroids(sharded, 60, 5)
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("looks", [0, 7, 16, 25])
def test_all_ranks_stop_wherever_one_is_asked_to(looks: int) -> None:
    assert run_ranks(stopped_after, 3, looks) == [True] * 3


def test_rows_that_all_lie_near_to_each_other_are_drawn_by_their_distances_too() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 2e-5, 2000), rng.uniform(0, 5e-2, 100)]).astype(np.float32)[:, None]
    sharded = join_rows(Comm(), Rows([x], [np.ones(len(x), dtype=bool)]), device=torch.device("cpu"))
    places = seeding._seed_candidates(
        D2Weights.of(sharded, nearest=True), 20, 0, SeedingState(), lambda seeded, wanted: None
    ).places
    assert int((places >= 2000).sum()) > 0.8 * len(places)  # 2 or 3 if all were alike


def test_it_starts_from_a_lower_inertia_than_k_means_plus_plus() -> None:
    sharded = shard_rows(Comm(), drawn_rows(3000, 24, 0), 1024)

    def inertia(centroids: Tensor) -> int:
        weights = D2Weights.of(sharded)
        weights.lower([centroids])
        return int(weights.squares.sum())

    for seed in range(3):
        assert inertia(oversampled_centroids(sharded, 200, seed)) < inertia(seed_centroids(sharded, 200, seed))
