"""Backbones that a trial must refuse or warn of, and such as it must not refuse."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

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


class Tokens(nn.Module):
    """Class token and positions in front of patches, (B, 3, S, S) -> (B, 1 + T, D)."""

    def __init__(self, hub: Any) -> None:
        super().__init__()
        self.hub = hub

    def forward(self, images: Tensor) -> Tensor:
        return self.hub.prepare(images)


class Hub(tiny.OwnVit):
    """As the ViTs of torch.hub: class token and positions are added by the module."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__(dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))

    def prepare(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed

    def tokens(self, images: Tensor) -> Tensor:
        tokens = self.prepare(images)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed


class Dino(Hub):
    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 0]


class DinoV2(Hub):
    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.tokens(images)
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)["x_norm_clstoken"]


class Classifier(Hub):
    """Its forward returns logits, which are no features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tokens(images)[:, 0])
        return logits


class WithMethods(DinoV2):
    """DINOv2's layout with what timm's models have: its features are the module's own."""

    def forward_head(self, found: dict[str, Tensor], pre_logits: bool = False) -> Tensor:
        return found["x_norm_clstoken"]


class MeanPooled(tiny.OwnVit):
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        pooled: Tensor = self.norm(tokens).mean(1)
        return pooled


class Same(tiny.OwnVit):
    """Its own forward is what its parts are."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.patch_embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0], tokens


class Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.number = name, nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Any:
        if self.name == "dropout":
            return functional.dropout(tokens, 0.5)
        if self.name == "batch":
            return tokens - tokens.mean((0, 1))
        if self.name == "tuple":
            return tokens, None
        if self.name == "detached":
            return tokens.detach()
        if self.name == "bf16":
            return tokens.bfloat16()
        if self.name == "raises":
            raise KeyError("no such thing")
        return tokens.sum(1)


def with_block(name: str) -> nn.Module:
    model: Any = tiny.create()
    model.blocks[1] = Function(name)
    return model


def with_norm(name: str) -> nn.Module:
    model: Any = tiny.create()
    model.norm = Function(name)
    return model


def seeded(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        kinds: dict[str, type[nn.Module]] = {
            "dino": Dino,
            "dinov2": DinoV2,
            "classifier": Classifier,
            "methods": WithMethods,
            "mean": MeanPooled,
            "same": Same,
            "hub": Hub,
        }
        return kinds[kind]()


def hub_with_tokens() -> nn.Module:
    model: Any = seeded("hub")
    wrapper = Wrapper(model)
    model.prepare_patches = model.patch_embed
    wrapper.patch_embed = Tokens(model)
    return wrapper


def unseeded() -> nn.Module:
    return tiny.OwnVit()


def by_numpy() -> nn.Module:
    model = tiny.create()
    with torch.no_grad():
        next(model.parameters()).mul_(float(np.random.default_rng().random()))
    return model


def by_process() -> nn.Module:
    """Other weights in each process, the same in one."""
    model = tiny.create()
    with torch.no_grad():
        next(model.parameters()).mul_(1 + os.getpid())
    return model


class Hidden(nn.Module):
    """A random tensor that is neither a parameter nor a persistent buffer."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        scale = torch.rand(8)
        if buffer:
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.scale


def hidden(*, buffer: bool) -> nn.Module:
    model: Any = tiny.create()
    model.norm = Hidden(buffer=buffer)
    return model


class Counting(nn.BatchNorm1d):
    def forward(self, tokens: Tensor) -> Tensor:
        self.running_mean += 1  # type: ignore[operator]
        return tokens


def counting() -> nn.Module:
    model: Any = tiny.create()
    model.norm = Counting(8)
    return model


def filled(value: float, name: str = "norm.weight") -> nn.Module:
    model = tiny.create()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    return model


def with_nan_buffer() -> nn.Module:
    model: Any = tiny.create()
    model.norm = nn.Sequential(model.norm, Scaled(torch.full((8,), float("nan"))))
    return model


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Any:
        return tokens * self.scale


def constant() -> nn.Module:
    model: Any = tiny.create()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
    return model


def with_head() -> nn.Module:
    model = tiny.create()
    model.head = nn.Linear(8, 5, bias=False)
    with torch.no_grad():
        model.head.weight.fill_(1)
    return model


def elsewhere() -> nn.Module:
    """`blocks` is a list of its own of the blocks that are run: what is put into it is not."""
    model: Any = seeded("methods")
    model.real, model.blocks = model.blocks, nn.ModuleList(model.blocks)
    model.tokens = _Through(model.real, model)
    return model


class _Through:
    def __init__(self, blocks: nn.ModuleList, model: Any) -> None:
        self.blocks, self.model = blocks, [model]

    def __call__(self, images: Tensor) -> Tensor:
        tokens = self.model[0].prepare(images)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.model[0].norm(tokens)
        return normed


def tied() -> nn.Module:
    """One block three times, a view of a larger tensor, a number and an empty tensor among the buffers, strides."""
    model: Any = tiny.create()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    table = torch.arange(24.0).view(4, 6)
    model.register_buffer("table", table)
    model.register_buffer("part", table[1:3])
    model.register_buffer("turned", table.T)
    model.register_buffer("number", torch.tensor(3.0))
    model.register_buffer("none", torch.zeros(0))
    return model


def with_buffers() -> nn.Module:
    """Complex numbers, as rotary positions have them, one number in many places, and a weight that is computed."""
    model: Any = tiny.create()
    model.register_buffer("rotations", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=False)
    model.register_buffer("mask", torch.zeros(1, 1).expand(4, 4))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model.norm = nn.Sequential(model.norm, torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    return model


def of_type(name: str) -> nn.Module:
    return tiny.create().to(getattr(torch, name))


def frozen_patches() -> nn.Module:
    """Patches that are computed without gradients: all parameters change features nonetheless."""
    model: Any = tiny.create()
    model.patch_embed.forward = torch.no_grad()(model.patch_embed.forward)
    return model


def method() -> nn.Module:
    """patch_embed is a method."""

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit: Any = tiny.create()
            self.inner, self.blocks, self.norm, self.embed_dim = vit.patch_embed, vit.blocks, vit.norm, 8

        def patch_embed(self, images: Tensor) -> Tensor:
            tokens: Tensor = self.inner(images)
            return tokens

    return Method()


def with_part(name: str, kind: str) -> nn.Module:
    model: Any = tiny.create()
    delattr(model, name)
    parts = {"list": list(range(2)), "pair": (8, 8), "empty": nn.ModuleList(), "none": None, "text": "8"}
    setattr(model, name, parts[kind])
    return model


def extra_state() -> nn.Module:
    class Extra(nn.LayerNorm):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    model: Any = tiny.create()
    model.norm = Extra(8)
    return model


def lazy() -> nn.Module:
    model: Any = tiny.create()
    model.extra = nn.LazyLinear(3)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny.OwnVit()


def raises() -> nn.Module:
    raise TypeError("a fault inside")


def exits() -> nn.Module:
    raise SystemExit(3)


def pair() -> object:
    return tiny.create(), None


NUMBER = 7
