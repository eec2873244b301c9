from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn import exact
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.search.fixed_point import GRID, to_grid
from tests.processes import run_ranks

pytestmark = pytest.mark.usefixtures("two_threads")


def unit_rows(num: int, dim: int, seed: int = 0) -> np.ndarray:
    rows: np.ndarray = F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()
    return rows


def half_copies(num: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = unit_rows(num, dim)
    x[rng.permutation(num)[: num // 2]] = x[rng.integers(0, num, num // 2)]
    return x


CASES = {
    "rows": (unit_rows(150, 16), 5),
    "half copies": (half_copies(140, 12), 5),
    "all equal": (np.repeat(unit_rows(1, 6), 60, axis=0), 5),
    "signs": (np.sign(unit_rows(40, 1)), 3),
    "few": (unit_rows(4, 8), 5),
    "two": (unit_rows(2, 8), 1),
}


def ids_of(x: np.ndarray) -> np.ndarray:
    """Row ids that are not consecutive: bad rows are left out before."""
    return np.arange(len(x), dtype=np.int64) * 3 + 2**40


Results = dict[str, tuple[np.ndarray, np.ndarray]]


def run_cases(
    comm: Comm, block_rows: int, copies: bool | None = None, kept_bytes: int | None = None, device: str = "cpu"
) -> Results:
    results = {}
    for name, (x, k) in CASES.items():
        n = len(x)
        few = {1: [0, n], 2: [0, 1, n], 3: [0, n // 4, n // 4, n], 4: [0, n // 5, n // 2, n // 2 + 1, n]}
        edges = few[comm.size]  # a single row, no row
        own = slice(edges[comm.rank], edges[comm.rank + 1])
        how: dict[str, Any] = {"block_rows": block_rows, "copies": copies, "kept_bytes": kept_bytes, "device": device}
        results[name] = sharded_knn(comm, x[own], ids_of(x)[own], k, **how)
    return results


def brute_force(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    grid = (to_grid(torch.from_numpy(x)).double() * GRID).long().numpy()
    scores, row_ids = grid @ grid.T, ids_of(x)
    ids, best = np.full((len(x), k), -1), np.full((len(x), k), -np.inf, np.float32)
    for i, row in enumerate(scores.tolist()):
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-row[j], j))[:k]
        ids[i, : len(order)] = row_ids[order]
        best[i, : len(order)] = np.array([row[j] for j in order], np.float64) / GRID**2
    return ids, best


@pytest.mark.parametrize(("size", "block_rows"), [(1, 10**6), (1, 13), (2, 32), (3, 1000), (4, 11)])
def test_the_graph_is_that_of_brute_force_bit_for_bit(size: int, block_rows: int) -> None:
    check([run_cases(Comm(), block_rows)] if size == 1 else run_ranks(run_cases, size, block_rows))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("block_rows", "kept_bytes"), [(10**6, None), (13, None), (13, 4 * 16 * 13 * 2), (32, 0)])
def test_every_block_may_visit_every_rank(size: int, block_rows: int, kept_bytes: int | None) -> None:
    how = (block_rows, True, kept_bytes)
    check([run_cases(Comm(), *how)] if size == 1 else run_ranks(run_cases, size, *how))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept_bytes", [None, 0])
def test_the_graph_is_that_of_brute_force_on_a_gpu(kept_bytes: int | None) -> None:
    check([run_cases(Comm(), 13, None, kept_bytes, "cuda")])


def check(found: Sequence[Results]) -> None:
    for name, (x, k) in CASES.items():
        ids, scores = (np.concatenate([results[name][part] for results in found]) for part in (0, 1))
        wanted_ids, wanted_scores = brute_force(x, k)
        assert np.array_equal(ids, wanted_ids), name
        assert np.array_equal(scores, wanted_scores), name
        assert (ids.dtype, scores.dtype) == (np.int64, np.float32)


def test_blocks_within_the_memory_budget_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = unit_rows(30, 8), np.arange(30)
    read = list[int]()

    def counting(rows: torch.Tensor) -> torch.Tensor:
        read.append(len(rows))
        return to_grid(rows)

    monkeypatch.setattr(exact, "rounded", counting)
    sharded_knn(Comm(), x, ids, 3, block_rows=10, copies=True)
    assert read == [10] * 3
    read.clear()
    sharded_knn(Comm(), x, ids, 3, block_rows=10, copies=True, kept_bytes=2 * 10 * 8 * 4 + 1)  # two of three
    assert read == [10] * (2 + 1 + 3)  # the third as one that travels, and for each of them


def test_no_rows_at_all_give_an_empty_graph() -> None:
    ids, scores = sharded_knn(Comm(), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 5)
    assert ids.shape == scores.shape == (0, 5)


def refused(comm: Comm, fault: str) -> str:
    x, ids = unit_rows(6, 4), np.arange(6) + 6 * comm.rank
    if comm.rank == 1 and fault == "nan":
        x[4, 1] = np.nan
    elif comm.rank == 1 and fault == "ids":
        ids = ids[:5]
    elif comm.rank == 1 and fault == "dimension":
        x = x[:, :3]
    try:
        sharded_knn(comm, x, ids, 2, block_rows=4)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "features: row 10 has a NaN or infinite value"),
        ("ids", "ids must be (6,) int64, found (5,) int64"),
        ("dimension", "same dimension on every rank, found [3, 4]"),
    ],
)
def test_impossible_input_is_refused_on_every_rank(fault: str, words: str) -> None:
    assert all(words in message for message in run_ranks(refused, 2, fault))


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sharded_knn(Comm(), unit_rows(3, 2), np.arange(3), 0)
