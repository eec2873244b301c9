from __future__ import annotations

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.kmeans.sampling import distributed_topk
from tests.kmeans.test_methods import shard_rows
from tests.processes import run_ranks

NUM, GROUPS, BITS = 500, 7, 40
ROWS = np.ones((NUM, 1), np.float32)
WANTED = [0, 3, 1000, 1, 40, 5, 2]  # none, some, more than there are


def table(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Groups and keys of all rows; the last group has no row."""
    draws = np.random.default_rng(5)
    groups = draws.integers(-1, GROUPS - 1, NUM).astype(np.int32)
    most = {"distinct": 2**BITS, "tied": 3, "equal": 1}[kind]
    return groups, draws.integers(0, most, NUM)


def taken(comm: Comm, kind: str) -> list[int]:
    sharded = shard_rows(comm, ROWS, 16)
    groups, keys = (torch.from_numpy(t[sharded.first : sharded.first + len(sharded.rows)]) for t in table(kind))
    selection = distributed_topk(sharded, groups, keys, torch.tensor(WANTED), bits=BITS)
    places = torch.arange(len(groups)) + sharded.first
    found: list[int] = places[selection.takes(groups, keys, places)].tolist()
    return found


@pytest.mark.parametrize("kind", ["distinct", "tied", "equal"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_lowest_of_each_group_are_taken_and_ties_go_by_place(kind: str, size: int) -> None:
    groups, keys = table(kind)
    expected: list[int] = []
    for group, num in enumerate(WANTED):
        own = np.flatnonzero(groups == group)
        expected += own[np.argsort(keys[own], kind="stable")[:num]].tolist()
    found = [taken(Comm(), kind)] if size == 1 else run_ranks(taken, size, kind)
    assert [place for places in found for place in places] == sorted(expected)
