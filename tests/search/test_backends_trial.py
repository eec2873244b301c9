from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist import progress
from grappa_dist.search import backends
from grappa_dist.search.backends import triton_is_faster, within_error_bound
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import Candidates, Centroids, Float32Generator, PreparedRows
from grappa_dist.search.fixed_point import to_grid


def unit_rows(num: int, seed: int) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, 32, generator=torch.Generator().manual_seed(seed)), dim=1))


@dataclass(frozen=True)
class Careless(Float32Generator):
    """Off by more than its error bound, or blind to some centroids."""

    off: float = 0.0
    blind: int = 0

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Candidates:
        found = super().nearest(rows, centroids.pick(torch.arange(len(centroids.values) - self.blind)), t)
        return Candidates(found.distances + self.off, found.labels, found.error)


def test_generators_that_err_by_more_than_their_bound_are_found() -> None:
    x, c = unit_rows(60, 0), unit_rows(25, 1)
    assert within_error_bound(Float32Generator(), x, c)
    assert within_error_bound(Bf16Generator(Bf16Generator.residual_norm(x)), x, c)
    assert not within_error_bound(Careless(off=1e-3), x, c)
    assert not within_error_bound(Careless(blind=12), x, c)


def test_a_processor_fuses_nothing() -> None:
    assert not triton_is_faster(torch.device("cpu"))


def test_a_kernel_that_cannot_be_used_is_told_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_lost", list[str]())
    gpu, cpu_rows = torch.device("cuda", 0), lambda rows, device: rows
    monkeypatch.setattr(torch.Tensor, "to", cpu_rows)

    def no_compiler(generator: object, x: Tensor, c: Tensor) -> bool:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    way = "the fused kernel of k-means is not used: "
    for within, line in (
        (no_compiler, "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"),
        (no_compiler, "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"),
        (lambda generator, x, c: False, "its scores are further from the exact ones than its error bound allows"),
    ):
        monkeypatch.setattr(backends, "within_error_bound", within)
        assert not triton_is_faster.__wrapped__(gpu)
        assert progress.lost_trials()[-1] == way + line
    assert len(progress.lost_trials()) == 2
