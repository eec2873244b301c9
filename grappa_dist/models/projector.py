"""The Barlow Twins projector g, thrown away after training. Shapes: B rows of this rank, C widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AllSum = Callable[[Tensor], Tensor]


class GlobalBatchNorm(nn.Module):
    """Batch norm by the statistics of all ranks' rows; without running averages, since nobody evaluates a projector."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, z: Tensor, allsum: AllSum) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # bf16 cannot count past 256
        size = allsum(z.new_tensor(float(len(z))))
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Projector(nn.Module):
    """Linear-BN-ReLU for all widths but the last, then Linear; no biases (Zbontar et al., Barlow Twins, 2021)."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [dim, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(GlobalBatchNorm(width) for width in widths[:-1])

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """The default init of linear layers."""
        for linear in self.linears:
            bound = 1 / math.sqrt(linear.in_features)  # type: ignore[arg-type]
            linear.weight.uniform_(-bound, bound, generator=generator)  # type: ignore[operator]

    def forward(self, z: Tensor, allsum: AllSum = lambda t: t) -> Tensor:
        """(B, D) -> (B, C); each call is one view, with statistics of its own."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            z = F.relu(norm(linear(z), allsum))
        return self.linears[-1](z)
