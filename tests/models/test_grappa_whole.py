from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, Grappa, create_backbone
from tests.models import tiny

BOTTLENECK = 3
PREPROCESS = Preprocess(image_size=32)


def backbones() -> dict[str, Backbone]:
    return {"timm": Backbone(tiny.timm_vit(), PREPROCESS), "own": Backbone(tiny.create(), PREPROCESS)}


def grappa(name: str, num_sets: int, attention: bool = True) -> Grappa:
    model = Grappa(backbones()[name], num_sets, BOTTLENECK, attention=attention)
    draws = torch.Generator().manual_seed(num_sets)
    for layer in model.layers:
        layer.adaptors.initialise(draws)
        if layer.attention is not None:
            layer.attention.initialise(draws)
    return model


def trained(name: str, num_sets: int, attention: bool = True) -> Grappa:
    """A model whose adaptors do something."""
    model = grappa(name, num_sets, attention)
    for i, layer in enumerate(model.layers):
        tiny.fill(layer.adaptors, seed=i)
    return model


@torch.no_grad()  # with gradients, torch's encoder layer takes another path as soon as its input needs one
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("num_sets", [1, 2, 8])
@pytest.mark.parametrize("name", ["timm", "own"])
def test_fresh_adaptors_are_the_backbone_bit_for_bit(name: str, num_sets: int, attention: bool) -> None:
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(grappa(name, num_sets, attention)(images), backbones()[name](images))


@pytest.mark.parametrize("name", ["timm", "own"])
def test_a_backbone_stays_in_eval_mode_and_gets_no_gradient(name: str) -> None:
    model = trained(name, 2).train()
    images = torch.rand(2, 3, 32, 32)
    frozen = {n for n, p in backbones()[name].named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(backbones()[name].parameters()))
    assert torch.equal(model(images), model(images))  # dropout, if any, is off
    model.trainable_attention()
    model(images).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".attention." in parameter_name), parameter_name


@pytest.mark.parametrize("num_sets", [1, 3])
@pytest.mark.parametrize("name", ["timm", "own"])
def test_gradients_reach_every_tensor_of_every_adaptor_and_nothing_else(name: str, num_sets: int) -> None:
    model = trained(name, num_sets, attention=False)
    model.trainable_attention(and_adaptors=True)
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if ".adaptors." in parameter_name:
            assert parameter.grad is not None
            parts = parameter.grad.view(num_sets, -1).abs().sum(1)
            assert (parts > 0).all(), parameter_name
        else:
            assert parameter.grad is None, parameter_name


def test_fresh_adaptors_learn_through_up_first() -> None:
    model = grappa("own", 1, attention=False)
    model.trainable_attention(and_adaptors=True)
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    last = model.layers[-1].adaptors
    assert last.up_weight.grad is not None
    assert last.down_weight.grad is not None
    assert last.up_weight.grad.abs().sum() > 0
    assert last.down_weight.grad.abs().sum() == 0


@pytest.mark.parametrize("attention", [False, True])
def test_the_last_attention_has_a_row_per_image_and_layer_that_sums_to_one(attention: bool) -> None:
    model = trained("timm", 5, attention)
    model(torch.rand(3, 3, 32, 32))
    assert model.last_attention().shape == (3, 2, 5)
    assert not model.last_attention().requires_grad
    torch.testing.assert_close(model.last_attention().sum(-1), torch.ones(3, 2))


def test_adaptor_sets_saved_one_by_one_load_side_by_side_bitwise() -> None:
    singles = [trained("timm", 1, attention=False) for _ in range(3)]
    for i, single in enumerate(singles):
        for j, layer in enumerate(single.layers):
            tiny.fill(layer.adaptors, seed=10 * i + j)
    fused = grappa("timm", 3)
    fused.load_adaptors([single.adaptor_tensors() for single in singles])
    for i, single in enumerate(singles):
        expected = single.adaptor_tensors()
        assert expected["layers.0.down.weight"].shape == (BOTTLENECK, 24)
        assert fused.adaptor_tensors(i).keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in fused.adaptor_tensors(i).items())


def test_a_fused_model_of_one_set_is_the_model_of_that_set_bitwise() -> None:
    single, images = trained("timm", 1, attention=False), torch.rand(2, 3, 32, 32)
    fused = grappa("timm", 1)
    fused.load_adaptors([single.adaptor_tensors()])
    assert torch.equal(fused(images), single(images))


def test_attention_is_saved_and_loaded_bitwise() -> None:
    one, other = trained("own", 2), trained("own", 2)
    for i, layer in enumerate(one.layers):
        assert layer.attention is not None
        tiny.fill(layer.attention, seed=i)
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(one(images), other(images))
    other.load_attention(one.attention_tensors())
    assert torch.equal(one(images), other(images))
    assert trained("own", 2, attention=False).attention_tensors() == {}


def misfits() -> dict[str, Any]:
    narrow = Backbone(tiny.create(dim=4), PREPROCESS)
    deep = Backbone(tiny.create(depth=4), PREPROCESS)
    shallow = Backbone(tiny.create(depth=2), PREPROCESS)
    return {
        "of other channels": [Grappa(narrow, 1, BOTTLENECK, attention=True)],
        "of another bottleneck": [Grappa(backbones()["own"], 1, BOTTLENECK + 1, attention=True)],
        "deeper": [Grappa(deep, 1, BOTTLENECK, attention=True)],
        "shallower": [Grappa(shallow, 1, BOTTLENECK, attention=True)],
    }


