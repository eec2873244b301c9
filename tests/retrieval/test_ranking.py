"""Exact rankings block by block: the metrics of metrics.py to the bit, those of the references, and of 10^6 rows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from grappa_dist.metrics import METRICS, as_fractions, mean_of, metrics_of, query_scores
from grappa_dist.retrieval import ranking
from grappa_dist.retrieval.ranking import Ids, Ranker, Ranking, Rows, equal_pairs, on_grid, relevant_counts
from grappa_dist.search.fixed_point import exact_dot


def unit(num: int, dim: int, seed: int) -> Rows:
    rows = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def itself(num: int) -> tuple[Ids, Ids]:
    return np.arange(num), np.arange(num)


def leave_one_out(z: Rows, labels: Ids, depths: tuple[int, ...] = (1, 5, 10)) -> tuple[Ids, Ranking]:
    """The queries that have something to find, and their ranking."""
    sizes = relevant_counts(labels, labels, itself(len(z)))
    rows = np.flatnonzero(sizes > 0)
    ranker = Ranker(z[rows], sizes[rows], depths=depths)
    ranker.add(z, 0, hidden=(np.arange(len(rows)), rows))
    return rows, ranker.finish(labels[rows], labels)


def by_hand(query: int, scores: list[float], labels: list[int], depths: tuple[int, ...]) -> dict[str, float]:
    """The metrics of one query from the scores of all rows; its own is left out."""
    ranked = sorted((row for row in range(len(scores)) if row != query), key=lambda row: (-scores[row], row))
    hits = [labels[row] == labels[query] for row in ranked]
    size = sum(hits)

    def summed(k: int) -> float:
        return sum(sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(hits))) if hits[i]) / size

    found = {"r_precision": sum(hits[:size]) / size, "map_at_r": summed(size)}
    for k in depths:
        found |= {f"recall_at_{k}": float(any(hits[:k])), f"precision_at_{k}": sum(hits[:k]) / k}
        found[f"map_at_{k}"] = summed(k)
    return found


@pytest.mark.parametrize(("num", "dim", "classes"), [(2, 3, 1), (40, 5, 6), (60, 3, 45), (33, 2, 1)])
def test_every_metric_of_every_query_is_that_of_its_definition(num: int, dim: int, classes: int) -> None:
    z, labels = unit(num, dim, 0), np.random.default_rng(1).integers(0, classes, num)
    z[num // 2 :] = z[: num - num // 2]  # copies: exact ties
    rows, found = leave_one_out(z, labels, (1, 3, 10))
    grid = on_grid(torch.from_numpy(z))
    scores = exact_dot(grid, grid).tolist()
    for place, row in enumerate(rows.tolist()):
        expected = by_hand(row, scores[row], labels.tolist(), (1, 3, 10))
        values = dict(zip(metrics_of((1, 3, 10)), as_fractions(found.units[place]).tolist(), strict=True))
        assert values == pytest.approx(expected, abs=1e-11)
        ranked = sorted(set(range(num)) - {row}, key=lambda other: (-scores[row][other], other))
        assert found.ids[place].tolist() == [*ranked[:10], *[-1] * (10 - len(ranked))]


@pytest.mark.parametrize("copies", [1, 4])
def test_a_leave_one_out_search_has_the_figures_of_a_run_to_the_bit(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, labels = np.repeat(unit(90, 6, 0), copies, 0), np.random.default_rng(1).integers(0, 30, 90 * copies)
    expected = query_scores(torch.from_numpy(z), torch.from_numpy(labels))
    for queries, block in ((512, 16_384), (7, 13)):
        monkeypatch.setattr(ranking, "_QUERIES", queries)
        monkeypatch.setattr(ranking, "_BLOCK", block)
        rows, found = leave_one_out(z, labels)
        columns = [metrics_of().index(name) for name in METRICS]
        assert rows.tolist() == expected.rows.tolist()
        assert found.units[:, columns].tolist() == expected.units.tolist()
    finished = expected.sums().finish()
    assert [mean_of(found.units[:, column]) for column in columns] == [finished[name] for name in METRICS]


def test_features_that_have_collapsed_are_ordered_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_BLOCK", 50)
    z, labels = np.ones((200, 4), np.float32), np.arange(200) % 3
    _, found = leave_one_out(z, labels)
    assert found.ids[:3].tolist() == [[1, *range(2, 11)], [0, *range(2, 11)], [0, 1, *range(3, 11)]]


def test_distractors_count_where_they_are_strictly_nearer_and_are_never_relevant() -> None:
    z, labels = unit(30, 4, 0), np.arange(30) % 5
    others = unit(50, 4, 1)
    others[7] = z[12]  # as near as row 12 to everything: it comes after it
    sizes = relevant_counts(labels, labels, itself(30))
    ranker = Ranker(z, sizes, shown=80)
    ranker.add(z, 0, hidden=itself(30))
    for start in range(0, 50, 9):
        ranker.add(others[start : start + 9], 30 + start)
    found = ranker.finish(labels, labels)
    grid = on_grid(torch.from_numpy(np.concatenate([z, others])))
    scores = exact_dot(grid, grid).tolist()
    for row in range(30):
        both = [*labels.tolist(), *[-1] * 50]
        assert as_fractions(found.units[row]).tolist() == pytest.approx(
            [by_hand(row, scores[row], both, (1, 5, 10))[name] for name in metrics_of()], abs=1e-11
        )
        ids = found.ids[row].tolist()
        assert row == 12 or ids.index(12) < ids.index(37)
    worse = dict(zip(metrics_of(), found.units.sum(0) - leave_one_out(z, labels)[1].units.sum(0), strict=True))
    assert max(worse.values()) <= 0
    assert worse["r_precision"] < 0


def test_rows_of_other_groups_are_not_shown_and_those_of_none_are() -> None:
    z, groups = unit(12, 3, 0), np.arange(12) % 2
    ranker = Ranker(z, np.full(12, 5), shown=20, groups=groups)
    ranker.add(z, 0, groups=groups, hidden=itself(12))
    ranker.add(unit(3, 3, 1), 12)
    zero = np.zeros((2, 3), np.float32)  # bad images
    ranker.add(zero, 15)
    found = ranker.finish(groups, groups)
    for row in range(12):
        ids = [place for place in found.ids[row].tolist() if place >= 0]
        assert sorted(ids) == [*(i for i in range(12) if i % 2 == row % 2 and i != row), 12, 13, 14]
        assert found.units[row, metrics_of().index("recall_at_10")] > 0


def test_equal_hashes_are_paired_and_zero_is_no_hash() -> None:
    queries, rows = equal_pairs(np.array([5, 0, 7, 5], np.uint64), np.array([0, 5, 9, 5, 7], np.uint64))
    assert sorted(zip(queries.tolist(), rows.tolist(), strict=True)) == [(0, 1), (0, 3), (2, 4), (3, 1), (3, 3)]
    counts = relevant_counts(np.array([1, 1, 2]), np.array([1, 1, 1, -1]), (np.array([0, 0, 2]), np.array([0, 1, 2])))
    assert counts.tolist() == [1, 3, 0]


MILLION = """
import resource
import numpy as np
from grappa_dist.retrieval.ranking import Ranker
def rows(seed, count):
    return np.random.default_rng(seed).standard_normal((count, 64), dtype=np.float32)
