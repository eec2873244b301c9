from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search import bf16, candidates
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import (
    CandidateGenerator,
    Centroids,
    Float32Generator,
    float_error,
    nearest_float32,
    true_products,
)
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def exact_squares(x: Tensor, c: Tensor) -> Tensor:
    return (exact_square(x)[:, None] + exact_square(c) - 2 * exact_dot(x, c)) / GRID**2


def cases(dim: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and centroids: unlike, nearly equal, opposite, short, and equal ones."""
    x, c = unit_rows(70, dim), unit_rows(33, dim, seed=1)
    near = to_grid((x[:1] + 1e-4 * torch.randn(40, dim, generator=torch.Generator().manual_seed(2))).clamp(-1, 1))
    return [(x, c), (near[:20], near[20:]), (x, -x[:9]), (x, to_grid(c * 0.01)), (x[:1], x[:1].repeat(12, 1))]


def bf16_generator(x: Tensor) -> Bf16Generator:
    return Bf16Generator(Bf16Generator.residual_norm(x))


@pytest.mark.parametrize("dim", [1, 3, 48, 768])
def test_estimates_satisfy_their_error_bound(dim: int) -> None:
    for x, c in cases(dim):
        exact, squares = exact_squares(x, c), exact_square(x)
        least, most = exact.min(1).values, exact.max(1).values
        bases = [(squares / GRID**2, False), (least, False), (most, False), (torch.zeros_like(least), False)]
        bases += [(least, True), ((least + most) / 2, True), (least / 2, True)]
        for generator in (Float32Generator(), bf16_generator(x)):
            for base, within_base in bases:
                rows = generator.rows([x], squares, base, within_base=within_base)
                found = generator.nearest(rows, Centroids.of(c, generator), min(6, len(c)))
                check(found, exact, base if within_base else None)


def check(found: candidates.Candidates, exact: Tensor, bound: Tensor | None) -> None:
    nearest = exact.min(1).values
    estimates = found.distances.double()
    true = exact.gather(1, found.labels)
    near = torch.ones(len(exact), dtype=torch.bool) if bound is None else nearest <= bound
    assert bool(((estimates - true)[near, 0].abs() <= found.error).all())
    free = estimates.isinf()
    assert not free[:, 0].any()
    if bound is None:
        assert not free[:, : min(2, free.shape[1])].any()
    elif free.shape[1] > 1:
        assert bool((nearest > bound)[free[:, 1]].all())  # a nearest one within the bound has a second candidate
        exact, estimates, free = exact[~free[:, 1]], estimates[~free[:, 1]], free[~free[:, 1]]
        found = replace(found, labels=found.labels[found.distances[:, 1].isfinite()])
        nearest, true = exact.min(1).values, exact.gather(1, found.labels)
    assert bool((estimates[:, 1:] >= estimates[:, :-1]).all())
    assert bool((estimates - found.error <= true)[~free].all())
    is_candidate = torch.zeros(exact.shape, dtype=torch.bool)
    is_candidate[(~free).nonzero()[:, 0], found.labels[~free]] = True
    last = estimates.masked_fill(free, -math.inf).max(1).values
    others = exact.masked_fill(is_candidate, math.inf).min(1).values
    assert bool((others >= last - found.error).all())  # others are no nearer than the last candidate
    assert bool((others > nearest)[free.any(1)].all())  # where places are free, the nearest is a candidate


def test_bfloat16_is_sharpest_near_the_base() -> None:
    x = unit_rows(50, 256)
    c = to_grid(F.normalize(x[:10] + 0.3 * unit_rows(10, 256, seed=3), dim=1))
    generator, squares, exact = bf16_generator(x), exact_square(x), exact_squares(x, c)
    errors = []
    for base in (exact.min(1).values, squares / GRID**2 + 6):
        found = generator.nearest(generator.rows([x], squares, base, within_base=False), Centroids.of(c, generator), 2)
        errors.append((found.distances[:, 0] - exact.gather(1, found.labels[:, :1])[:, 0]).abs().max())
    assert errors[0] < errors[1] / 2


def test_picked_rows_and_centroids_give_the_estimates_they_had() -> None:
    x, c = unit_rows(300, 20), unit_rows(50, 20, seed=1)
    some, labels = torch.tensor([0, 7, 8, 299]), torch.tensor([3, 4, 48])
    generators: list[CandidateGenerator] = [Float32Generator(), bf16_generator(x)]
    for generator in generators:
        rows, centroids = (
            generator.rows([x], exact_square(x), exact_square(x) / GRID**2, within_base=False),
            Centroids.of(c, generator),
        )
        whole = generator.nearest(rows, centroids.pick(labels), 2)
        picked = generator.nearest(rows.pick(some), centroids.pick(labels), 2)
        assert torch.equal(picked.labels, whole.labels[some])
        assert torch.allclose(picked.distances[:, 0], whole.distances[some, 0], atol=1e-6)


def test_tiles_do_not_change_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = unit_rows(400, 20), unit_rows(50, 20, seed=1)
    generator = bf16_generator(x)
    rows, centroids = (
        generator.rows([x], exact_square(x), exact_square(x) / GRID**2, within_base=False),
        Centroids.of(c, generator),
    )
    whole = generator.nearest(rows, centroids, 2)
    monkeypatch.setattr(bf16, "_CACHED_TILE", 64)
    cut = generator.nearest(rows, centroids, 2)
    assert torch.equal(cut.labels, whole.labels)
    assert torch.allclose(cut.distances, whole.distances)


def test_the_residual_norm_of_rows_is_that_of_what_rounding_takes() -> None:
    x = unit_rows(700, 30)
    residual = (x.double() - x.bfloat16().double()).norm(dim=1).max()
    assert residual <= Bf16Generator.residual_norm(x) <= residual * 1.001
    assert Bf16Generator.residual_norm(x.bfloat16().float()) == Bf16Generator.residual_norm(x[:0]) == 0


def test_the_float_error_of_real_searches_is_within_the_bound() -> None:
    x, c = unit_rows(40, 768), unit_rows(30, 768, seed=1)
    floats, index = nearest_float32(x, c, 30)
    assert (floats.double() - exact_squares(x, c).gather(1, index)).abs().max() < float_error(768, 4.001)


def test_a_search_of_no_rows_finds_nothing() -> None:
    assert nearest_float32(torch.zeros(0, 4), unit_rows(3, 4), 2)[0].shape == (0, 2)


def test_columns_beyond_sixteen_bits_and_ragged_ends_are_found() -> None:
    for num, dim in ((70_001, 3), (1, 5), (33, 5)):
        x, c = unit_rows(20, dim), unit_rows(num, dim, seed=1)
        x = torch.cat([x, c[-3:]])
        exact, generator = exact_squares(x, c), bf16_generator(x)
        least = exact.min(1).values
        rows = generator.rows([x], exact_square(x), least, within_base=False)
        found = generator.nearest(rows, Centroids.of(c, generator), min(6, num))
        assert bool(((found.distances[:, 0].double() - least).abs() <= found.error).all())
        above = found.distances - found.error > exact.gather(1, found.labels)
        assert not bool((above & found.distances.isfinite()).any())
        assert not num > 1 or bool((found.labels.diff(dim=1)[:, 0] != 0).all())


def test_products_stay_true_in_a_thread_while_others_come_and_go() -> None:
    before, meet = torch.get_float32_matmul_precision(), Barrier(2)

    def stay() -> str:
        with true_products():
            meet.wait()  # the other one is inside too
            meet.wait()  # it has left
            return torch.get_float32_matmul_precision()

    def go() -> None:
        with true_products():
            meet.wait()
        meet.wait()

    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(2) as pool:
            for first, second in ((stay, go), (go, stay)):
                found = [pool.submit(first), pool.submit(second)]
                assert {one.result() for one in found} == {"highest", None}
                assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
