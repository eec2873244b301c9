"""The simulation of answers: planted differences, and how answers are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import label
from benchmarks.label import LabelSettings, measure_label
from tests.retrieval.test_map_images import finished_run


def test_a_run_has_a_line_for_each_model_and_each_planted_difference(tmp_path: Path) -> None:
    run = str(finished_run(tmp_path))
    text, numbers = label.run({"run": run, "k": 2, "points": [20.0], "trials": 20, "seed": 0}, lambda line: None)
    assert [next(iter(numbers["models"])), *list(numbers["models"])[-2:]] == ["backbone", "average", "neighbours"]
    (needed,) = numbers["needed"]
    assert needed["gap"] == pytest.approx(20, abs=6)  # of 22 queries
    assert needed["images"] == 22
    assert f"{needed['gap']:.2f}" in text


def test_couples_take_fewer_answers_than_pairs_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    better = np.concatenate([np.ones(30), -np.ones(10), np.zeros(60)])
    pairs = np.concatenate([np.ones(60), np.zeros(40), -np.ones(40), np.zeros(60), np.zeros(400)])
    couples, uniform = label._answers(better, 50, rng, 2.5), label._answers(pairs, 50, rng, 1)
    assert couples is not None
    assert uniform is not None
    assert couples < uniform
    assert label._answers(-better, 5, rng, 2.5) is None


@pytest.mark.parametrize(("name", "value"), [("k", 0), ("trials", 0), ("seed", -1)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    settings = {"run": "nowhere", "k": 5, "points": (1.0,), "trials": 1, "seed": 0} | {name: value}
    with pytest.raises(ValueError, match=f"--{name} must be at least"):
        measure_label(LabelSettings(**settings), lambda line: None)  # type: ignore[arg-type]
