"""The rates of rows: what they say of a graph that lacks neighbours, and of memory that holds fewer rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.gpu_check import row_rates
from grappa_dist.gpu_check.checks import Machine
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Graph, Recall, approximate_knn
from grappa_dist.search.fixed_point import to_grid

CPU = torch.device("cpu")


def test_drawn_rows_are_unit_rows_on_the_grid_in_groups() -> None:
    x = row_rates.drawn_rows(600, 24, 3, CPU)
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-6)
    assert torch.equal(to_grid(torch.from_numpy(x)), torch.from_numpy(x))
    near = np.sort(x @ x.T, axis=1)
    assert near[:, -100:].mean() > near[:, :100].mean() + 0.5


def test_the_share_of_true_neighbours_is_that_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_rates, "_BLOCK", 130)  # the last of three has fewer rows than the others
    x = row_rates.drawn_rows(300, 24, 5, CPU)
    ids, scores = sharded_knn(Comm(), x, np.arange(300, dtype=np.int64), 4)
    graph = Graph(ids, scores, Recall.exact())
    assert row_rates.true_share(x, graph, CPU) == 1
    half = ids.copy()
    half[:, 2:] = -1
    assert row_rates.true_share(x, replace(graph, ids=half), CPU) == 0.5


def test_a_graph_that_lacks_neighbours_is_wrong_whatever_it_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*given: Any, **how: Any) -> Graph:
        graph = approximate_knn(*given, **how)
        return replace(graph, ids=np.where(np.arange(graph.ids.shape[1]) < 1, -1, graph.ids))

    assert row_rates.graph_rate(Machine(CPU, True, tmp_path)).wrong == ""
    monkeypatch.setattr(row_rates, "approximate_knn", lacking)
    assert "of the true neighbours" in row_rates.graph_rate(Machine(CPU, True, tmp_path)).wrong


def test_fewer_rows_are_taken_where_the_device_holds_fewer_and_the_time_of_all_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_rates, "memory_for_rows", lambda device: 2 * 10**9)
    assert row_rates.rows_that_fit(CPU, 384) == 700_000
    monkeypatch.setattr(row_rates, "memory_for_rows", lambda device: 0)
    assert row_rates.rows_that_fit(CPU, 384) == 100_000
    smaller, aim = row_rates.against_the_aim(10**6, 10**7, 0.5, row_rates.FLASH_FLOPS / 3)
    assert (smaller.what, smaller.value) == ("by that, of 10,000,000 rows", 5.0)
    assert aim.value == pytest.approx(2)
    assert row_rates.against_the_aim(10**7, 10**7, 5.0, 1.0) == [
        row_rates.Figure("of the time aimed at:", row_rates.FLASH_FLOPS / 1.5, "x")
    ]
