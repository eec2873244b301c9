"""Bottleneck adaptors A_i(h) = up_i(GELU(down_i(h))) of one layer. Shapes: N sets, H bottleneck, D channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Adaptors(nn.Module):
    """The N adaptors after one block, their bottlenecks side by side so that all of them are two matmuls.

    `up` starts at exactly zero, so a fresh model is the backbone, bit for bit.
    """

    def __init__(self, num_sets: int, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.num_sets, self.dim, self.bottleneck = num_sets, dim, bottleneck
        # NaN until initialised or loaded
        self.down_weight = nn.Parameter(torch.full((num_sets * bottleneck, dim), math.nan))
        self.down_bias = nn.Parameter(torch.full((num_sets * bottleneck,), math.nan))
        self.up_weight = nn.Parameter(torch.zeros(num_sets * bottleneck, dim))
        self.up_bias = nn.Parameter(torch.zeros(num_sets, dim))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """The default init of a linear layer for `down`, zeros for `up`."""
        bound = 1 / math.sqrt(self.dim)
        self.down_weight.uniform_(-bound, bound, generator=generator)
        self.down_bias.uniform_(-bound, bound, generator=generator)
        self.up_weight.zero_()
        self.up_bias.zero_()

    @torch.no_grad()
    def randomise(self, generator: torch.Generator) -> None:
        """The default init of a linear layer for both halves, nothing zero: one that is to learn without labels."""
        self.initialise(generator)
        bound = 1 / math.sqrt(self.bottleneck)
        self.up_weight.uniform_(-bound, bound, generator=generator)
        self.up_bias.uniform_(-bound, bound, generator=generator)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Adaptor `index` in the layout of two linear layers: down (H, D), (H,) and up (D, H), (D,)."""
        part = slice(index * self.bottleneck, (index + 1) * self.bottleneck)
        return {
            "down.weight": self.down_weight[part].detach().contiguous(),
            "down.bias": self.down_bias[part].detach().contiguous(),
            "up.weight": self.up_weight[part].detach().T.contiguous(),
            "up.bias": self.up_bias[index].detach().contiguous(),
        }

    @torch.no_grad()
    def load(self, sets: Sequence[Mapping[str, Tensor]]) -> None:
        """Fills all N adaptors from what `tensors` gave."""
        self.down_weight.copy_(torch.cat([s["down.weight"] for s in sets]))
        self.down_bias.copy_(torch.cat([s["down.bias"] for s in sets]))
        self.up_weight.copy_(torch.cat([s["up.weight"].T for s in sets]))
        self.up_bias.copy_(torch.stack([s["up.bias"] for s in sets]))
