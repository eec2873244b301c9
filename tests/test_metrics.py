from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.metrics import METRICS, RetrievalSums, query_scores, retrieval_scores, retrieval_sums
from grappa_dist.search.fixed_point import exact_dot, to_grid
from tests import reference


def features(num: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def random_labels(num: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(-1, classes, (num,), generator=torch.Generator().manual_seed(seed))


def baseline(z: Tensor, labels: Tensor) -> dict[str, float]:
    grid = to_grid(F.normalize(z.double(), dim=1))
    return reference.retrieval(exact_dot(grid, grid).tolist(), labels.tolist())


@pytest.mark.parametrize(("num", "dim", "classes"), [(2, 1, 1), (9, 2, 3), (40, 5, 6), (60, 3, 60), (50, 8, 1)])
@pytest.mark.parametrize("block_rows", [1, 7, 256])
def test_scores_equal_the_reference(num: int, dim: int, classes: int, block_rows: int) -> None:
    z, labels = features(num, dim), random_labels(num, classes)
    assert retrieval_scores(z, labels, block_rows=block_rows) == pytest.approx(baseline(z, labels), abs=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_exact_ties_are_broken_by_row_id(seed: int) -> None:
    corners = features(3, 2, seed)
    z = corners[torch.randint(3, (41,), generator=torch.Generator().manual_seed(seed))]  # many copies of three points
    labels = random_labels(41, 5, seed)
    expected = baseline(z, labels)
    for block_rows in (1, 5, 100):
        assert retrieval_scores(z, labels, block_rows=block_rows) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_scores_closer_than_the_error_of_float32_are_ordered_exactly(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    z = F.normalize(features(1, 64, seed), dim=1) + 2.0**-22 * torch.randn(60, 64, generator=draws)
    labels = torch.randint(6, (60,), generator=draws)
    grid = to_grid(F.normalize(z.double(), dim=1))
    in_floats, exactly = grid @ grid.T, exact_dot(grid, grid)
    assert not torch.equal(in_floats.argsort(dim=1), exactly.argsort(dim=1))
    for block_rows in (1, 17, None):
        assert retrieval_scores(z, labels, block_rows=block_rows) == pytest.approx(baseline(z, labels), abs=1e-11)


def test_features_that_have_collapsed_are_scored_by_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("scored pair by pair")

    monkeypatch.setattr("grappa_dist.class_ranks.pair_dots", refuse)
    z = torch.ones(300, 256) + 1e-6 * features(300, 256)
    labels = random_labels(300, 100)
    assert retrieval_scores(z, labels) == pytest.approx(baseline(z, labels), abs=1e-11)


def test_classes_of_unlike_sizes_are_scored_together() -> None:
    labels = torch.cat([torch.zeros(70, dtype=torch.int64), torch.arange(40) // 2 + 1])
    z = features(21, 5)[labels] + features(110, 5, seed=1)
    assert retrieval_scores(z, labels) == pytest.approx(baseline(z, labels), abs=1e-11)


def test_ties_go_to_the_lower_row_by_hand() -> None:
    z = torch.ones(4, 2)
    scores = retrieval_scores(z, torch.tensor([5, 5, 8, 5]))
    # R = 2: query 0 meets rows 1, 2 (hit, miss), query 1 meets 0, 2 (hit, miss), query 3 meets 0, 1 (hit, hit)
    assert scores == pytest.approx({"r_precision": 2 / 3, "map_at_r": 2 / 3, "recall_at_1": 1.0, "queries": 3})


def test_block_size_and_division_of_queries_do_not_change_a_bit() -> None:
    z, labels = features(101, 6), random_labels(101, 9)
    z[50:] = z[:51].clone()
    whole = retrieval_sums(z, labels, range(101), block_rows=101)
    for block_rows in (1, 2, 13, 100):
        assert retrieval_sums(z, labels, range(101), block_rows=block_rows) == whole
    for divided in (
        [range(0, 1), range(1, 1), range(1, 60), range(60, 101)],
        [range(worker, 101, 3) for worker in range(3)],
    ):
        assert sum((retrieval_sums(z, labels, rows) for rows in divided), RetrievalSums()) == whole
    assert retrieval_scores(z, labels) == whole.finish()


def test_scores_do_not_depend_on_scale_or_float_type() -> None:
    z, labels = features(40, 6), random_labels(40, 4)
    scales = 2.0 ** torch.randint(-20, 20, (40, 1), generator=torch.Generator().manual_seed(0))
    assert retrieval_scores(z * scales, labels) == retrieval_scores(z, labels)
    assert retrieval_scores(z.double(), labels) == retrieval_scores(z, labels)


def test_rows_without_a_label_might_as_well_be_absent() -> None:
    z, labels = features(40, 6), random_labels(40, 4)
    labels[[3, 39]] = -7
    kept = labels >= 0
    assert 0 < int(kept.sum()) < 38
    z[~kept] = 0  # as undecodable images are
    assert retrieval_scores(z, labels) == retrieval_scores(z[kept], labels[kept])


def test_a_class_of_one_is_gallery_but_never_query() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    labels = torch.tensor([4, 4, 900])  # row 2 comes between the two
    assert retrieval_scores(z, labels) == {"r_precision": 0, "map_at_r": 0, "recall_at_1": 0, "queries": 2}


@pytest.mark.parametrize("labels", [[], [-1, -1], [0, 1, 2]])
def test_without_queries_all_scores_are_zero(labels: list[int]) -> None:
    z = features(len(labels), 3)
    found = retrieval_scores(z, torch.tensor(labels, dtype=torch.int64))
    assert found == {"r_precision": 0, "map_at_r": 0, "recall_at_1": 0, "queries": 0}


def test_one_point_per_class_is_perfect() -> None:
    labels = torch.arange(30) % 7
    expected = {"r_precision": 1, "map_at_r": 1, "recall_at_1": 1, "queries": 30}
    assert retrieval_scores(features(7, 4)[labels], labels) == expected


def test_scores_equal_those_of_pytorch_metric_learning() -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    labels = random_labels(300, 20, seed=2).clamp(min=0)
    labels[7] = 1000  # a class of one
    z = F.normalize(features(20, 8)[labels % 20] + features(300, 8, seed=3), dim=1)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    theirs = AccuracyCalculator(include=names, k="max_bin_count").get_accuracy(z, labels)
    ours = retrieval_scores(z, labels)
    assert [ours[name] for name in ("recall_at_1", "r_precision", "map_at_r")] == pytest.approx(
        [theirs[name] for name in names], abs=1e-6
    )
    assert ours["queries"] == 299


@pytest.mark.parametrize("rows", [range(-1, 3), range(0, 6), range(4, 0, -1)])
def test_query_rows_that_do_not_exist_are_refused(rows: range) -> None:
    with pytest.raises(ValueError, match="query_rows"):
        retrieval_sums(features(5, 2), torch.zeros(5, dtype=torch.int64), rows)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        retrieval_scores(features(5, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        retrieval_scores(features(5, 2), torch.zeros(5))
    with pytest.raises(ValueError, match="block_rows"):
        retrieval_scores(features(5, 2), torch.zeros(5, dtype=torch.int64), block_rows=0)
    with pytest.raises(ValueError, match="NaN"):
        retrieval_scores(torch.full((5, 2), torch.nan), torch.zeros(5, dtype=torch.int64))


def test_five_thousand_rows_take_seconds() -> None:
    z, labels = features(5000, 192), random_labels(5000, 50)
    start = time.process_time()  # of this process: others may keep the machine busy
    retrieval_scores(z, labels)
    assert time.process_time() - start < 20  # two to four


def by_hand(z: Tensor, labels: Tensor) -> list[tuple[int, float, float, float]]:
    """Row, R-Precision, MAP@R and recall@1 of every query, from all pairs."""
    grid = to_grid(F.normalize(z.double(), dim=1))
    scores, classes = exact_dot(grid, grid).tolist(), labels.tolist()
    found = []
    for query in range(len(classes)):
        gallery = [row for row in range(len(classes)) if classes[row] >= 0 and row != query]
        size = sum(classes[row] == classes[query] for row in gallery)
        if classes[query] >= 0 and size:
            ranked = sorted(gallery, key=lambda row: (-scores[query][row], row))[:size]
            hits = [classes[row] == classes[query] for row in ranked]
            precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(size) if hits[i]]
            found.append((query, sum(hits) / size, sum(precisions) / size, float(hits[0])))
    return found


@pytest.mark.parametrize("block_rows", [1, 7, None])
def test_the_scores_of_each_query_equal_the_reference(block_rows: int | None) -> None:
    z, labels = features(60, 5), random_labels(60, 7)
    found, expected = query_scores(z, labels, block_rows=block_rows), by_hand(z, labels)
    assert found.rows.tolist() == [row for row, *_ in expected]
    for at, metric in enumerate(METRICS, start=1):
        assert found.values(metric) == pytest.approx([query[at] for query in expected], abs=1e-11)


def test_the_scores_of_queries_add_up_to_the_sums_to_the_bit() -> None:
    z, labels = features(101, 6), random_labels(101, 9)
    z[50:] = z[:51].clone()
    whole = query_scores(z, labels)
    assert whole.sums() == retrieval_sums(z, labels, range(101))
    assert whole.sums().finish() == retrieval_scores(z, labels)
    parts = [query_scores(z, labels, rows, block_rows=3) for rows in (range(0, 101, 2), range(1, 101, 2))]
    together = {
        row: units for part in parts for row, units in zip(part.rows.tolist(), part.units.tolist(), strict=True)
    }
    assert [together[row] for row in whole.rows.tolist()] == whole.units.tolist()


def test_without_queries_there_are_no_scores_of_queries() -> None:
    found = query_scores(features(3, 2), torch.tensor([0, 1, -1]))
    assert (len(found.rows), found.units.shape, found.sums()) == (0, (0, 3), RetrievalSums())
