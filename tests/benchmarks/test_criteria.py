"""Figures without labels: each on rows whose figure is known, and the correlations with R-Precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import criteria
from benchmarks.criteria import FIGURES, Features, Gallery, Point, correlations, right_signs
from tests.retrieval.test_map_images import finished_run


def unit(rows: np.ndarray) -> criteria.Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def groups(spread: float, *, count: int = 6, of_each: int = 20, dim: int = 16, seed: int = 0) -> criteria.Rows:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count, dim))
    return unit(np.repeat(centres, of_each, axis=0) + spread * rng.standard_normal((count * of_each, dim)))


LABELS = np.repeat(np.arange(6), 20)


def test_neighbours_are_the_nearest_others_as_a_loop_finds_them() -> None:
    z = groups(1.0)
    features = Features(z, 3)
    for row in range(len(z)):
        cosines = [(float(z[row] @ z[other]), other) for other in range(len(z)) if other != row]
        assert set(features.near[row].tolist()) == {other for _, other in sorted(cosines, reverse=True)[:3]}
    assert features.relation.sum(1).tolist() == [3] * len(z)


def test_reciprocity_and_in_degrees_of_a_star_are_those_counted_by_hand() -> None:
    angles = np.array([0.0, 0.1, 0.3, 0.6, 1.0])  # each row's nearest is the one before it, but for the first
    star = Features(unit(np.column_stack([np.cos(angles), np.sin(angles)])), 1)
    assert star.near[:, 0].tolist() == [1, 0, 1, 2, 3]
    assert criteria.reciprocity(star) == pytest.approx(2 / 5)
    counts = np.array([1, 2, 1, 1, 0.0])
    assert criteria.evenness(star) == pytest.approx(-(((counts - 1) / counts.std()) ** 3).mean())


def test_tight_groups_are_above_wide_ones_by_what_looks_at_groups() -> None:
    tight, wide = Features(groups(0.2), 10), Features(groups(2.0), 10)
    for figure in (criteria.contrast, criteria.learnability):
        assert figure(tight) > figure(wide), figure.__name__
    assert criteria.stability(Features(groups(0.01), 10)) > criteria.stability(wide)


def test_the_intrinsic_dimension_of_a_disc_is_two_and_of_a_curve_one() -> None:
    rng = np.random.default_rng(0)
    disc = unit(np.column_stack([rng.uniform(-0.5, 0.5, (300, 2)), np.ones(300)]))
    angles = rng.uniform(0, np.pi, 100)
    curve = unit(np.column_stack([np.cos(angles), np.sin(angles)]))
    assert -criteria.low_dimension(Features(disc, 2)) == pytest.approx(2, rel=0.2)
    assert -criteria.low_dimension(Features(curve, 2)) == pytest.approx(1, rel=0.3)


def test_a_spectrum_that_falls_as_one_over_i_is_best() -> None:
    rng = np.random.default_rng(0)
    values = np.arange(1, 65) ** -0.5
    z = (rng.standard_normal((4000, 64)) * values).astype(np.float32)
    falls_as_wanted, too_flat = Features(z, 1), Features((z / values).astype(np.float32), 1)
    assert criteria.flatness(falls_as_wanted) == pytest.approx(1, abs=0.1)
    assert criteria.flatness(too_flat) < 0.3


def test_a_model_shares_all_neighbours_with_itself_and_few_with_a_random_one() -> None:
    one, other = Features(groups(1.0), 10), Features(unit(np.random.default_rng(1).standard_normal((120, 16))), 10)
    assert criteria.shared(one, one) == 1
    assert criteria.shared(one, other) == pytest.approx(10 / 119, abs=0.03)


def test_every_figure_is_a_number_for_every_model_of_a_gallery() -> None:
    gallery = Gallery({"backbone": Features(groups(1.5), 10), "k=4": Features(groups(0.5), 10)}, LABELS)
    for name, figure in FIGURES.items():
        assert np.isfinite([figure(gallery, "backbone"), figure(gallery, "k=4")]).all(), name
    assert gallery.r_precision("k=4") > gallery.r_precision("backbone")


def points(figure_of: dict[str, tuple[float, float]]) -> list[Point]:
    """Of models with a figure and an R-Precision each, the same figure under every name."""
    return [Point("run", "birds", m, r, dict.fromkeys(FIGURES, value)) for m, (value, r) in figure_of.items()]


def test_the_correlation_is_one_where_a_figure_orders_models_as_labels_do_and_minus_one_in_reverse() -> None:
    same = points({"backbone": (1, 0.3), "k=4": (2, 0.5), "k=16": (7, 0.51)})
    assert {round(c["birds"], 9) for c in correlations(same).values()} == {1}
    assert set(right_signs(same).values()) == {1}
    reverse = points({"backbone": (3, 0.3), "k=4": (2, 0.5), "k=16": (1, 0.51)})
    assert {round(c["birds"], 9) for c in correlations(reverse).values()} == {-1}
    assert set(right_signs(reverse).values()) == {0}


def test_a_figure_gains_what_the_model_that_it_picks_gains() -> None:
    found = criteria.gains_of_picks(points({"backbone": (1, 0.3), "average": (5, 0.25), "k=4": (2, 0.5)}))
    assert {round(gain, 9) for name in FIGURES for gain in found[name]} == {-5}
    assert found[criteria.AS_TRAINED] == pytest.approx([-5])
    assert found[criteria.LABELS] == pytest.approx([20])


def test_runs_are_compared_by_the_command(tmp_path: Path) -> None:
    runs = [str(finished_run(tmp_path / name)) for name in ("one", "two")]
    text, numbers = criteria.run({"runs": runs, "k": 3, "chosen_on": []}, lambda line: None)
    assert {p["model"] for p in numbers["points"]} >= {"backbone", "average"}
    assert all(name in text for name in FIGURES)
    with pytest.raises(ValueError, match="expected two runs or more, got 1"):
        criteria.run({"runs": runs[:1], "k": 3, "chosen_on": []}, lambda line: None)
