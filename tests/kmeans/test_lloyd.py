from __future__ import annotations

from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, Rows, join_rows
from grappa_dist.kmeans.lloyd import (
    BoundedPasses,
    KMeansResult,
    KMeansState,
    KMeansTask,
    ProgressCallbacks,
    sharded_kmeans,
)
from grappa_dist.search.fixed_point import GRID, to_grid
from tests.processes import run_ranks


def clustered(num: int, dim: int, groups: int, seed: int = 0) -> np.ndarray:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=g)
    rows = centres[torch.randint(0, groups, (num,), generator=g)] + 0.4 * torch.randn(num, dim, generator=g)
    unit: np.ndarray = F.normalize(rows, dim=1).numpy()
    return unit


def lattice() -> np.ndarray:
    """All corners, edges and faces of a cube in four dimensions: most rows are equally far from several others."""
    return np.array(np.meshgrid(*[[-1, 0, 1]] * 4)).reshape(4, -1).T.astype(np.float32) / 4


START = np.repeat(clustered(1, 6, 1), 8, axis=0)  # all rows go to the first, the others are repaired

CASES: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "clusters": (clustered(400, 12, 9), {"num_labels": 24, "iterations": 6}),
    "spherical": (clustered(300, 8, 7), {"num_labels": 15, "iterations": 4, "spherical": True}),
    "early stop": (clustered(300, 8, 7), {"num_labels": 7, "iterations": 30, "tolerance": 0.02}),
    "duplicates": (np.repeat(clustered(20, 6, 5), 11, axis=0), {"num_labels": 33, "iterations": 3}),
    "all equal": (np.repeat(clustered(1, 5, 1), 40, axis=0), {"num_labels": 4, "iterations": 3}),
    "exact ties": (lattice(), {"num_labels": 12, "iterations": 5}),
    "each its own": (clustered(37, 4, 9), {"num_labels": 37, "iterations": 2}),
    "one dimension": (np.linspace(-1, 1, 101, dtype=np.float32)[:, None], {"num_labels": 10, "iterations": 8}),
    "one label": (clustered(30, 3, 3), {"num_labels": 1, "iterations": 3}),
    "equal starts": (clustered(200, 6, 5), {"num_labels": 8, "iterations": 12, "initial": START}),
    "groups": (clustered(1500, 32, 300), {"num_labels": 600, "iterations": 6}),
    "no iteration": (clustered(30, 3, 3), {"num_labels": 5, "iterations": 0}),
    "2048 dimensions": (clustered(90, 2048, 6), {"num_labels": 7, "iterations": 3}),
}


def good_rows(x: np.ndarray) -> np.ndarray:
    good = np.ones(len(x), dtype=bool)
    if len(x) > 37:
        good[5::17] = False
    return good


