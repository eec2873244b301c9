from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, Grappa
from grappa_dist.models.shared_backbone import SharedBackbone
from grappa_dist.progress import lost_trials
from tests.models import tiny

PX = 32
KINDS = [(0, False), (1, False), (3, False), (3, True)]  # sets, and whether there is an attention
TIMMS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": PX, "depth": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": PX, "depth": 2},  # two tokens before the patches
    "beit_base_patch16_224": {"img_size": PX, "depth": 2, "embed_dim": 48, "num_heads": 4},  # relative positions
    "vit_small_patch16_dinov3": {"img_size": PX, "depth": 2},  # rotary positions, given to every block
    "vit_base_patch16_siglip_224": {"img_size": PX, "depth": 2, "embed_dim": 48, "num_heads": 4},  # pools by attention
}


class Twice(tiny.OwnVit):
    """Its patches are embedded twice, of other images the second time, and its first block is run again at the end."""

    def forward_features(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(images) + self.patch_embed(images.flip(3))
        for block in (*self.blocks, self.blocks[0]):
            tokens = block(tokens)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        return self.norm(tokens).mean(1)


class Reversed(Twice):
    """The block that is listed first comes last, so it gets tokens that depend on adaptors."""

    def forward_features(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(images)
        for block in reversed([*self.blocks]):
            tokens = block(tokens)
        return tokens


class InPlace(tiny.OwnVit):
    """Adds positions to the tokens in place, and so does a block."""

    def forward_features(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(images)
        tokens += 0.1
        for block in self.blocks:
            tokens = block(tokens)
            tokens *= 1.1
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        return self.norm(tokens).mean(1)


def one_block_thrice() -> nn.Module:
    model = tiny.create()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)  # type: ignore[index]
    return model


def own(kind: type[tiny.OwnVit]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return kind()


BACKBONES = {
    **{name: (lambda name=name: tiny.timm_vit(name, **TIMMS[name])) for name in TIMMS},
    "own": tiny.create,
    "one block thrice": one_block_thrice,
    "twice": lambda: own(Twice),
    "in place": lambda: own(InPlace),
    "reversed": lambda: own(Reversed),
}


def filled(model: Grappa, number: int) -> Grappa:
    for layer in model.layers:
        tiny.fill(layer.adaptors, seed=number)
        if layer.attention is not None:
            tiny.fill(layer.attention, seed=number)
    return model.requires_grad_(False).eval()


def both(given: nn.Module) -> tuple[SharedBackbone, list[Grappa], list[Grappa]]:
    """Models of every kind that share a backbone, and the same ones of a backbone each."""
    backbone = Backbone(given, Preprocess(image_size=PX))
    alone = [Grappa(copy.deepcopy(backbone), sets, 4, attention=attention) for sets, attention in KINDS]
    shared = SharedBackbone(backbone)
    sharing = [shared.model(sets, 4, attention=attention) for sets, attention in KINDS]
    return shared, [filled(m, i) for i, m in enumerate(sharing)], [filled(m, i) for i, m in enumerate(alone)]


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_features_side_by_side_are_those_of_each_model_alone_bit_for_bit(name: str) -> None:
    before = lost_trials()
    shared, sharing, alone = both(BACKBONES[name]())
    draws = torch.Generator().manual_seed(0)
    for batch in range(3):
        images = torch.rand(5, 3, PX, PX, generator=draws)
        right = [model(images) for model in alone]
        assert len({tuple(z[0].tolist()) for z in right}) == len(KINDS)
        for found, expected in zip(shared.side_by_side(sharing, images), right, strict=True):
            assert torch.equal(found, expected), batch
        for number in (3, 0, 2):  # and each alone, in any order
            assert torch.equal(sharing[number](images), right[number])
        some = shared.side_by_side([sharing[3], sharing[1]], images)
        assert torch.equal(some[0], right[3])
        assert torch.equal(some[1], right[1])
    lost = [line for line in lost_trials() if line not in before]
    assert len(lost) == (name == "reversed"), lost


@torch.inference_mode()
def test_patches_and_the_first_block_are_computed_once_for_all_models() -> None:
    given: Any = tiny.create()
    calls = {"patches": 0, "first block": 0, "second block": 0}

    def watched(name: str) -> Any:
        def count(*_: object) -> None:
            calls[name] += 1

        return count

    given.patch_embed.linear.register_forward_hook(watched("patches"))
    given.blocks[0].register_forward_hook(watched("first block"))
    given.blocks[1].register_forward_hook(watched("second block"))
    shared, sharing, _ = both(given)
    for _ in range(3):
        shared.side_by_side(sharing, torch.rand(2, 3, PX, PX))
    assert calls == {"patches": 3, "first block": 3, "second block": 3 * len(KINDS)}


def test_models_hold_the_weights_of_their_backbone_once() -> None:
    _, sharing, alone = both(tiny.create())

    def held(models: list[Grappa]) -> int:
        """Bytes of different tensors."""
        return sum({p.data_ptr(): p.nbytes for model in models for p in model.parameters()}.values())

    own = sum(p.nbytes for p in alone[0].parameters())
    assert held(alone) - held(sharing) == (len(KINDS) - 1) * own


def test_weights_of_the_sets_are_those_of_one_model_whosever_turn_it_is() -> None:
    _, sharing, alone = both(tiny.create())
    images, weights = torch.rand(2, 3, PX, PX), torch.tensor([1.0, 0.0, 3.0])
    sharing[0](images)
    for model in (sharing[2], alone[2]):
        model.weigh(weights)
    assert torch.equal(sharing[2](images), alone[2](images))
    assert torch.equal(sharing[2].last_attention(), alone[2].last_attention())
    assert torch.equal(sharing[3](images), alone[3](images))
