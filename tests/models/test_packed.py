from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, Grappa, PackedGrappa, create_backbone
from grappa_dist.models.packed import PackedLayer, activation_bytes
from tests.models import tiny

BOTTLENECK = 3
PREPROCESS = Preprocess(image_size=32)


def backbone(name: str) -> Backbone:
    return Backbone(tiny.timm_vit() if name == "timm" else tiny.create(), PREPROCESS)


def packed(base: Backbone, num_sets: int, recompute: bool = False) -> PackedGrappa:
    """Adaptors that do something, of each set another thing."""
    model = PackedGrappa(base, num_sets, BOTTLENECK, recompute=recompute)
    for index in range(num_sets):
        for i, adaptors in enumerate(model.adaptors(index)):
            tiny.fill(adaptors, seed=100 * index + i)
            adaptors.requires_grad_(True)
    return model


def alone(base: Backbone, tensors: dict[str, Tensor]) -> Grappa:
    model = Grappa(base, 1, BOTTLENECK, attention=False)
    model.load_adaptors([tensors])
    model.trainable_attention(and_adaptors=True)
    return model


def images_of(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def gradients(model: Any, index: int) -> list[Tensor]:
    layers = model.adaptors(index) if isinstance(model, PackedGrappa) else [x.adaptors for x in model.layers]
    found = [p.grad for adaptors in layers for p in adaptors.parameters()]
    assert all(g is not None for g in found)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_sets", [1, 2, 5])
@pytest.mark.parametrize("name", ["timm", "own"])
def test_each_packed_set_has_the_features_and_gradients_of_that_set_alone(
    name: str, num_sets: int, recompute: bool
) -> None:
    model, images = packed(backbone(name), num_sets, recompute).double(), images_of(3).double()
    z = model(images)
    assert z.shape == (num_sets, 3, model.embed_dim)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (z * weights).sum().backward()
    for index in range(num_sets):
        other = alone(backbone(name).double(), model.adaptor_tensors(index)).double()
        expected = other(images)
        torch.testing.assert_close(z[index], expected, rtol=1e-11, atol=1e-11)
        (expected * weights[index]).sum().backward()
        for found, right in zip(gradients(model, index), gradients(other, 0), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_a_set_without_a_loss_gets_no_gradient_from_the_others() -> None:
    model = packed(backbone("timm"), 3)
    model(images_of(2))[1].square().sum().backward()
    assert all(g.abs().sum() > 0 for g in gradients(model, 1))
    assert not any(g.any() for index in (0, 2) for g in gradients(model, index))


def test_an_empty_share_of_a_batch_gives_zero_gradients() -> None:
    model = packed(backbone("timm"), 2)
    z = model(images_of(0))
    assert z.shape == (2, 0, 24)
    z.sum().backward()
    assert not any(g.any() for index in range(2) for g in gradients(model, index))


@pytest.mark.parametrize("name", ["timm", "own"])
def test_nothing_before_the_first_adaptor_is_in_the_graph_and_no_frozen_weight_has_a_gradient(name: str) -> None:
    model = packed(backbone(name), 2)
    learning = dict[str, bool]()
    for part in ("patch_embed", "blocks.0.block", "blocks.0", "blocks.1.block"):
        model.backbone.model.get_submodule(part).register_forward_hook(
            lambda module, given, out, part=part: learning.update({part: out.requires_grad})
        )
    model(images_of(2)).sum().backward()
    assert learning == {"patch_embed": False, "blocks.0.block": False, "blocks.0": True, "blocks.1.block": True}
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".sets." not in parameter_name), parameter_name


def test_the_first_block_and_the_patches_see_each_image_once() -> None:
    model, seen = packed(backbone("timm"), 4), dict[str, int]()
    for part in ("patch_embed", "blocks.0.block", "blocks.1.block"):
        model.backbone.model.get_submodule(part).register_forward_hook(
            lambda module, given, out, part=part: seen.update({part: len(out)})
        )
    model(images_of(3))
    assert seen == {"patch_embed": 3, "blocks.0.block": 3, "blocks.1.block": 12}


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_computes_nothing_again_that_has_no_gradient(recompute: bool) -> None:
    model, runs = packed(backbone("timm"), 2, recompute), {"blocks.0.block": 0, "blocks.1.block": 0}
    for part in runs:
        model.backbone.model.get_submodule(part).register_forward_hook(
            lambda module, given, out, part=part: runs.update({part: runs[part] + 1})
        )
    model(images_of(3)).sum().backward()
    assert runs == {"blocks.0.block": 1, "blocks.1.block": 1 + recompute}


def test_the_start_of_a_set_does_not_depend_on_the_others() -> None:
    many, one = PackedGrappa(backbone("own"), 3, BOTTLENECK), PackedGrappa(backbone("own"), 1, BOTTLENECK)
    for index in range(3):
        many.initialise(index, torch.Generator().manual_seed(index))
    one.initialise(0, torch.Generator().manual_seed(2))
    found, expected = many.adaptor_tensors(2), one.adaptor_tensors(0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_what_a_block_is_given_reaches_it_whether_or_not_activations_are_kept() -> None:
    class Shifted(nn.Module):
        def forward(self, tokens: Tensor, by: float, *, rope: float) -> Tensor:
            return tokens + by * rope

    for first in (True, False):
        layer = PackedLayer(Shifted(), 2, 4, BOTTLENECK, first=first)
        for i, adaptors in enumerate(layer.sets):
            tiny.fill(adaptors, seed=i)
        tokens = torch.zeros(3 if first else 6, 2, 4, requires_grad=not first)
        found = layer(tokens, 2.0, rope=3.0)
        assert found.shape == (6, 2, 4)
        layer.recompute = True
        assert torch.equal(layer(tokens, 2.0, rope=3.0), found)
        layer.block = nn.Identity()
        layer.recompute = False
        assert torch.equal(layer(tokens + 6), found)


def test_what_nobody_filled_gives_nan() -> None:
    assert PackedGrappa(backbone("timm"), 2, BOTTLENECK)(images_of(1)).isnan().all()


def test_recomputing_keeps_the_inputs_of_the_layers_and_little_else() -> None:
    tiny.timm_vit()
    with torch.device("meta"):
        deep = {"img_size": 64, "embed_dim": 48, "num_heads": 3}
        bases = [create_backbone(tiny.TIMM, {**deep, "depth": n}, {}, pretrained=False) for n in (6, 6, 12, 6)]
        models = [PackedGrappa(base, 1, 8) for base in bases[:3]] + [PackedGrappa(bases[3], 4, 8)]
    kept = activation_bytes(models[0], 64)
    assert kept > 5 * 17 * 48 * 4 * 4  # five blocks of 17 tokens keep their inputs and inner activations
    assert 1.5 * kept < activation_bytes(models[2], 64) < 3 * kept
    assert 3 * kept < activation_bytes(models[3], 64) < 5 * kept
    for layer in models[1].layers:
        layer.recompute = True
    assert activation_bytes(models[1], 64) < kept / 5


@pytest.mark.parametrize("num_sets", [1, 3])
def test_bytes_counted_without_computing_are_those_of_real_tensors(num_sets: int) -> None:
    found = activation_bytes(packed(backbone("timm"), num_sets), 32)
    tiny.timm_vit()
    with torch.device("meta"):
        meta = PackedGrappa(create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, pretrained=False), num_sets, BOTTLENECK)
    assert activation_bytes(meta, 32) == pytest.approx(found, rel=0.25)  # attention is another kernel there


class Counted(TorchFunctionMode):
    """How often attention was computed by torch's fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


FAMILIES = {  # what each has that the others lack
    "DINO": "vit_small_patch16_224",
    "DINOv2 (registers, layer scale)": "vit_small_patch14_reg4_dinov2",
    "DINOv3 (rotary positions)": "vit_small_patch16_dinov3",
    "CLIP (a norm before the blocks)": "vit_base_patch16_clip_224",
    "SigLIP (no class token, pooled by attention)": "vit_base_patch16_siglip_224",
    "DeiT (a distillation token)": "deit_tiny_distilled_patch16_224",
    "BEiT (relative positions)": "beit_base_patch16_224",
    "EVA02 (rotary positions, SwiGLU)": "eva02_tiny_patch14_224",
    "AugReg (pre-norm, class token)": "vit_tiny_patch16_224",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_starts_at_timms_own_features_and_all_its_adaptors_learn(family: str) -> None:
    name = FAMILIES[family]
    size = 28 if "patch14" in name else 32
    base = create_backbone(f"timm:{name}", {**tiny.TIMM_KWARGS, "img_size": size}, {}, pretrained=False)
    tiny.fill(base, seed=3, scale=0.1)
    timm_model: Any = copy.deepcopy(base.model)
    images = images_of(2, size)
    expected = timm_model.forward_head(timm_model.forward_features((images - base.mean) / base.std), pre_logits=True)
    model = PackedGrappa(base, 2, BOTTLENECK)
    for index in range(2):
        model.initialise(index, torch.Generator().manual_seed(index))
        torch.testing.assert_close(model(images)[index], expected, rtol=1e-6, atol=1e-6)
        for i, adaptors in enumerate(model.adaptors(index)):
            tiny.fill(adaptors, seed=10 * index + i)
            adaptors.requires_grad_(True)
    z = model(images)
    assert not torch.allclose(z[0], z[1], atol=1e-3)
    z.square().sum().backward()
    assert all(g.abs().sum() > 0 for index in range(2) for g in gradients(model, index))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_is_fused_and_gives_what_plain_attention_gives(family: str) -> None:
    name = FAMILIES[family]
    size = 28 if "patch14" in name else 32
    found = list[list[Tensor]]()
    for fused in (True, False):
        base = create_backbone(f"timm:{name}", {**tiny.TIMM_KWARGS, "img_size": size}, {}, pretrained=False)
        tiny.fill(base, seed=3)
        for module in base.modules():
            if hasattr(module, "fused_attn"):
                assert module.fused_attn  # as timm has it
                module.fused_attn = fused
        model = PackedGrappa(base, 2, BOTTLENECK, class_token_only=fused).double()
        for index in range(2):
            for i, adaptors in enumerate(model.adaptors(index)):
                tiny.fill(adaptors, seed=10 * index + i)
                adaptors.requires_grad_(True)
        with Counted() as counted:
            z = model(images_of(2, size).double())
        assert counted.calls >= len(model.layers) if fused else counted.calls == 0
        (z * torch.linspace(-1, 1, z.shape[-1])).sum().backward()
        found.append([z, *gradients(model, 0), *gradients(model, 1)])
    for fused_one, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=1e-9, atol=1e-10)
