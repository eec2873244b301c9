"""The strength of adaptation: between the backbone, bit for bit, and the model as trained, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.models import Backbone, Grappa, GrappaLayer, create_backbone
from grappa_dist.models.precision import Precision
from tests.models import tiny
from tests.models.test_grappa_whole import FAMILIES, PREPROCESS

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = [(1, False), (3, False), (3, True)]  # sets, and whether there is an attention


def backbone(name: str, precision: Precision = "fp32") -> Backbone:
    if name == "own":
        return Backbone(tiny.create(), PREPROCESS).compute_in(precision)
    made = create_backbone(
        name, {**tiny.TIMM_KWARGS, "img_size": 28 if "patch14" in name else 32}, {}, pretrained=False
    )
    tiny.fill(made, seed=3, scale=0.1)
    return made.compute_in(precision)


def grappa(name: str, sets: int, attention: bool, precision: Precision = "fp32", *, folded: bool = False) -> Grappa:
    """A model whose adaptors change the features a lot."""
    model = Grappa(backbone(name, precision), sets, 4, attention=attention)
    for number, layer in enumerate(model.layers):
        tiny.fill(layer.adaptors, seed=number)
        if layer.attention is not None:
            tiny.fill(layer.attention, seed=number)
    if folded:
        model.fold()
    return model.requires_grad_(False).eval()


class Naive(nn.Module):
    """A layer at a strength as its definition has it: h + s (out - h), where out is the layer's at full strength."""

    def __init__(self, layer: GrappaLayer, strength: float) -> None:
        super().__init__()
        self.layer, self.strength = layer, strength

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h: Tensor = self.layer.block(tokens, *args, **kwargs)
        return h + self.strength * (self.layer(tokens, *args, **kwargs) - h)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("sets", "attention"), KINDS)
@pytest.mark.parametrize("name", [tiny.TIMM, "own"])
@torch.inference_mode()
def test_at_0_it_is_the_backbone_and_at_1_the_model_bit_for_bit(
    name: str, sets: int, attention: bool, precision: Precision, folded: bool
) -> None:
    model = grappa(name, sets, attention, precision, folded=folded)
    trained, frozen = model(IMAGES), backbone(name, precision)(IMAGES)
    assert not torch.allclose(trained, frozen, atol=0.01)
    model.set_strength(0)
    assert torch.equal(model(IMAGES), frozen)
    model.set_strength(0.5)
    assert not torch.allclose(model(IMAGES), frozen, atol=1e-3)
    assert not torch.allclose(model(IMAGES), trained, atol=1e-3)
    model.set_strength(1)
    assert torch.equal(model(IMAGES), trained)


@pytest.mark.parametrize("name", [f"timm:{name}" for name in FAMILIES])
@torch.inference_mode()
def test_at_0_a_model_of_any_family_and_pooling_is_its_backbone_bit_for_bit(name: str) -> None:
    side = 28 if "patch14" in name else 32
    images, model = IMAGES[:, :, :side, :side], grappa(name, 2, True)
    model.set_strength(0.0)
    assert torch.equal(model(images), backbone(name)(images))


@pytest.mark.parametrize("strength", [0.001, 0.3, 0.5, 0.75, 0.999, 1.5, 4.0])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("sets", "attention"), KINDS)
@torch.inference_mode()
def test_in_between_it_is_the_naive_reference_in_float64(
    sets: int, attention: bool, folded: bool, strength: float
) -> None:
    model = grappa(tiny.TIMM, sets, attention, folded=folded)
    naive, wide = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for place, layer in enumerate(list(naive.backbone.blocks)):
        naive.backbone.blocks[place] = Naive(layer, strength)
    right = naive.backbone(IMAGES.double())
    for each, given, tolerance in ((wide, IMAGES.double(), 1e-12), (model, IMAGES, 1e-5)):
        each.set_strength(strength)
        torch.testing.assert_close(each(given).double(), right, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_the_attention_of_a_layer_is_that_of_full_strength_on_the_same_input() -> None:
    model = grappa(tiny.TIMM, 3, True)
    model(IMAGES)
    trained = model.last_attention()
    model.set_strength(0.5)
    model(IMAGES)
    weak = model.last_attention()
    assert torch.equal(weak[:, 0], trained[:, 0])  # the first layer has the same input
    assert not torch.equal(weak[:, 1], trained[:, 1])


@torch.inference_mode()
def test_it_stays_whatever_is_weighed_and_folded() -> None:
    model, weights = grappa(tiny.TIMM, 3, True), torch.tensor([1.0, 2.0, 0.5])
    model.set_strength(0.5)
    model.weigh(weights)
    found = model(IMAGES)
    model.fold()
    torch.testing.assert_close(model(IMAGES), found, rtol=1e-5, atol=1e-5)
    model.weigh(None)
    assert model.strength == 0.5
    assert {layer.strength for layer in model.layers} == {0.5}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_layers_of_half_precision_keep_their_type_and_are_the_block_at_0(kind: torch.dtype) -> None:
    model = grappa(tiny.TIMM, 2, True).to(kind)
    layer, tokens = model.layers[0], torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(kind)
    model.set_strength(0)
    assert torch.equal(layer(tokens), layer.block(tokens))
    model.set_strength(0.5)
    assert layer(tokens).dtype == kind


@pytest.mark.parametrize("strength", [-0.1, 4.5, float("nan"), float("inf")])
def test_what_is_no_strength_is_refused_and_changes_nothing(strength: float) -> None:
    model = grappa(tiny.TIMM, 2, False)
    model.set_strength(0.5)
    with pytest.raises(
        ValueError, match=r"^strength=\S+: expected a number from 0, the backbone, to 4; 1 is as trained"
    ):
        model.set_strength(strength)
    assert model.strength == 0.5


def test_a_model_without_adaptor_sets_has_no_strength_to_set() -> None:
    model = Grappa.of_backbone(backbone(tiny.TIMM))
    assert model.strength == 1
    with pytest.raises(ValueError, match=r"^strength=0\.5: the model is the backbone alone and has no adaptor sets"):
        model.set_strength(0.5)