queries = rows(0, 200)
ranker = Ranker(queries, np.ones(200, np.int64))
ranker.add(queries * 0.5, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 10**6, 10**4):
    block = rows(start + 1, 10**4)
    block[:2] = queries[start // 5000 : start // 5000 + 2]  # as near as the query itself: after it
    ranker.add(block, 200 + start)
found = ranker.finish(np.arange(200), np.arange(200))
assert found.ids[:, 0].tolist() == list(range(200))
assert found.ids[:, 1].tolist() == [200 + query // 2 * 10**4 + query % 2 for query in range(200)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_a_million_rows_are_searched_without_being_held() -> None:
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024  # KiB more than before; the rows have 250,000


@pytest.mark.parametrize("columns", [2**13, 7])
def test_lists_folded_as_on_a_gpu_are_the_same(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_COLUMNS", columns)
    rng = np.random.default_rng(3)
    rows = np.sign(rng.normal(size=(90, 3))).astype(np.float32)  # most scores are equal to others
    rows[4::11] = 0
    classes, groups = np.arange(90) % 6, np.arange(90) % 3 - 1
    found = []
    for waits in (True, False):
        ranker = Ranker(rows[:31], np.full(31, 14), groups=groups[:31].clip(0), waits=waits)
        for first in range(0, 90, 40):
            some = slice(first, first + 40)
            ranker.add(rows[some], first, groups=groups[some], hidden=(np.arange(31), np.arange(31)))
        found.append(ranker.finish(classes[:31], classes))
    for field in ("units", "ids", "cosines"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(found[1], field))
