"""A backbone whose forward pass takes a while without computing, so that faults find every stage at work."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from tests.models.tiny import OwnVit, Patches

FORWARD_S = 0.05


class SlowPatches(Patches):
    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, T, D)
        time.sleep(FORWARD_S)
        return super().forward(images)


def create(dim: int = 16, depth: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = OwnVit(dim, depth)
        model.patch_embed = SlowPatches(dim)
        return model
