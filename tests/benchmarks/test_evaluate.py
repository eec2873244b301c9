from __future__ import annotations

import pytest

from benchmarks.evaluate import (
    BASELINE,
    DEFAULT,
    OURS,
    EvaluateSettings,
    as_json,
    as_text,
    labelled_rows,
    measure_evaluate,
)

TINY = EvaluateSettings(rows=300, default_rows=100, classes=30, dim=8, threads=1, repeats=2, seed=0)


def test_all_sides_find_the_same_scores_and_are_timed() -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    large, small = measure_evaluate(TINY, lambda line: None)
    assert (list(large.sides), list(small.sides)) == ([OURS, BASELINE], [OURS, BASELINE, DEFAULT])
    for found in (large, small):
        assert all(found.difference(name) < 1e-6 for name in found.sides)
        assert all(len(side.timing.runs) == TINY.repeats for side in found.sides.values())
        assert 0 < found.sides[OURS].scores["r_precision"] < 1
    figures = as_json({}, [large, small])["comparisons"]
    assert figures[1]["ratio"][DEFAULT] == small.ratio(DEFAULT)
    assert f"{small.ratio(DEFAULT):.2f}" in as_text({"command": "here"}, [large, small])


def test_drawn_rows_are_of_unit_length_and_of_classes_of_unlike_sizes() -> None:
    z, labels = labelled_rows(300, 30, 8, 0)
    assert z.norm(dim=1).tolist() == pytest.approx([1] * 300)
    assert labels.bincount().unique().numel() > 3
    assert labelled_rows(300, 30, 8, 0)[0].equal(z)


@pytest.mark.parametrize(("name", "value"), [("rows", 1), ("classes", 0), ("default_rows", -1)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        EvaluateSettings(**{**vars(TINY), name: value}).check()
