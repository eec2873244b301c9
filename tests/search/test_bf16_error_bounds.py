from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search.bf16 import BF16_ROUNDOFF, Bf16Generator, PairBounds
from grappa_dist.search.candidates import Centroids, PreparedRows
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid

NUM = 24


def kinds(dim: int) -> dict[str, Tensor]:
    """Rows that rounding to bfloat16 treats badly, or hardly at all."""
    draws = torch.Generator().manual_seed(dim)

    def noise(num: int = NUM) -> Tensor:
        return torch.randn(num, dim, generator=draws)

    axes = torch.zeros(NUM, dim)
    axes[torch.arange(NUM), torch.randint(0, dim, (NUM,), generator=draws)] = 1
    steps = torch.randint(-3, 4, (NUM, dim), generator=draws) / GRID
    unit, one = F.normalize(noise(), dim=1), F.normalize(noise(1), dim=1)
    halfway = torch.full((NUM, dim), (1 + BF16_ROUNDOFF) * 2.0 ** -((dim - 1).bit_length() // 2 + 1))
    all_kinds = {
        "unit": unit,
        "nearly equal": F.normalize(1 + 1e-3 * noise(), dim=1),
        "between two bfloat16": halfway + steps,
        "axes": axes,
        "tiny": steps,
        "axes and tiny": 0.99 * axes + steps,
        "copies but for steps": one + steps,
        "what rounding takes, on top": one + 0.1 * F.normalize(unit - unit.bfloat16().float(), dim=1),
    }
    return {name: to_grid(rows.clamp(-1, 1)) for name, rows in all_kinds.items()}


def prepared(x: Tensor, c: Tensor, base: Tensor) -> tuple[Bf16Generator, PreparedRows, Centroids]:
    generator = Bf16Generator(Bf16Generator.residual_norm(x))
    return generator, generator.rows([x], exact_square(x), base, within_base=False), Centroids.of(c, generator)


def squared_distances(x: Tensor, c: Tensor) -> Tensor:
    return (exact_square(x)[:, None] + exact_square(c) - 2 * exact_dot(x, c)) / GRID**2


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 384])
def test_errors_of_two_scores_differ_by_no_more_than_their_pair_may(dim: int) -> None:
    for name, x in kinds(dim).items():
        for of_centroids, c in kinds(dim).items():
            exact = squared_distances(x, c)
            for base in (exact.min(1).values, exact_square(x) / GRID**2):
                generator, rows, centroids = prepared(x, c, base)
                pairs = generator._pair_bounds(rows, centroids).pairs
                assert pairs is not None
                scores = (rows.form @ centroids.form.T)[: len(x)].double()
                errors = scores - (base[:, None] - exact) / 2
                differ = errors[:, :, None] - errors[:, None, :]  # (P, K, K)
                own = BF16_ROUNDOFF * (scores.abs()[:, :, None] + scores.abs()[:, None, :])
                assert bool((differ <= pairs.double() + own).all()), (name, of_centroids)


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 384])
def test_the_nearest_is_always_possible(dim: int) -> None:
    for name, x in kinds(dim).items():
        for of_centroids, c in kinds(dim).items():
            exact = squared_distances(x, c)
            nearest = exact.min(1).values
            for base, within_base in ((nearest, False), (2 * nearest, True), (exact_square(x) / GRID**2, False)):
                generator = Bf16Generator(Bf16Generator.residual_norm(x))
                rows = generator.rows([x], exact_square(x), base, within_base=within_base)
                found = generator.nearest(rows, Centroids.of(c, generator), 4)
                row, place = found.possible.nonzero().unbind(1)
                left = exact.index_put((row, found.labels[row, place]), torch.tensor(9.0, dtype=exact.dtype))
                missed = (left <= nearest[:, None]).any(1)  # by a place, so it must be none of the candidates
                assert bool(found.possible[missed, -1].all()), (name, of_centroids)


def test_pairs_leave_fewer_rows_undecided_than_the_largest_error_of_all() -> None:
    draws = torch.Generator().manual_seed(0)
    coarse = F.normalize(torch.randn(8, 256, generator=draws), dim=1)
    c = to_grid(F.normalize(coarse.repeat(5, 1) + 0.02 * torch.randn(40, 256, generator=draws), dim=1))
    x = to_grid(F.normalize(coarse.repeat(50, 1) + 0.04 * torch.randn(400, 256, generator=draws), dim=1))
    base = squared_distances(x, c).min(1).values
    generator, rows, centroids = prepared(x, c, base)
    found = generator.nearest(rows, centroids, 6)
    by_largest = found.distances <= found.distances[:, :1] + 2 * found.error
    assert found.possible[:, 1].sum() < 0.7 * by_largest[:, 1].sum()


def test_the_error_of_a_pair_is_nearly_reached() -> None:
    x = kinds(384)["unit"][:1]
    residual = F.normalize(x - x.bfloat16().float(), dim=1)
    c = torch.cat([0.5 * x + 0.2 * residual, 0.5 * x - 0.2 * residual]).bfloat16().float()  # rounding changes none
    generator, rows, centroids = prepared(x.repeat(2, 1), c, squared_distances(x, c).min(1).values.repeat(2))
    pairs = generator._pair_bounds(rows, centroids).pairs
    assert pairs is not None
    errors = (rows.form[:1].double() @ centroids.form.double().T + squared_distances(x, c) / 2)[0]
    assert abs(float(errors[0] - errors[1])) > 0.7 * float(pairs[0, 1])


def test_without_pairs_the_margin_is_twice_the_error_and_what_rounding_adds() -> None:
    scores = torch.tensor([0.0, -0.5])
    bounds = PairBounds(0.01)
    wanted = (0.02 + 2 * BF16_ROUNDOFF * scores.abs()) * (1 + 2 * BF16_ROUNDOFF)
    for found in (bounds.margin_to_any(scores, scores.long()), bounds.margin_to(scores.long(), scores, scores.long())):
        assert torch.allclose(found, wanted)