def cuts(num: int, size: int) -> list[int]:
    """Uneven: one rank without a row, one with a single row."""
    return {1: [0, num], 2: [0, 1, num], 3: [0, num // 5, num // 5, num], 5: [0, 0, 1, num // 2, num - 3, num]}[size]


def part_of(x: np.ndarray, first: int, last: int) -> Rows:
    """Rows in shards of uneven size, one of them empty."""
    inner = sorted({first, first + (last - first) // 3, last})
    edges = [*pairwise(inner), (last, last)] if last > first else []
    return Rows([x[a:b] for a, b in edges], [good_rows(x)[a:b] for a, b in edges])


SETTINGS = ("iterations", "tolerance", "spherical")


def unchecked(**settings: Any) -> ClusteringConfig:
    """Settings that a config would refuse: no iteration at all."""
    return ClusteringConfig().model_copy(update=settings)


def fit(comm: Comm, rows: Rows, settings: dict[str, Any], *, block_rows: int = BLOCK_ROWS, **more: Any) -> KMeansResult:
    given = {**settings, **more}
    num_labels, config = given.pop("num_labels"), {k: given.pop(k) for k in SETTINGS if k in given}
    return sharded_kmeans(comm, rows, num_labels, KMeansTask(unchecked(**config), **given), block_rows=block_rows)


def run_cases(comm: Comm, block_rows: int) -> dict[str, KMeansResult]:
    results = {}
    for name, (x, settings) in CASES.items():
        edges = cuts(len(x), comm.size)
        rows = part_of(x, edges[comm.rank], edges[comm.rank + 1])
        results[name] = fit(comm, rows, settings, seed=3, block_rows=block_rows)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, KMeansResult]:
    return run_cases(Comm(), 10**6)


@pytest.mark.parametrize(
    ("size", "block_rows"),
    [(1, 50), (2, 17), pytest.param(3, 1000, marks=pytest.mark.slow), pytest.param(5, 64, marks=pytest.mark.slow)],
)
def test_ranks_and_blocks_change_no_bit(alone: dict[str, KMeansResult], size: int, block_rows: int) -> None:
    found = [run_cases(Comm(), block_rows)] if size == 1 else run_ranks(run_cases, size, block_rows)
    for name, expected in alone.items():
        ranks = [results[name] for results in found]
        labels = np.concatenate([part for result in ranks for part in result.labels])
        assert np.array_equal(labels, np.concatenate(expected.labels)), name
        for result in ranks:
            assert np.array_equal(result.centroids, expected.centroids), name
            assert np.array_equal(result.counts, expected.counts), name
            assert (result.inertia, result.empty_repaired, result.empty_left) == (
                expected.inertia,
                expected.empty_repaired,
                expected.empty_left,
            ), name


def test_inertia_never_rises_and_labels_belong_to_the_centroids(alone: dict[str, KMeansResult]) -> None:
    for name, (x, settings) in CASES.items():
        result, good = alone[name], good_rows(x)
        labels = np.concatenate(result.labels)
        assert (labels == -1).tolist() == (~good).tolist(), name
        assert np.bincount(labels[good], minlength=settings["num_labels"]).tolist() == result.counts.tolist(), name
        assert result.empty_left == (result.counts == 0).sum(), name
        squares = distances(x[good], result.centroids)
        assert labels[good].tolist() == squares.argmin(1).tolist(), name
        assert result.inertia[-1] == pytest.approx(squares.min(1).sum() / 2**48, rel=1e-15), name
        if name != "spherical":
            assert all(b <= a for a, b in pairwise(result.inertia)), name


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    a, c = ((to_grid(torch.from_numpy(t)).double() * GRID).long().numpy() for t in (x, centroids))
    return np.square(a[:, None] - c).sum(2)


def test_every_iteration_is_that_of_integer_arithmetic() -> None:
    x = clustered(300, 6, 8)
    centroids = to_grid(torch.from_numpy(x[:10])).numpy()
    result = sharded_kmeans(
        Comm(), Rows([x], [np.ones(300, dtype=bool)]), 10, KMeansTask(unchecked(iterations=5), initial=centroids)
    )
    rows = (to_grid(torch.from_numpy(x)).double() * GRID).long()
    for _ in range(5):
        labels = distances(x, centroids).argmin(1)
        means = [
            [(2 * int(s) + n) // (2 * n) for s in rows[labels == k].sum(0)] for k, n in enumerate(np.bincount(labels))
        ]
        centroids = np.array(means, dtype=np.float32) / np.float32(GRID)
    assert np.array_equal(result.centroids, centroids)


def test_as_many_labels_as_distinct_rows_leave_no_distance(alone: dict[str, KMeansResult]) -> None:
    assert alone["each its own"].inertia[-1] == 0
    assert alone["each its own"].counts.tolist() == [1] * 37
    duplicates = alone["duplicates"]
    assert (duplicates.inertia[-1], duplicates.empty_left) == (0, 13)  # 20 distinct rows, 33 labels
    assert alone["all equal"].counts.tolist() == [37, 0, 0, 0]


def test_equal_starts_are_separated_by_repairs(alone: dict[str, KMeansResult]) -> None:
    result = alone["equal starts"]
    assert (result.empty_repaired >= 7, result.empty_left) == (True, 0)
    assert result.inertia[-1] < 0.5 * result.inertia[0]


def test_the_objective_is_that_of_faiss_from_the_same_start() -> None:
    x = clustered(2000, 16, 40)
    rows = Rows([x], [np.ones(len(x), dtype=bool)])
    start = sharded_kmeans(Comm(), rows, 50, KMeansTask(unchecked(iterations=0))).centroids
    ours = sharded_kmeans(Comm(), rows, 50, KMeansTask(unchecked(iterations=10), initial=start))
    theirs = faiss.Kmeans(16, 50, niter=10, max_points_per_centroid=10**9, min_points_per_centroid=1)
    theirs.train(x, init_centroids=start)
    objective = float(theirs.index.search(x, 1)[0].sum())
    assert ours.inertia[-1] == pytest.approx(objective, rel=0.005)


def test_seeding_is_as_good_as_that_of_faiss_and_better_than_random_rows() -> None:
    x = clustered(2000, 16, 40)
    rows = Rows([x], [np.ones(len(x), dtype=bool)])
    starts = [sharded_kmeans(Comm(), rows, 40, KMeansTask(unchecked(iterations=0), seed=seed)) for seed in range(5)]
    seeded = [r.inertia[-1] for r in starts]
    assert len(set(seeded)) == 5
    chosen = [x[np.random.default_rng(seed).permutation(len(x))[:40]] for seed in range(5)]
    random = [
        sharded_kmeans(Comm(), rows, 40, KMeansTask(unchecked(iterations=0), initial=c)).inertia[-1] for c in chosen
    ]
    assert np.mean(seeded) < 0.9 * np.mean(random)


def test_callback_and_tolerance_follow_inertia(alone: dict[str, KMeansResult]) -> None:
    x, settings = CASES["early stop"]
    reported: list[tuple[int, float]] = []
    rows = part_of(x, 0, len(x))
    result = fit(
        Comm(),
        rows,
        settings,
        seed=3,
        callbacks=ProgressCallbacks(on_iteration=lambda part, i, value: reported.append((i, value))),
    )
    assert [value for _, value in reported] == result.inertia == alone["early stop"].inertia
    assert [i for i, _ in reported] == list(range(len(result.inertia)))
    assert 3 <= len(result.inertia) < 31
    *_, before, last = result.inertia
    assert before - last < 0.02 * before


@pytest.mark.parametrize("name", ["clusters", "equal starts", "exact ties", "spherical", "groups"])
def test_a_run_resumed_after_any_update_ends_as_if_it_had_not_stopped(
    alone: dict[str, KMeansResult], name: str
) -> None:
    x, settings = CASES[name]
    saved: list[KMeansState] = []
    rows = part_of(x, 0, len(x))
    fit(Comm(), rows, settings, seed=3, on_update=saved.append)
    updates = [progress for progress in saved if not progress.seeded]
    assert len(updates) >= 4
    for progress in (*saved[:2], *updates[:3]):
        seed = 3 if progress.seeded else 99  # which nothing is drawn from any more
        resumed = fit(Comm(), rows, settings, seed=seed, resume=progress)
        assert np.array_equal(resumed.centroids, alone[name].centroids)
        assert np.array_equal(np.concatenate(resumed.labels), np.concatenate(alone[name].labels))
        assert resumed.inertia == alone[name].inertia
        assert resumed.empty_repaired == alone[name].empty_repaired


def test_many_labels_are_searched_by_groups() -> None:
    x, settings = CASES["groups"]
    sharded = join_rows(Comm(), part_of(x, 0, len(x)), device=torch.device("cpu"))
    passes = BoundedPasses.over(sharded, to_grid(torch.from_numpy(x[: settings["num_labels"]])))
    assert len(passes.groups.members) > 1


@pytest.mark.slow
def test_more_pairs_of_row_and_centroid_than_32_bits_count_are_all_distinguished() -> None:
    num, num_labels = 66_000, 33_000
    assert num * num_labels > 2**31
    x = clustered(num, 16, num)
    result = sharded_kmeans(
        Comm(),
        Rows([x], [np.ones(num, dtype=bool)]),
        num_labels,
        KMeansTask(unchecked(iterations=0), initial=x[-num_labels:]),
    )
    some = np.random.default_rng(0).choice(num, 200, replace=False)
    exact = distances(x[some], to_grid(torch.from_numpy(x[-num_labels:])).numpy())
    assert result.labels[0][some].tolist() == exact.argmin(1).tolist()


def test_a_value_a_little_above_one_counts_alike_in_any_shard_and_memory() -> None:
    x = np.array([[1 + 2**-13], [1], [0.5], [-0.5], [0.2]], np.float32)
    good = np.array([True, True, True, True, False])
    fixed = x.copy()
    fixed.flags.writeable = False
    found = [
        sharded_kmeans(Comm(), Rows(shards, flags), 2, KMeansTask(initial=x[[1, 3]]))
        for shards, flags in (([x], [good]), ([x[:4], x[4:]], [good[:4], good[4:]]), ([fixed], [good]))
    ]
    assert len({tuple(result.inertia) for result in found}) == 1


def test_a_value_of_no_unit_row_is_refused() -> None:
    rows = Rows([np.array([[0.5], [1.004]], np.float32)], [np.ones(2, dtype=bool)])
    with pytest.raises(ValueError, match=r"shard 0: row 1 has norm 1\.004"):
        sharded_kmeans(Comm(), rows, 1)


def test_a_resume_of_another_run_is_refused() -> None:
    rows = Rows([clustered(9, 4, 3)], [np.ones(9, dtype=bool)])
    with pytest.raises(ValueError, match=r"resume has \(2, 4\) centroids after 0 updates, expected \(3, 4\)"):
        sharded_kmeans(Comm(), rows, 3, KMeansTask(resume=KMeansState(np.zeros((2, 4), np.float32), ())))
    with pytest.raises(ValueError, match="after at most 1"):
        sharded_kmeans(
            Comm(),
            rows,
            3,
            KMeansTask(unchecked(iterations=1), resume=KMeansState(np.zeros((3, 4), np.float32), (5, 4))),
        )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "centroid 1 is not finite"),
        (np.inf, "centroid 1 is not finite"),
        (0.1, "centroid 1 is off the grid"),
        (2.0, "centroid 1 is off the grid"),
    ],
)
def test_a_resume_with_numbers_that_no_update_makes_is_refused(value: float, words: str) -> None:
    x = clustered(9, 4, 3)
    centroids = to_grid(torch.from_numpy(x[:3])).numpy()
    centroids[1, 2] = value
    with pytest.raises(ValueError, match=f"resume: {words}"):
        sharded_kmeans(Comm(), Rows([x], [np.ones(9, dtype=bool)]), 3, KMeansTask(resume=KMeansState(centroids, ())))


@pytest.mark.parametrize(
    "settings", [{"iterations": -1}, {"tolerance": 1.0}, {"tolerance": -0.1}, {"tolerance": np.nan}]
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"for ClusteringConfig\n{name}\n +Input should be (greater|less) than"):
        ClusteringConfig(**settings)


def test_without_tolerance_all_updates_are_made_also_where_inertia_rises() -> None:
    x = clustered(30, 3, 4) * np.linspace(0.1, 1, 30, dtype=np.float32)[:, None]  # far from means of norm 1
    result = fit(Comm(), Rows([x], [np.ones(30, dtype=bool)]), {"num_labels": 3}, spherical=True, iterations=8)
    assert result.inertia[1] > result.inertia[0]
    assert len(result.inertia) > 2  # it went on after that


def test_bounds_spare_most_distances_once_centroids_settle() -> None:
    x = clustered(6000, 64, 600)
    result = sharded_kmeans(
        Comm(), Rows([x], [np.ones(len(x), dtype=bool)]), 1024, KMeansTask(unchecked(iterations=12))
    )
    assert result.searched_share < 0.5


def refused(comm: Comm, fault: str) -> str:
    x = clustered(20, 4, 3)
    good = np.ones(10, dtype=bool)
    own = x[10 * comm.rank : 10 * comm.rank + 10].copy()
    num_labels, dim = 3, 4
    if fault == "labels":
        num_labels, good[0] = 19, False
    elif comm.rank == 1 and fault == "nan":
        own[6, 2] = np.nan
    elif comm.rank == 1 and fault == "dimension":
        dim = 3
    elif comm.rank == 1 and fault == "no dimension":
        dim = 0
    masks = [] if comm.rank == 1 and fault == "masks" else [good]
    try:
        sharded_kmeans(comm, Rows([own[:, :dim]], masks, [f"rows-{comm.rank}.npy"]), num_labels)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("labels", "num_labels must be from 1 to the number of good rows, 18, got 19"),
        ("nan", "rows-1.npy: row 6 has a NaN or infinite value"),
        ("dimension", "same dimension on every rank, found [3, 4]"),
        ("no dimension", "rows-1.npy: rows must have at least one dimension, found (10, 0)"),
        ("masks", "there must be a mask of good rows for each of the 1 shards, got 0"),
    ],
)
def test_impossible_input_is_refused_on_every_rank(fault: str, words: str) -> None:
    messages = run_ranks(refused, 2, fault)
    assert all(words in message for message in messages)


def test_initial_centroids_of_another_shape_are_refused() -> None:
    rows = Rows([clustered(9, 4, 3)], [np.ones(9, dtype=bool)])
    with pytest.raises(ValueError, match=r"initial centroids must be \(3, 4\), found \(2, 4\)"):
        sharded_kmeans(Comm(), rows, 3, KMeansTask(initial=np.zeros((2, 4), np.float32)))
