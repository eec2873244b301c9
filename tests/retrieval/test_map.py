from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.retrieval.map import START, aligned, kept_neighbours, lay_out_images, principal_components

CPU = torch.device("cpu")


def groups(seed: int, *, count: int = 60, of: int = 3) -> np.ndarray:
    """Unit rows (count, 16) in groups: row i is of group i % of."""
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(of, 16))[np.arange(count) % of] + 0.2 * draws.normal(size=(count, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_map_begins_at_the_first_two_principal_components() -> None:
    rows = groups(0)
    found = principal_components(rows)
    centred = (rows - rows.mean(0)).astype(np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in (0, 1):
        expected = left[:, axis] * values[axis]
        assert abs(np.corrcoef(found[:, axis], expected)[0, 1]) > 0.999
    assert np.abs(found).max() == pytest.approx(START, rel=1e-5)
    ratio = found.std(0) / centred.std() / found.std(0)[0]
    assert ratio[1] / ratio[0] == pytest.approx(values[1] / values[0], rel=1e-3)


def test_principal_components_of_equal_rows_are_zero_and_finite() -> None:
    assert np.isfinite(principal_components(np.repeat(groups(0)[:1], 12, 0))).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_map_is_turned_and_mirrored_onto_another_and_keeps_its_scale(mirrored: bool) -> None:
    reference = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    angle = 2.1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = (3 * reference @ (turn * [1, -1] if mirrored else turn) + [5, -9]).astype(np.float32)
    middle = reference.mean(0)
    np.testing.assert_allclose(aligned(turned, reference) - middle, 3 * (reference - middle), atol=1e-4)


def test_kept_neighbours_are_counted_where_points_coincide_and_where_none_is_kept() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed (extra map)")
    line = np.stack([np.arange(20), np.zeros(20)], 1).astype(np.float32)
    near = np.array([[min(i + 1, 19) if i != 19 else 18] for i in range(20)])
    near[1:19, 0] = np.arange(1, 19) - 1  # those before; as near as those after
    assert kept_neighbours(np.repeat(line[:1], 20, 0), near) <= 1
    far = np.array([[(i + 10) % 20] for i in range(20)])
    assert kept_neighbours(line, far) == 0
    assert kept_neighbours(line, np.array([[i - 1 if i % 2 else i + 1] for i in range(20)])) > 0.4


def test_too_few_images_are_an_error() -> None:
    pytest.importorskip("umap", reason="umap is not installed (extra map)")
    with pytest.raises(ValueError, match="a map needs at least 10 images that can be read, got 9"):
        lay_out_images({"backbone": groups(0)[:9]}, Console(), device=CPU)


@pytest.mark.long
def test_umap_keeps_groups_together_is_equal_for_equal_seeds_and_puts_both_maps_alike() -> None:
    count = 90
    backbone, adapted = groups(0, count=count), groups(1, count=count)
    first = lay_out_images({"backbone": backbone, "average": adapted}, Console(), device=CPU, seed=3)
    again = lay_out_images({"backbone": backbone, "average": adapted}, Console(), device=CPU, seed=3)
    assert [layout.model for layout in first] == ["backbone", "average"]
    for layout, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(layout.points, same.points)
        middles = np.stack([layout.points[group::3].mean(0) for group in range(3)])
        apart = np.linalg.norm(layout.points[:, None] - middles, axis=2)
        np.testing.assert_array_equal(apart.argmin(1), np.arange(count) % 3)
        assert 0.2 < layout.kept <= 1
    np.testing.assert_allclose(first[0].points.mean(0), first[1].points.mean(0), atol=1e-3)
    smallest = lay_out_images({"backbone": backbone[:10]}, Console(), device=CPU)
    assert np.isfinite(smallest[0].points).all()
    json.dumps(smallest[0].kept)
