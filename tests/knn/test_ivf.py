from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import drawn_rows
from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn import ivf
from grappa_dist.knn.block_search import MOST_ROWS
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Graph
from tests.knn.test_exact import half_copies, ids_of, unit_rows
from tests.processes import run_ranks

pytestmark = pytest.mark.usefixtures("two_threads")

CASES: dict[str, Callable[[], np.ndarray]] = {
    "drawn": lambda: drawn_rows(900, 24, 0),
    "half copies": lambda: half_copies(140, 12),
    "all equal": lambda: np.repeat(unit_rows(1, 6), 60, axis=0),
    "few": lambda: unit_rows(4, 8),
    "one": lambda: unit_rows(1, 8),
}
K = 5


def graph(comm: Comm, x: np.ndarray, own: slice, floor: float = 0.9, **how: Any) -> Graph:
    return ivf.approximate_knn(comm, x[own], ids_of(x)[own], K, recall_floor=floor, **{"key": (0, 0), **how})


def run_cases(comm: Comm, gathered: int) -> dict[str, dict[str, Any]]:
    ivf.GATHERED_ROWS = gathered
    graphs = {}
    for name, make in CASES.items():
        x = make()
        edges = {1: [0, len(x)], 2: [0, 1, len(x)], 3: [0, len(x) // 4, len(x) // 4, len(x)]}[comm.size]
        graphs[name] = asdict(graph(comm, x, slice(edges[comm.rank], edges[comm.rank + 1])))
    return graphs


@pytest.mark.slow
def test_ranks_and_groups_of_lists_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "GATHERED_ROWS", ivf.GATHERED_ROWS)  # put back after
    alone = run_cases(Comm(), 2**15)
    assert alone["drawn"]["recall"]["probes"] < alone["drawn"]["recall"]["lists"] / 2
    for size, gathered in ((1, 1), (2, 100), (3, 1)):
        found = [run_cases(Comm(), gathered)] if size == 1 else run_ranks(run_cases, size, gathered)
        for name, wanted in alone.items():
            for part in ("ids", "scores"):
                np.testing.assert_array_equal(np.concatenate([of[name][part] for of in found]), wanted[part], name)
            assert all(of[name]["recall"] == wanted["recall"] for of in found)


def test_the_best_of_the_lists_are_found_and_recall_is_as_stated() -> None:
    x = CASES["drawn"]()
    found = graph(Comm(), x, slice(None))
    true, scores = sharded_knn(Comm(), x, ids_of(x), K)
    hits = np.array([np.isin(a, b).mean() for a, b in zip(true, found.ids, strict=True)])
    assert abs(float(hits.mean()) - found.recall.recall) < 0.03
    assert found.recall.recall >= 0.9
    assert 0 < found.recall.searched_share < 0.5
    whole = hits == 1
    assert 0 < whole.mean() < 1  # it is not exact, and a row that misses nothing has the exact list
    np.testing.assert_array_equal(found.ids[whole], true[whole])
    np.testing.assert_array_equal(found.scores[whole], scores[whole])
    assert (found.scores <= scores).all()


def test_recall_below_the_floor_brings_more_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = CASES["drawn"]()
    monkeypatch.setattr(ivf.Sample, "probes_for", lambda *_: 1)  # a sample that estimates too few probes
    widened = graph(Comm(), x, slice(None), 0.95).recall
    assert widened.widened >= 1
    assert widened.probes == 2**widened.widened
    assert widened.recall >= 0.95


def test_recall_counts_two_of_its_standard_errors_less(monkeypatch: pytest.MonkeyPatch) -> None:
    x = CASES["drawn"]()
    true, _ = sharded_knn(Comm(), x, ids_of(x), K)
    found, first = graph(Comm(), x, slice(None)), ivf.Sample.recall
    seen: list[ivf.Sample] = []
    monkeypatch.setattr(ivf.Sample, "recall", lambda own, *rest: seen.append(own) or first(own, *rest))
    measured = graph(Comm(), x, slice(None)).recall
    rows = np.isin(ids_of(x), seen[0].ids.numpy())
    hits = np.array([np.isin(a, b).mean() for a, b in zip(true[rows], found.ids[rows], strict=True)])
    assert measured.recall_rows == rows.sum()
    assert measured.recall == pytest.approx(hits.mean())
    assert measured.recall_error == pytest.approx(hits.std() / len(hits) ** 0.5)
    assert 0.002 < measured.recall_error < 0.02
    assert measured.recall - 2 * measured.recall_error >= 0.9
    monkeypatch.setattr(ivf.Sample, "probes_for", lambda *_: measured.probes)
    assert graph(Comm(), x, slice(None), measured.recall - measured.recall_error).recall.widened >= 1


def test_every_epoch_is_measured_on_another_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    x = CASES["drawn"]()
    monkeypatch.setattr(ivf, "SAMPLE_ROWS", 300)
    monkeypatch.setattr(ivf.Sample, "probes_for", lambda *_: 8)
    first, second = (graph(Comm(), x, slice(None), 0.5, key=(0, epoch)) for epoch in (0, 1))
    np.testing.assert_array_equal(first.ids, second.ids)
    assert first.recall.recall != second.recall.recall


def test_where_no_probes_reach_the_floor_the_search_is_exact_and_logs_it_before() -> None:
    x, lines = unit_rows(300, 64), list[str]()  # without any structure
    found = graph(Comm(), x, slice(None), 0.99, log=lines.append)
    assert (found.recall.searched, found.recall.recall) == ("exact", 1.0)
    assert found.recall.probes == found.recall.lists
    assert len(lines) == 1
    assert "do not reach fuse.recall_floor=0.99" in lines[0]
    assert "comparing all pairs of 300 rows" in lines[0]
    np.testing.assert_array_equal(found.ids, sharded_knn(Comm(), x, ids_of(x), K)[0])


@pytest.mark.parametrize("probes", [None, 1])
def test_too_many_rows_for_an_exact_search_are_refused(probes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "MOST_EXACT_ROWS", 299)
    if probes:
        monkeypatch.setattr(ivf.Sample, "probes_for", lambda *_: probes)
    reached = (
        r"recall is 0\.\d+ with a standard error of 0\.\d+ with 16 of 34" if probes else r"a sample needs \d+ of 34"
    )
    with pytest.raises(ValueError, match=f"fuse.recall_floor=0.99: {reached} lists; 300 rows are too many"):
        graph(Comm(), unit_rows(300, 64), slice(None), 0.99)


def test_no_rows_at_all_give_an_empty_graph() -> None:
    assert graph(Comm(), np.zeros((0, 4), np.float32), slice(None)).ids.shape == (0, K)


def out_of_order(comm: Comm, edges: list[tuple[int, int]]) -> str:
    x = CASES["drawn"]()
    try:
        graph(comm, x, slice(*edges[comm.rank]))
    except ValueError as problem:
        return str(problem)
    return ""


def test_ranks_whose_row_ids_do_not_ascend_are_refused_together() -> None:
    found = run_ranks(out_of_order, 3, [(300, 900), (0, 0), (0, 300)])
    first, last = (int(ids_of(CASES["drawn"]())[i]) for i in (0, -1))
    wanted = f"row ids must ascend from rank to rank: rank 0 ends with {last}, rank 2 begins with {first}"
    assert found == [wanted] * 3


def test_a_list_longer_than_a_block_is_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = CASES["drawn"]()
    whole = graph(Comm(), x, slice(None))
    assert len(x) < MOST_ROWS
    monkeypatch.setattr(ivf, "MOST_ROWS", 8)
    pieces = graph(Comm(), x, slice(None))
    np.testing.assert_array_equal(pieces.ids, whole.ids)


def test_every_row_that_names_a_list_is_among_its_rows() -> None:
    lists = torch.tensor([[2, 0], [-1, 2], [1, -1]], dtype=torch.int32)
    assert [rows.tolist() for rows in ivf._by_list(lists, 4)] == [[0], [2], [0, 1], []]


@pytest.mark.parametrize(("name", "dense_bytes"), [("drawn", 0), ("drawn", 2**30), ("half copies", 2**30), ("few", 0)])
def test_lists_searched_as_on_a_device_give_the_same_bits(name: str, dense_bytes: int) -> None:
    x = CASES[name]()
    one, other = (graph(Comm(), x, slice(None), dense_bytes=how) for how in (None, dense_bytes))
    assert one.recall == other.recall
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


def dense_part(comm: Comm) -> Graph:
    x = CASES["half copies"]()
    edges = [0, len(x) // 4, len(x) // 4, len(x)]
    return graph(comm, x, slice(edges[comm.rank], edges[comm.rank + 1]), dense_bytes=2000)


def test_lists_of_a_device_are_the_same_on_ranks_of_which_one_is_empty() -> None:
    x = CASES["half copies"]()
    alone, found = graph(Comm(), x, slice(None)), run_ranks(dense_part, 3)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in found]), alone.ids)
    assert all(part.recall == alone.recall for part in found)
