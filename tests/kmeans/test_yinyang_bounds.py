from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.kmeans.yinyang import Bounds, Drift, Groups
from grappa_dist.search.fixed_point import to_grid


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def test_groups_hold_every_centroid_once_however_many_are_asked_for() -> None:
    for num in (0, 1, 3, 7, 100):
        groups = Groups.around(torch.cat([unit_rows(5, 4), unit_rows(1, 4).repeat(2, 1)]), num)
        assert torch.cat(groups.members).sort().values.tolist() == list(range(7))
        assert all((groups.of[members] == g).all() for g, members in enumerate(groups.members))
        assert 1 <= len(groups.members) <= max(1, num)


def test_bounds_shift_by_at_least_what_centroids_moved() -> None:
    old, new = unit_rows(30, 12), unit_rows(30, 12, seed=1)
    groups = Groups.around(old, 4)
    drift = Drift.between(old, new, groups)
    moved = (new.double() - old.double()).norm(dim=1)
    assert bool((drift.own >= moved).all())
    assert torch.allclose(drift.own.double(), moved, atol=1e-5)
    assert drift.groups.tolist() == [float(drift.own[m].max()) for m in groups.members]
    known = Bounds(torch.tensor([3, 0]), torch.ones(2), torch.ones(2, len(groups.members)), torch.ones(2))
    known.shift_(drift)
    assert torch.equal(known.upper, 1 + drift.own[[3, 0]])
    assert torch.equal(known.lower, (1 - drift.groups).expand(2, -1))
