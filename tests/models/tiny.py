"""Backbones small enough for a test: a user's own module, and timm's ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist._compat import declare_torchvision_ops

TIMM = "timm:vit_tiny_patch16_224"
TIMM_KWARGS: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


class Patches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, dim)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, T, D)
        tokens: Tensor = self.linear(nn.functional.unfold(images, 8, stride=8).transpose(1, 2))
        return tokens


class OwnVit(nn.Module):
    """What a user's module must have, and nothing else: patch_embed, blocks, norm, embed_dim."""

    def __init__(self, dim: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed_dim = dim
        self.patch_embed = Patches(dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.5, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)


def create(dim: int = 8, depth: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return OwnVit(dim, depth)


def no_vit() -> nn.Module:
    return nn.Linear(2, 2)


def timm_vit(name: str = TIMM, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A timm model of random weights that depend on the seed, in eval mode; every tensor is random, norms too."""
    declare_torchvision_ops()
    import timm

    model: nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=0, **(kwargs or TIMM_KWARGS)).eval()
    fill(model, seed)
    return model


@torch.no_grad()
def fill(module: nn.Module, seed: int, scale: float = 0.2) -> None:
    """Random values for every parameter, with none left at a kind zero or one."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
