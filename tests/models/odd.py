"""Backbones that a trial must find out about, and such as it must not refuse."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.models import tiny


class Wrapper(nn.Module):
    """An existing ViT as a part: its parts have two names each."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.patch_embed, self.blocks, self.norm, self.embed_dim = (
            getattr(inner, name) for name in ("patch_embed", "blocks", "norm", "embed_dim")
        )


def wrapped(**kwargs: Any) -> nn.Module:
    return Wrapper(tiny.create(**kwargs))
