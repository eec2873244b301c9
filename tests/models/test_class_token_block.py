"""The last block for the class token alone gives what the whole block gives, or is not used, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, PackedGrappa, create_backbone
from grappa_dist.models.class_token_block import ClassTokenBlock, last_block
from grappa_dist.models.packed import activation_bytes
from tests.models import tiny

TOKEN = {"global_pool": "token"}  # where timm's default is another
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "DINO": ("vit_small_patch16_224", {}),
    "DINOv2 (registers, layer scale)": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv3 (rotary positions)": ("vit_small_patch16_dinov3", TOKEN),
    "CLIP (a norm before the blocks)": ("vit_base_patch16_clip_224", {}),
    "DeiT III (layer scale, no norm of queries)": ("deit3_small_patch16_224", {}),
    "BEiT (relative positions of each block)": ("beit_base_patch16_224", TOKEN),
    "BEiT (relative positions of all blocks)": (
        "beit_base_patch16_224",
        {**TOKEN, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "EVA02 (rotary positions, SwiGLU, three projections)": ("eva02_base_patch14_224", TOKEN),
    "Perception Encoder (rotary positions)": ("vit_pe_core_tiny_patch16_384", TOKEN),
    "norms of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
}
WHOLE = {
    "SigLIP": ("vit_base_patch16_siglip_224", {}, "pooled by 'map'"),
    "DINOv3 as in timm": ("vit_small_patch16_dinov3", {}, "pooled by 'avg'"),
    "DeiT, whose head reads two tokens": ("deit_tiny_distilled_patch16_224", {}, "a trial of Block failed: index 1"),
    "another block": (
        "vit_relpos_small_patch16_224",
        {**TOKEN, "class_token": True},
        "RelPosBlock with RelPosAttention is not known",
    ),
}


def backbone(name: str, kwargs: dict[str, Any], depth: int = 2) -> Backbone:
    size = 28 if "patch14" in name else 32
    kwargs = {**tiny.TIMM_KWARGS, "img_size": size, "depth": depth, **kwargs}
    base = create_backbone(f"timm:{name}", kwargs, {"image_size": size}, pretrained=False)
    tiny.fill(base, seed=3)
    return base


def learnt(base: Backbone, images: Tensor, **options: Any) -> tuple[PackedGrappa, Tensor, list[Tensor]]:
    """Features of two sets, and the gradients of all their adaptors for a loss that weighs every feature."""
    model = PackedGrappa(base, 2, 3, **options).to(images.dtype)
    for index in range(2):
        for i, adaptors in enumerate(model.adaptors(index)):
            tiny.fill(adaptors, seed=100 * index + i)
            adaptors.requires_grad_(True)
    z = model(images)
    (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(z)).sum().backward()
    gradients = [p.grad for index in range(2) for p in model.parameters_of(index)]
    return model, z, [g for g in gradients if g is not None]


def images_for(base: Backbone) -> Tensor:
    size = base.preprocess.image_size
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "recompute"),
    [*((family, False) for family in KNOWN), ("DINO", True), ("DINOv3 (rotary positions)", True)],
)
def test_features_and_gradients_are_those_of_the_whole_block(family: str, recompute: bool) -> None:
    images = images_for(backbone(*KNOWN[family]))
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-6)):
        sides = [
            learnt(backbone(*KNOWN[family]), images.to(dtype), recompute=recompute, class_token_only=only)
            for only in (True, False)
        ]
        (short, z, gradients), (_, expected, right) = sides
        assert short.whole_because == ""
        assert isinstance(short.layers[-1].block, ClassTokenBlock)
        assert len(gradients) == len(right) == 2 * 2 * 4
        for found, plain in zip([z, *gradients], [expected, *right], strict=True):
            largest = float(plain.detach().abs().max())
            assert largest > 0
            torch.testing.assert_close(found, plain, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("family", WHOLE)
def test_what_reads_other_tokens_or_is_unknown_stays_whole_with_the_reason(family: str) -> None:
    name, kwargs, why = WHOLE[family]
    model = PackedGrappa(backbone(name, kwargs), 1, 3)
    assert not isinstance(model.layers[-1].block, ClassTokenBlock)
    assert why in model.whole_because


def test_a_users_own_blocks_stay_whole_and_timms_in_a_users_own_model_do_not() -> None:
    own = tiny.OwnVit(24, 2)
    preprocess = Preprocess(image_size=32)
    assert last_block(Backbone(own, preprocess))[1] == "TransformerEncoderLayer with NoneType is not known"
    own.blocks = tiny.timm_vit().blocks  # type: ignore[assignment]
    assert last_block(Backbone(own, preprocess))[1] == ""


class Doubled(nn.Module):
    """Stands for a part of the block that a later timm computes in another way."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + 1e-6 * tokens.mean(1, keepdim=True)  # mixes tokens, a little


def test_a_block_that_computes_something_else_than_its_type_promises_stays_whole() -> None:
    base = Backbone(tiny.timm_vit(), Preprocess(image_size=32))
    assert last_block(base)[1] == ""
    base.blocks[-1].norm2 = nn.Sequential(base.blocks[-1].norm2, Doubled())
    block, why = last_block(base)
    assert block is base.blocks[-1]
    assert re.match(r"in a trial Block computes something else than expected, with timm \d", why)


def test_the_trial_changes_neither_the_model_nor_the_generator() -> None:
    base = Backbone(tiny.timm_vit(), Preprocess(image_size=32))
    before, blocks = {k: t.clone() for k, t in base.state_dict().items()}, list(base.blocks)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    last_block(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(base.blocks) == blocks
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in base.state_dict().items())


def test_a_mask_is_left_to_the_block_itself() -> None:
    block = tiny.timm_vit().blocks[0]  # type: ignore[index]
    tokens, mask = torch.randn(2, 5, 24), torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        found, whole = ClassTokenBlock(block)(tokens, attn_mask=mask), block(tokens, attn_mask=mask)
        assert torch.equal(found, whole[:, :1])
        assert not torch.allclose(found, block(tokens)[:, :1])


def test_the_last_block_keeps_less_for_the_backward_pass() -> None:
    tiny.timm_vit()
    with torch.device("meta"):
        deep = {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}
        short, whole = (
            PackedGrappa(create_backbone(tiny.TIMM, deep, {}, pretrained=False), 1, 8, class_token_only=only)
            for only in (True, False)
        )
    assert short.whole_because == ""
    assert activation_bytes(short, 64) < 0.7 * activation_bytes(whole, 64)  # of two blocks that keep anything
