"""Near-duplicates through a graph, against all pairs; outliers by their definition; recall that is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.retrieval import neighbours as module
from grappa_dist.retrieval.collection import Collection, Part
from grappa_dist.retrieval.duplicates import find_groups, group_duplicates
from grappa_dist.retrieval.neighbours import (
    Graph,
    duplicate_recall,
    graph_of,
    group_by_graph,
    is_exact,
    outliers_of,
)
from grappa_dist.retrieval.odd_images import describe_groups, describe_outliers, named_outliers

CPU = torch.device("cpu")
CLUSTERS, EACH = 60, 40


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Clustered rows; every 20th is nearly the one before it, 30 are nearly one image, one is far from all."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, 32))
    found = np.repeat(centres, EACH, 0) + 0.5 * rng.normal(size=(CLUSTERS * EACH, 32))
    found = found[rng.permutation(len(found))]
    found[20::20] = found[19:-1:20] + 0.02 * rng.normal(size=found[20::20].shape)
    found[1000:1030] = found[77] + 0.02 * rng.normal(size=(30, 32))
    found[500] = -centres.sum(0)
    return unit(found)


def test_groups_by_an_exact_graph_of_enough_neighbours_are_those_of_all_pairs(rows: np.ndarray) -> None:
    bad = {3, 1500}
    graph = graph_of([rows[:900], rows[900:]], bad, "exact", CPU, k=40)
    assert graph.ids.tolist() == [row for row in range(len(rows)) if row not in bad]
    firsts, cosines = group_by_graph(graph, 0.98)
    expected, of = group_duplicates([rows], bad, 0.98, CPU)
    assert graph.ids[firsts].tolist() == expected[graph.ids].tolist()
    joined = firsts != np.arange(len(firsts))
    assert joined.sum() > 100
    np.testing.assert_allclose(cosines[joined], of[graph.ids][joined], atol=1e-6)


def test_a_group_of_more_images_than_an_image_has_neighbours_is_one_group(rows: np.ndarray) -> None:
    graph = graph_of([rows], (), "exact", CPU, k=4)
    firsts, _ = group_by_graph(graph, 0.98)
    assert set(firsts[1000:1030].tolist()) == {77}


def test_lists_find_the_groups_of_all_pairs_and_say_what_they_miss(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT_ROWS", 1000)
    names = [f"{row}.png" for row in range(len(rows))]
    images = Collection((Part(rows, {5: "empty file"}, lambda: names, lambda row: b""),))
    found, exact = (find_groups(images, 0.98, CPU, Console(), method=how) for how in ("auto", "exact"))
    assert [group.rows for group in found.groups] == [group.rows for group in exact.groups]
    assert (found.graph is not None, exact.graph, exact.recall) == (True, None, "")
    told = describe_groups(found, images, 0.98)
    assert "through lists of near images: of 2,048 sampled images, " in told
    assert "(recall 1.000); recall is 0.9" in told


def test_near_duplicates_that_a_graph_lacks_lower_the_recall(rows: np.ndarray) -> None:
    graph = graph_of([rows], (), "exact", CPU, k=3)
    whole = duplicate_recall(graph, 0.98, CPU)
    assert whole.have == whole.found > 100
    cosines = graph.cosines.copy()
    cosines[::2] = 0.5
    lacking = duplicate_recall(replace(graph, cosines=cosines), 0.98, CPU)
    assert lacking.have == whole.have
    assert 0.3 < lacking.found / lacking.have < 0.7
    assert "none of 2,048 sampled images has" in str(duplicate_recall(graph, 1.0, CPU))


def test_outliers_are_farthest_from_their_nearest_others_whatever_the_graph_lacks(rows: np.ndarray) -> None:
    cosines = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    scores = 1 - np.sort(cosines, 1)[:, -10:].mean(1)
    order = np.argsort(-scores)[:20]
    exact = graph_of([rows], (), "exact", CPU)
    found = outliers_of(exact, 20, CPU)
    assert found.places.tolist() == order.tolist()
    assert found.places[0] == 500
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    near = exact.near.copy()
    near[::3, 4:] = -1  # lists lack the farther neighbours of some: their scores are looked up
    lacking = replace(exact, near=near, recall=replace(exact.recall, searched="lists"))
    again = outliers_of(lacking, 20, CPU)
    assert again.are_certain
    assert again.places.tolist() == order.tolist()
    assert again.nearest.tolist() == found.nearest.tolist()


def test_few_images_have_few_outliers_and_none_alone_is_one() -> None:
    names = ["a", "b", "c"]
    few = Collection((Part(unit(np.eye(3)), {}, lambda: names, lambda row: b""),))
    graph = graph_of(few.rows, (), "auto", CPU)
    outliers = named_outliers(few, graph, outliers_of(graph, 100, CPU))
    assert [(one.name, one.score) for one in outliers] == [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    alone = graph_of([few.rows[0][:1]], (), "auto", CPU)
    assert describe_outliers([], outliers_of(alone, 5, CPU)) == "no outliers: there are no two images to compare"


def test_many_copies_of_one_image_do_not_hide_an_image_from_itself() -> None:
    rows = unit(np.concatenate([np.ones((30, 4)), np.eye(4)]))
    graph = graph_of([rows], (), "exact", CPU)
    copy = Graph(graph.ids, graph.rows, graph.near, graph.cosines, replace(graph.recall, searched="lists"))
    found = outliers_of(copy, 34, CPU)
    assert sorted(found.places.tolist()) == list(range(34))
    assert set(found.places[:4].tolist()) == {30, 31, 32, 33}
    np.testing.assert_allclose(found.scores[4:], 0, atol=1e-6)


def test_auto_compares_all_pairs_up_to_a_stated_number() -> None:
    assert is_exact("auto", module.EXACT_ROWS)
    assert not is_exact("auto", module.EXACT_ROWS + 1)
    assert is_exact("exact", module.EXACT_ROWS + 1)
    assert not is_exact("lists", 10)
