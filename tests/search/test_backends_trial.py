from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search.backends import fused_pays, keeps_its_word
from grappa_dist.search.bf16 import HalfProposer
from grappa_dist.search.candidates import Centroids, FloatProposer, PreparedRows, Proposals
from grappa_dist.search.fixed_point import to_grid


def unit_rows(num: int, seed: int) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, 32, generator=torch.Generator().manual_seed(seed)), dim=1))


@dataclass(frozen=True)
class Careless(FloatProposer):
    """Off by more than it says, or blind to some centroids."""

    off: float = 0.0
    blind: int = 0

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        found = super().nearest(rows, centroids.pick(torch.arange(len(centroids.values) - self.blind)), t)
        return Proposals(found.distances + self.off, found.labels, found.error)


def test_proposers_that_err_by_more_than_they_say_are_told() -> None:
    x, c = unit_rows(60, 0), unit_rows(25, 1)
    assert keeps_its_word(FloatProposer(), x, c)
    assert keeps_its_word(HalfProposer(HalfProposer.left_out(x)), x, c)
    assert not keeps_its_word(Careless(off=1e-3), x, c)
    assert not keeps_its_word(Careless(blind=12), x, c)


def test_a_processor_fuses_nothing() -> None:
    assert not fused_pays(torch.device("cpu"))
