from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, ShardedRows, join_rows
from grappa_dist.kmeans import seeding
from grappa_dist.kmeans.seeding import SeedingState, rows_at, seed_places
from tests.kmeans.test_lloyd import clustered, cuts, good_rows, part_of
from tests.processes import run_ranks

CASES = {
    "clusters": (clustered(500, 8, 30), 60),
    "fewer distinct rows than labels": (np.repeat(clustered(20, 6, 5), 11, axis=0), 40),
    "each its own": (clustered(37, 4, 9), 37),
}


def at(places: Iterable[int], drawn: int) -> SeedingState:
    return SeedingState(torch.tensor(list(places)), drawn)


def shard_rows(comm: Comm, x: np.ndarray) -> ShardedRows:
    edges = cuts(len(x), comm.size)
    return join_rows(comm, part_of(x, edges[comm.rank], edges[comm.rank + 1]), device=torch.device("cpu"))


def seed_centroids(sharded: ShardedRows, num: int, seed: int, **how: Any) -> Tensor:
    return rows_at(sharded, seed_places(sharded, num, seed, **how))


def rounds_of(name: str) -> tuple[np.ndarray, list[SeedingState]]:
    """Centroids of a seeding that nothing interrupts, and its state after each round."""
    (x, num), rounds = CASES[name], list[SeedingState]()
    return seed_centroids(
        shard_rows(Comm(), x), num, 5, on_round=lambda seeded, wanted: rounds.append(seeded)
    ).numpy(), rounds


def resumed(comm: Comm, name: str, rounds: list[SeedingState]) -> list[np.ndarray]:
    x, num = CASES[name]
    sharded = shard_rows(comm, x)
    return [seed_centroids(sharded, num, 5, resume=seeded).numpy() for seeded in rounds]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_seeding_resumed_after_any_round_ends_as_if_it_had_not_stopped(name: str, ranks: int) -> None:
    whole, rounds = rounds_of(name)
    assert len(rounds) >= 5
    for found in run_ranks(resumed, ranks, name, rounds[::3] + rounds[-1:]):
        assert all(np.array_equal(centroids, whole) for centroids in found)


def test_every_round_adds_to_what_was_drawn() -> None:
    whole, rounds = rounds_of("clusters")
    x = CASES["clusters"][0]
    assert [len(seeded.places) for seeded in rounds[:3]] == [1, 2, 3]
    for before, after in pairwise(rounds):
        assert torch.equal(after.places[: len(before.places)], before.places)
        assert after.drawn - before.drawn == max(1, min(len(before.places) // 2, 60 - len(before.places)))
    assert good_rows(x)[rounds[-1].places].all()
    assert len(rounds[-1].places) == len(whole) == 60


def test_the_lowest_rows_that_were_not_chosen_fill_up() -> None:
    name = "fewer distinct rows than labels"
    whole, rounds = rounds_of(name)
    chosen, good = rounds[-1].places.tolist(), np.flatnonzero(good_rows(CASES[name][0]))
    rest = [row for row in good.tolist() if row not in chosen][: 40 - len(chosen)]
    assert len(chosen) < 40
    wanted = torch.from_numpy(CASES[name][0])[[*chosen, *rest]].numpy()
    assert np.abs(whole - wanted).max() <= 2**-25  # they are on the grid


@pytest.mark.parametrize(
    "wrong",
    [at((0, 5), 4), at((0, 0), 4), at((0, 900), 4), at((0, 1, 2), 2), at(range(70), 80)],
    ids=["a bad row", "one twice", "no row", "more than were drawn", "more than there are labels"],
)
def test_a_resume_of_another_seeding_is_refused(wrong: SeedingState) -> None:
    x, num = CASES["clusters"]
    with pytest.raises(ValueError, match=r"resume has \d+ rows drawn from \d+ candidates"):
        seed_centroids(shard_rows(Comm(), x), num, 5, resume=wrong)


def test_rows_that_fill_up_are_looked_for_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.repeat(clustered(1, 3, 1), 5 * 2**16, axis=0)
    sharded = join_rows(Comm(), Rows([x], [np.ones(len(x), dtype=bool)]), device=torch.device("cpu"))
    looked = list[int]()
    monkeypatch.setattr(seeding.torch, "isin", lambda a, b, isin=torch.isin: looked.append(len(a)) or isin(a, b))
    assert len(seed_centroids(sharded, 4, 0)) == 4
    assert looked == [2**16]