@pytest.mark.parametrize("what", ["of other channels", "of another bottleneck", "deeper", "shallower"])
def test_sets_of_another_shape_are_refused(what: str) -> None:
    sets = [other.adaptor_tensors() for other in misfits()[what]]
    with pytest.raises(ValueError, match=r"adaptor set does not fit the model: layers\.\d"):
        grappa("own", 1).load_adaptors(sets)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_sets_is_refused_even_where_it_would_broadcast(given: int) -> None:
    one = Grappa(Backbone(tiny.create(dim=4), PREPROCESS), 1, 1, attention=False)
    two = Grappa(Backbone(tiny.create(dim=4), PREPROCESS), 2, 1, attention=False)
    with pytest.raises(ValueError, match=f"{given} adaptor sets for a model of 2"):
        two.load_adaptors([one.adaptor_tensors()] * given)


@pytest.mark.parametrize("what", ["of other channels", "deeper", "shallower"])
def test_a_fusion_of_another_shape_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"the fusion does not fit the model: layers\.\d"):
        grappa("own", 1).load_attention(misfits()[what][0].attention_tensors())


@pytest.mark.parametrize("num_sets", [1, 2])
def test_what_nobody_filled_gives_nan(num_sets: int) -> None:
    images = torch.rand(2, 3, 32, 32)
    model = Grappa(backbones()["timm"], num_sets, BOTTLENECK, attention=True)
    assert model(images).isnan().all()
    for i, layer in enumerate(model.layers):
        tiny.fill(layer.adaptors, seed=i)
    assert model(images).isnan().all() == (num_sets > 1)  # Q and K of one set are not asked


def test_initialisation_is_a_function_of_the_generator_within_the_bounds_of_a_linear_layer() -> None:
    one, other = grappa("timm", 2), grappa("timm", 2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    for layer in one.layers:
        assert layer.attention is not None
        for parameter in (layer.adaptors.down_weight, layer.adaptors.down_bias, *layer.attention.parameters()):
            assert 0.8 * 24**-0.5 < parameter.abs().max() <= 24**-0.5
        assert not layer.adaptors.up_weight.any()
        assert not layer.adaptors.up_bias.any()


def test_images_are_normalised_inside() -> None:
    model, images = tiny.create(), torch.rand(2, 3, 32, 32)
    shifted = Backbone(model, replace(PREPROCESS, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)))
    plain = Backbone(model, replace(PREPROCESS, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    scaled = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(shifted(images), plain(scaled))


@pytest.mark.parametrize("attention", [False, True])
def test_a_weight_for_one_set_alone_makes_the_model_of_that_set(attention: bool) -> None:
    single, images = trained("timm", 1, attention=False), torch.rand(2, 3, 32, 32)
    for i, layer in enumerate(single.layers):
        tiny.fill(layer.adaptors, seed=i + 20)
    fused = grappa("timm", 3, attention)
    fused.load_adaptors(
        [trained("timm", 1).adaptor_tensors(), single.adaptor_tensors(), trained("timm", 1).adaptor_tensors()]
    )
    without = fused(images)
    fused.weigh(torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(fused(images), single(images))
    assert fused.last_attention()[:, :, 1].eq(1).all()
    fused.weigh(None)
    assert torch.equal(fused(images), without)


def test_equal_weights_change_nothing() -> None:
    model, images = trained("timm", 3), torch.rand(2, 3, 32, 32)
    expected = model(images)
    model.weigh(torch.full((3,), 5.0))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]])
def test_what_are_no_weights_of_the_sets_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 3 numbers of at least 0, not all 0, got"):
        grappa("timm", 3).weigh(torch.tensor(weights))


# Rope and relative positions as further arguments, registers, distillation tokens, poolings by attention or average,
# norms before the blocks or after the pooling, layer scale, blocks in a list or in a Sequential
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_relpos_small_patch16_224",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_with_fresh_adaptors_gives_timms_own_features(name: str) -> None:
    size = 28 if "patch14" in name else 32
    kwargs = {**tiny.TIMM_KWARGS, "img_size": size}
    backbone = create_backbone(f"timm:{name}", kwargs, {}, pretrained=False)
    tiny.fill(backbone, seed=3, scale=0.1)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    timm_model: Any = copy.deepcopy(backbone.model)
    pixels = (images - backbone.mean) / backbone.std
    expected = timm_model.forward_head(timm_model.forward_features(pixels), pre_logits=True)
    assert expected.shape == (2, backbone.embed_dim)
    assert expected.std() > 0
    model = Grappa(backbone, 2, BOTTLENECK, attention=True)
    for layer in model.layers:
        layer.adaptors.initialise(torch.Generator().manual_seed(0))
        assert layer.attention is not None
        layer.attention.initialise(torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)
    assert model.last_attention().shape == (2, 2, 2)
    for i, layer in enumerate(model.layers):
        tiny.fill(layer.adaptors, seed=i)
    assert not torch.allclose(model(images), expected, atol=1e-3)  # and every block is wrapped for good
