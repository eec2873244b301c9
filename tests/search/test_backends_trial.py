from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
