from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.kmeans.yinyang import Bounds, Drift, GroupedCentroids, Groups, Reassignments, reassign
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import CandidateGenerator, Float32Generator, float_error
from grappa_dist.search.fixed_point import GRID, exact_square, to_grid


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def squares(x: Tensor, c: Tensor) -> np.ndarray:
    a, b = ((t.double() * GRID).long().numpy() for t in (x, c))
    return np.square(a[:, None] - b).sum(2)


def unknown(x: Tensor, groups: Groups) -> Bounds:
    num = len(x)
    return Bounds(
        labels=torch.full((num,), -1, dtype=torch.int32),
        upper=torch.full((num,), math.inf),
        lower=torch.full((num, len(groups.members)), -math.inf),
        squares=exact_square(x),
    )


def walk(c: Tensor, steps: int) -> list[Tensor]:
    """Centroids that move less and less, with one that jumps and one that stands still."""
    generator = torch.Generator().manual_seed(9)
    path = [c]
    for step in range(steps):
        moved = path[-1] + 0.3 * 0.5**step * torch.randn(c.shape, generator=generator) / c.shape[1] ** 0.5
        moved[step % len(c)] = -moved[step % len(c)]
        moved[-1] = c[-1]
        path.append(to_grid(moved.clamp(-1, 1)))
    return path


def check(x: Tensor, c: Tensor, groups: Groups, known: Bounds) -> None:
    """Labels are those of integer arithmetic, and bounds are true."""
    exact = squares(x, c)
    labels = known.labels.long()
    assert labels.tolist() == exact.argmin(1).tolist()
    distances = torch.from_numpy(np.sqrt(exact.astype(np.float64))) / GRID
    assert bool((known.upper >= distances.gather(1, labels[:, None])[:, 0]).all())
    distances.scatter_(1, labels[:, None], math.inf)
    for g, members in enumerate(groups.members):
        assert bool((known.lower[:, g] <= distances[:, members].min(1).values).all())


def follow(
    x: Tensor, path: list[Tensor], groups: Groups, generator: CandidateGenerator | None = None
) -> list[Reassignments]:
    known, found = unknown(x, groups), list[Reassignments]()
    for step, c in enumerate(path):
        if step:
            known.shift_(Drift.between(path[step - 1], c, groups))
        found.append(reassign(lambda rows: x[rows].split(7), GroupedCentroids.of(c, groups, generator), known))
        check(x, c, groups, known)
    return found


def generators(x: Tensor) -> list[CandidateGenerator]:
    return [Float32Generator(), Bf16Generator(Bf16Generator.residual_norm(x))]


@pytest.mark.parametrize("num_groups", [1, 3, 8, 40])
@pytest.mark.parametrize("dim", [1, 3, 32, 200])
def test_labels_stay_those_of_integer_arithmetic_while_centroids_move(num_groups: int, dim: int) -> None:
    x, c = unit_rows(200, dim), unit_rows(40, dim, seed=1)
    for generator in generators(x):
        follow(x, walk(c, 8), Groups.around(c, num_groups), generator)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_near_ties_and_equal_centroids_go_to_the_lowest_index(num_groups: int) -> None:
    c = unit_rows(6, 16)
    shaken = c + torch.randint(-2, 3, c.shape, generator=torch.Generator().manual_seed(1)) / GRID
    c = to_grid(torch.cat([c, shaken.clamp(-1, 1), c[:3], c[:3], c[:3]]))
    x = to_grid(torch.cat([unit_rows(30, 16, seed=2), c, (c[:6] + c[6:12]) / 2]))
    for generator in generators(x):
        follow(x, [c, c.flip(0), c], Groups.around(c, num_groups), generator)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_more_centroids_may_be_equally_near_than_there_are_candidates(num_groups: int) -> None:
    c = torch.cat([unit_rows(3, 16, seed=1), unit_rows(1, 16).repeat(12, 1), unit_rows(1, 16).repeat(9, 1)])
    c = to_grid(c + torch.randint(0, 2, c.shape, generator=torch.Generator().manual_seed(2)) / GRID)
    x = torch.cat([unit_rows(20, 16, seed=3), unit_rows(1, 16).repeat(15, 1)])
    for generator in generators(x):
        follow(x, [c, c.flip(0)], Groups.around(c, num_groups), generator)


@pytest.mark.parametrize("num_groups", [1, 5])
def test_float_noise_within_the_bound_changes_no_label(num_groups: int) -> None:
    x, c = unit_rows(150, 24), unit_rows(30, 24, seed=1)
    generator, error = torch.Generator().manual_seed(5), float_error(24, 4.0)

    def noisy(x: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
        distances = torch.cdist(x.double(), c.double()).square()
        noise = (torch.rand(distances.shape, generator=generator, dtype=torch.float64) * 2 - 1) * error * 0.7
        best = (distances + noise).topk(t, largest=False)
        return best.values.float(), best.indices

    follow(x, walk(c, 6), Groups.around(c, num_groups), Float32Generator(noisy))


def test_many_tiny_steps_do_not_outrun_the_bounds() -> None:
    generator = torch.Generator().manual_seed(3)
    base = unit_rows(1, 16)
    x, c = (to_grid(base + 1e-5 * torch.randn(num, 16, generator=generator)) for num in (120, 20))
    path = [c]
    for _ in range(30):
        steps = torch.randint(-3, 4, c.shape, generator=generator)
        path.append(to_grid(path[-1] + steps / GRID))
    for generator in generators(x):
        follow(x, path, Groups.around(c, 4), generator)


def test_reassignments_are_the_changed_labels() -> None:
    x, c = unit_rows(100, 8), unit_rows(12, 8, seed=1)
    path = walk(c, 5)
    before = torch.full((len(x),), -1)
    for reassigned, centroids in zip(follow(x, path, Groups.around(c, 4)), path, strict=True):
        after = torch.from_numpy(squares(x, centroids).argmin(1))
        changed = (before != after).nonzero()[:, 0]
        assert reassigned.rows.tolist() == changed.tolist()
        assert torch.equal(reassigned.before, before[changed])
        assert torch.equal(reassigned.after, after[changed])
        before = after


def test_centroids_that_stand_still_are_not_searched_again() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.eye(64)[:32]
    x = to_grid(F.normalize(coarse.repeat(20, 1) + 0.02 * torch.randn(640, 64, generator=generator), dim=1))
    first, second = follow(x, [coarse, coarse], Groups.around(coarse, 4))
    assert (first.searched, second.searched) == (640 * 32, 0)


def test_rows_far_from_any_tie_are_decided_by_floats() -> None:
    c = torch.eye(5)
    assert [m.by_integers for m in follow(c.repeat(3, 1), [c], Groups.around(c, 2))] == [0]


def test_no_rows_make_no_reassignments() -> None:
    c = unit_rows(3, 4)
    groups = Groups.around(c, 2)
    x = torch.zeros(0, 4)
    reassigned = reassign(lambda rows: [x[rows]], GroupedCentroids.of(c, groups), unknown(x, groups))
    assert (len(reassigned.rows), reassigned.searched) == (0, 0)
