"""Algorithm 1 of the paper to the letter, as a judge of speed. Shapes: B images, T tokens, D channels, N sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grappa_dist.models import Adaptors, Attention

Fuse = Callable[[Tensor, Tensor, Tensor], Tensor]


class LiteralAdaptors:
    """U_i = A_i(h) + y, alpha = softmax(Q pool(h) . K pool(U_i) / sqrt(D)), out = sum_i alpha_i U_i + x; (B, T, D)."""

    def __init__(self, adaptors: Adaptors, attention: Attention) -> None:
        self._sets = [adaptors.tensors(i) for i in range(adaptors.num_sets)]
        self._attention = attention

    def _outputs(self, h: Tensor, y: Tensor) -> list[Tensor]:
        return [
            F.linear(F.gelu(F.linear(h, s["down.weight"], s["down.bias"])), s["up.weight"], s["up.bias"]) + y
            for s in self._sets
        ]

    def stacked(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """With all U_i in one (B, N, T, D) tensor."""
        u = torch.stack(self._outputs(h, y), 1)
        query, keys = F.linear(h.mean(1), self._attention.query), F.linear(u.mean(2), self._attention.key)
        alpha = (torch.einsum("bd,bnd->bn", query, keys) / math.sqrt(h.shape[-1])).softmax(1)
        return (alpha[:, :, None, None] * u).sum(1) + x

    def listed(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """With N tensors (B, T, D), added up one after the other."""
        outputs = self._outputs(h, y)
        query = F.linear(h.mean(1), self._attention.query)
        logits = [(query * F.linear(u.mean(1), self._attention.key)).sum(1) / math.sqrt(h.shape[-1]) for u in outputs]
        alpha = torch.stack(logits, 1).softmax(1)
        fused = torch.zeros_like(h)
        for i, u in enumerate(outputs):
            fused = fused + alpha[:, i, None, None] * u
        return fused + x


class LiteralLayer(nn.Module):
    """A plain pre-norm ViT block, opened, and the fusion after it."""

    def __init__(self, block: Any, fuse: Fuse) -> None:
        super().__init__()
        self.block, self._fuse = block, fuse

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = tokens + self.block.attn(self.block.norm1(tokens))
        y: Tensor = self.block.mlp(self.block.norm2(x))
        return self._fuse(x + y, x, y)
