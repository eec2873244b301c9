from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from grappa_dist.search import dense
from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.candidates import CandidateGenerator, Centroids, Float32Generator
from grappa_dist.search.dense import DenseCentroids, DenseRows, nearest_dense
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square
from grappa_dist.search.in_flight import Work, compact, finish, in_flight
from tests.search.test_candidates import cases


def top_scores(x: Tensor, y: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """What the fused kernel gives, from a table of all products."""
    found = (x.float() @ y.float().T + offsets.float()).topk(min(3, len(y)), dim=1)
    values, columns = torch.full((len(x), 3), -torch.inf), torch.zeros(len(x), 3, dtype=torch.int64)
    values[:, : found.values.shape[1]], columns[:, : found.values.shape[1]] = found.values, found.indices
    return values, columns


def kernel_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("grappa_dist.search.triton_topk")
    module.top_scores = top_scores  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def rows_of(x: Tensor, generator: CandidateGenerator) -> DenseRows:
    form = generator.row_form(x) if isinstance(generator, TritonGenerator) else None
    return DenseRows(x, exact_square(x), form)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 48])
@pytest.mark.parametrize("tile", [2**24, 2**10])
def test_labels_and_distances_are_those_of_exact_integers(
    dim: int, kernel: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_by_table(monkeypatch)
    monkeypatch.setattr(dense, "_CPU_TABLE_BYTES", tile)
    for x, c in cases(dim):
        generator = TritonGenerator(TritonGenerator.residual_norm(x)) if kernel else Float32Generator()
        rows, centroids = rows_of(x, generator), DenseCentroids.of(Centroids.of(c, generator))
        squares = exact_square(x)[:, None] + exact_square(c) - 2 * exact_dot(x, c)
        least, nearest = squares.min(1).values, squares.argmin(1)
        assert torch.equal(finish(nearest_dense(rows, centroids)).labels, nearest)
        found = finish(nearest_dense(rows, centroids, distances=True))
        assert torch.equal(found.labels, nearest)
        assert torch.equal(found.squares, least.long())
        within = torch.where(torch.arange(len(x)) % 2 == 0, least, least - 1) / GRID**2
        found = finish(nearest_dense(rows, centroids, distances=True, within=within))
        assert found.squares is not None
        assert torch.equal(found.labels[::2], nearest[::2])
        assert torch.equal(found.squares[::2], least[::2].long())
        assert bool((found.squares[1::2] > least[1::2] - 1).all())  # never one that does not exist


@pytest.mark.parametrize("kernel", [False, True])
def test_estimates_are_within_their_error(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_by_table(monkeypatch)
    for x, c in cases(48):
        generator = TritonGenerator(TritonGenerator.residual_norm(x)) if kernel else Float32Generator()
        centroids = DenseCentroids.of(Centroids.of(c, generator))
        scores, columns = centroids.top(rows_of(x, generator))
        true = (exact_dot(x, c) - exact_square(c) / 2) / GRID**2
        off = (scores.double() - true.gather(1, columns)).abs()
        assert bool((off[scores.isfinite()] <= centroids.error).all())


def counting(name: str, steps: int, log: list[str]) -> Work[str]:
    for step in range(steps):
        log.append(f"{name}{step}")
        assert (yield torch.tensor([step, 7])) == [step, 7]
    return name


def test_two_pieces_of_work_are_under_way_and_each_result_is_given_once() -> None:
    log: list[str] = []
    works = (counting(name, steps, log) for name, steps in zip("abcd", (2, 1, 0, 3), strict=True))
    assert sorted(in_flight(works)) == list("abcd")
    assert log[:3] == ["a0", "b0", "a1"]  # b begins before a goes on


@pytest.mark.parametrize("wanted", [[], [0], [1], [0, 1, 1, 0, 1], [1, 1, 1]])
def test_places_are_those_of_nonzero(wanted: list[int]) -> None:
    mask = torch.tensor(wanted, dtype=torch.bool)
    places, count = compact(mask)
    assert torch.equal(places[: int(count)], mask.nonzero()[:, 0])
