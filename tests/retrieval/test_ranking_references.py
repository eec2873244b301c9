"""Figures of other programs on the same embeddings: pytorch-metric-learning, and trec_eval, by which mteb scores.

pytorch-metric-learning leaves the order of equal cosines open, so its cases have none; trec_eval takes the last name
first, so documents are called such that this is the order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from grappa_dist.metrics import as_fractions, metrics_of
from grappa_dist.retrieval.ranking import Ids, Ranker, Rows, on_grid, relevant_counts
from grappa_dist.search.fixed_point import GRID, exact_dot
from tests.retrieval.test_ranking import leave_one_out, unit

DEPTHS = (1, 5, 10)
Results = dict[str, dict[str, float]]
Figures = dict[str, NDArray[np.float64]]


def split_case(ties: bool) -> tuple[Rows, Ids, Rows, Ids]:
    """Queries and a gallery with classes of one, a class that only queries have, and, if asked for, equal rows."""
    draws = np.random.default_rng(3)
    queries, gallery = unit(30, 6, 0), unit(80, 6, 1)
    if ties:
        gallery[40:] = gallery[:40]
        queries[:10] = gallery[:10]
    of_queries, of_gallery = draws.integers(0, 24, 30), draws.integers(0, 20, 80)
    of_gallery[:3] = (21, 22, 23)
    return queries, of_queries, gallery, of_gallery


def ours(queries: Rows, of_queries: Ids, gallery: Rows, of_gallery: Ids) -> tuple[Ids, Figures]:
    sizes = relevant_counts(of_queries, of_gallery, (np.empty(0, np.int64), np.empty(0, np.int64)))
    kept = np.flatnonzero(sizes > 0)
    ranker = Ranker(queries[kept], sizes[kept], depths=DEPTHS)
    ranker.add(gallery, 0)
    units = ranker.finish(of_queries[kept], of_gallery).units
    return kept, dict(zip(metrics_of(DEPTHS), as_fractions(units).T, strict=True))


def run_and_qrels(
    queries: Rows, of_queries: Ids, gallery: Rows, of_gallery: Ids
) -> tuple[Results, Mapping[str, dict[str, int]]]:
    """Scores and relevance as trec_eval takes them; the last row has the name that is first."""
    scores = (exact_dot(*(on_grid(torch.from_numpy(rows)) for rows in (queries, gallery))) / GRID**2).tolist()
    names = [f"{len(gallery) - row:06d}" for row in range(len(gallery))]
    run = {f"q{i}": dict(zip(names, line, strict=True)) for i, line in enumerate(scores)}
    qrels = {
        f"q{i}": {name: 1 for name, label in zip(names, of_gallery.tolist(), strict=True) if label == wanted}
        for i, wanted in enumerate(of_queries.tolist())
    }
    return run, {query: relevant for query, relevant in qrels.items() if relevant}


@pytest.mark.parametrize("ties", [False, True])
def test_figures_equal_those_of_trec_eval_with_ties_singletons_and_classes_of_one(ties: bool) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    case = split_case(ties)
    kept, found = ours(*case)
    run, qrels = run_and_qrels(*case)
    assert [f"q{place}" for place in kept.tolist()] == list(qrels)
    asked = {f"{name}.{','.join(map(str, DEPTHS))}" for name in ("map_cut", "P", "success")} | {"Rprec"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate({query: run[query] for query in qrels})
    called = {"r_precision": "Rprec"}
    for k in DEPTHS:
        called |= {f"map_at_{k}": f"map_cut_{k}", f"precision_at_{k}": f"P_{k}", f"recall_at_{k}": f"success_{k}"}
    for metric, name in called.items():
        assert found[metric].tolist() == pytest.approx([theirs[query][name] for query in qrels], abs=1e-6)


def test_figures_equal_those_of_pytorch_metric_learning_on_a_split_and_leave_one_out() -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    queries, of_queries, gallery, of_gallery = split_case(ties=False)
    names = {"r_precision": "r_precision", "map_at_r": "mean_average_precision_at_r", "recall_at_1": "precision_at_1"}
    deep = {"map_at_10": "mean_average_precision"}
    loo = leave_one_out(gallery, of_gallery, DEPTHS)[1].units
    cases = [
        (ours(queries, of_queries, gallery, of_gallery)[1], (queries, of_queries, gallery, of_gallery)),
        (dict(zip(metrics_of(DEPTHS), as_fractions(loo).T, strict=True)), (gallery, of_gallery)),
    ]
    for found, given in cases:
        for called, k in ((names, "max_bin_count"), (deep, 10)):
            calculator = AccuracyCalculator(include=tuple(called.values()), k=k, device=torch.device("cpu"))
            theirs = calculator.get_accuracy(*(torch.from_numpy(one) for one in given))
            assert {m: found[m].mean() for m in called} == pytest.approx(
                {m: theirs[name] for m, name in called.items()}, abs=1e-6
            )
