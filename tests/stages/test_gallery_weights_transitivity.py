from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.stages import gallery_weights
from grappa_dist.stages.gallery_weights import effective_rank, set_weights, transitivity


def unit(num: int, dim: int = 6, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive(z: Tensor, k: int, copies: float = 1.1) -> list[float]:
    k = min(k, len(z) - 1)
    near = []
    for i, row in enumerate(z):
        scores = [(-float(row @ other), j) for j, other in enumerate(z) if j != i and float(row @ other) <= copies]
        near.append({j for _, j in sorted(scores)[:k]})
    return [sum(len(near[i] & near[j]) for j in near[i]) / k**2 if k else 0.0 for i in range(len(z))]


@pytest.mark.parametrize(("num", "k"), [(1, 3), (2, 3), (3, 10), (11, 10), (12, 10), (50, 1), (50, 4)])
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_transitivity_is_that_of_the_neighbours_one_by_one(
    num: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_weights, "_BLOCK", block)
    z = unit(num)
    assert transitivity(z, k).tolist() == pytest.approx(naive(z, k))


def test_clusters_of_k_plus_one_images_are_as_transitive_as_can_be_and_scattered_ones_are_not() -> None:
    k, noise = 4, 0.1 * unit(40, 40, seed=1)
    clustered = F.normalize(unit(8, 40).repeat_interleave(k + 1, 0) + noise, dim=1)
    assert transitivity(clustered, k).tolist() == pytest.approx([(k - 1) / k] * 40)
    assert transitivity(unit(400, 40), k).mean() < 0.3


def test_near_copies_are_no_neighbours() -> None:
    z = F.normalize(torch.cat([unit(30), unit(30)[:20] + 1e-3 * unit(20, seed=1), unit(1).expand(9, -1)]), dim=1)
    found = transitivity(z, 4, 0.999)
    assert found.tolist() == pytest.approx(naive(z, 4, 0.999))
    assert transitivity(z, 4, 2.0).mean() > found.mean() + 0.1


@pytest.mark.parametrize("points", [1, 2])
def test_a_set_that_has_collapsed_to_a_few_points_is_not_transitive(points: int) -> None:
    z = F.normalize(unit(points).repeat_interleave(100, 0) + 1e-5 * unit(100 * points, seed=1), dim=1)
    assert transitivity(z).max() == 0 if points == 1 else transitivity(z).mean() < 0.2
    assert effective_rank(unit(1).expand(100, -1)) == 0


def test_the_effective_rank_counts_directions_of_even_variance() -> None:
    z = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(z) == pytest.approx(6)
    assert effective_rank(z[:, :1] * torch.ones(1, 4)) == pytest.approx(1)
    assert effective_rank(z[:1]) == effective_rank(z[:0]) == 0


def test_no_images_at_all_have_no_transitivity() -> None:
    assert len(transitivity(torch.zeros(0, 3))) == 0


def shares(num: int, behind: float, spread: float = 0.1) -> Tensor:
    """Of two sets; the second falls short of the first by about `behind`."""
    draws = torch.Generator().manual_seed(0)
    best = 0.5 + 0.05 * torch.randn(num, generator=draws)
    noise = torch.randn(num, generator=draws)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    return torch.stack([best, best - behind - spread * noise])


def test_a_set_weighs_by_how_many_standard_errors_it_falls_short() -> None:
    num, k = 1000, 10
    error = 0.1 * (k / num) ** 0.5
    for z in (0.5, 1.0, 3.0):
        weights = set_weights(shares(num, z * error), k)
        expected = torch.tensor([1.0, float(torch.exp(torch.tensor(-z * z / 2)))])
        torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_more_images_make_the_choice_surer() -> None:
    few, many = (set_weights(shares(n, 0.01))[1] for n in (100, 10_000))
    assert few > 0.45
    assert many < 0.01


@pytest.mark.parametrize("same", [torch.full((3, 20), 0.4), torch.zeros(3, 0), torch.zeros(1, 5)])
def test_sets_that_do_not_differ_weigh_alike(same: Tensor) -> None:
    weights = set_weights(same)
    torch.testing.assert_close(weights, torch.full((len(same),), 1 / len(same)))


def test_a_set_that_is_better_by_the_same_for_every_image_takes_all() -> None:
    assert set_weights(torch.tensor([[0.5, 0.6], [0.4, 0.5]])).tolist() == [1.0, 0.0]
