from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.models import Adaptors, Attention, Backbone, Grappa, GrappaLayer, Pixels, create_backbone
from tests import reference
from tests.models import tiny

DIM, BOTTLENECK = 12, 3
PIXELS = Pixels(image_size=32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_block() -> nn.Module:
    tiny.timm_vit()  # so that timm can be imported
    from timm.models.vision_transformer import Block

    block: nn.Module = Block(DIM, num_heads=3, qkv_bias=True)
    tiny.fill(block, seed=7, scale=0.5)
    return block.eval()


class Judge(nn.Module):
    """The parts of Algorithm 1: N pairs of linear layers, Q and K."""

    def __init__(self, num_sets: int) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Linear(DIM, BOTTLENECK) for _ in range(num_sets))
        self.ups = nn.ModuleList(nn.Linear(BOTTLENECK, DIM) for _ in range(num_sets))
        self.q, self.k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        tiny.fill(self, seed=num_sets, scale=0.5)

    def sets(self) -> list[dict[str, Tensor]]:
        pairs = zip(self.downs, self.ups, strict=True)
        return [
            {f"{half}.{name}": p for half, m in (("down", d), ("up", u)) for name, p in m.named_parameters()}
            for d, u in pairs
        ]

    def layer(self, block: nn.Module, attention: bool = True) -> GrappaLayer:
        dtype = self.q.weight.dtype
        adaptors = Adaptors(len(self.downs), DIM, BOTTLENECK).to(dtype)
        adaptors.load(self.sets())
        fusion = Attention(DIM).to(dtype)
        with torch.no_grad():
            fusion.query.copy_(self.q.weight)
            fusion.key.copy_(self.k.weight)
        return GrappaLayer(block, adaptors, fusion if attention else None)


def gradients_by_set(adaptors: Adaptors) -> list[dict[str, Tensor]]:
    """Gradients in the layout of two linear layers per set."""
    grads = copy.deepcopy(adaptors)
    for gradient, parameter in zip(grads.parameters(), adaptors.parameters(), strict=True):
        assert parameter.grad is not None
        gradient.data = parameter.grad
    return [grads.tensors(i) for i in range(adaptors.num_sets)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12)],  # rounding of sums over at most a few hundred terms
)
@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("num_sets", [1, 2, 8])
def test_layer_and_its_gradients_equal_algorithm_1(
    num_sets: int, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    block, judge = plain_block().to(dtype), Judge(num_sets).to(dtype)
    layer = judge.layer(block)
    ours, theirs = (random(3, tokens, DIM, dtype=dtype).requires_grad_() for _ in range(2))
    found = layer(ours)
    expected = reference.grappa_layer(theirs, block, list(judge.downs), list(judge.ups), judge.q, judge.k)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = random(3, tokens, DIM, seed=1, dtype=dtype) / tokens
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    def check(a: Tensor | None, b: Tensor | None) -> None:
        assert b is not None
        a = torch.zeros_like(b) if a is None else a  # of one adaptor, Q and K weigh nothing
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)

    check(ours.grad, theirs.grad)
    assert layer.attention is not None
    check(layer.attention.query.grad, judge.q.weight.grad)
    check(layer.attention.key.grad, judge.k.weight.grad)
    for gradients, parameters in zip(gradients_by_set(layer.adaptors), judge.sets(), strict=True):
        for name, parameter in parameters.items():
            check(gradients[name], parameter.grad)


def test_gradients_of_the_attention_pass_gradcheck() -> None:
    layer = Judge(3).double().layer(nn.Identity())
    attention = layer.attention
    assert attention is not None
    layer.requires_grad_(True)

    def out(query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
        values = {"attention.query": query, "attention.key": key}
        found: Tensor = torch.func.functional_call(layer, values, (tokens,))
        return found

    inputs = (attention.query.detach().requires_grad_(), attention.key.detach().requires_grad_())
    assert torch.autograd.gradcheck(out, (*inputs, random(2, 3, DIM).requires_grad_()))


def test_a_second_derivative_is_refused_as_there_is_none() -> None:
    tokens = random(2, 3, DIM).requires_grad_()
    out = Judge(3).double().layer(nn.Identity())(tokens)
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_frozen_adaptors_have_the_same_gradients_of_input_query_and_key() -> None:
    whole, frozen = Judge(4).layer(nn.Identity()), Judge(4).layer(nn.Identity())
    frozen.adaptors.requires_grad_(False)
    tokens, weights = random(3, 5, DIM, dtype=torch.float32), random(3, 5, DIM, seed=1, dtype=torch.float32)
    found = []
    for layer in (whole, frozen):
        given = tokens.clone().requires_grad_()
        (layer(given) * weights).sum().backward()
        assert layer.attention is not None
        found.append([given.grad, layer.attention.query.grad, layer.attention.key.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(p.grad is None for p in frozen.adaptors.parameters())


def test_the_backward_pass_keeps_one_tensor_of_the_bottlenecks_and_no_larger_one() -> None:
    layer, kept = Judge(8).layer(nn.Identity()), {}
    layer.adaptors.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(random(3, 50, DIM, dtype=torch.float32).requires_grad_())
    owned = {p.data_ptr() for p in layer.parameters()}
    sizes = sorted(t.numel() for pointer, t in kept.items() if pointer not in owned)
    assert sizes[-1] == 3 * 50 * 8 * BOTTLENECK
    assert sum(sizes[:-1]) < 500


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_output_and_gradients_are_those_of_float32_to_bfloat16s_precision(frozen: bool) -> None:
    results = []
    for autocast in (False, True):
        layer = Judge(4).layer(nn.Identity())
        layer.adaptors.requires_grad_(not frozen)
        tokens = random(3, 7, DIM, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(tokens)
        assert out.dtype == torch.float32
        (out * random(3, 7, DIM, seed=1, dtype=torch.float32)).sum().backward()
        assert layer.alpha is not None
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        results.append([out.detach(), layer.alpha, tokens.grad, *grads])
    assert len(results[0]) == (5 if frozen else 9)
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() <= 0.03 * exact.norm()


def test_tokens_in_bfloat16_stay_in_bfloat16() -> None:
    layer = Judge(3).layer(nn.Identity())
    tokens = random(2, 5, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(tokens.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(tokens), rtol=0.05, atol=0.05)


def test_tokens_may_lie_in_any_order_in_memory() -> None:
    layer = Judge(3).layer(nn.Identity())
    tokens = random(2, 5, DIM, dtype=torch.float32)
    turned = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer(turned), layer(tokens))
    with torch.no_grad():
        assert torch.equal(layer(turned), layer(tokens))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("num_sets", [1, 2, 8])
def test_a_folded_layer_is_the_layer_to_rounding(num_sets: int, attention: bool) -> None:
    layer, tokens = Judge(num_sets).double().layer(nn.Identity(), attention), random(3, 5, DIM)
    for weights in (None, torch.arange(1.0, num_sets + 1)):
        layer.weigh(weights)
        with torch.no_grad():
            expected, alpha = layer(tokens), layer.alpha
            layer.fold()
            torch.testing.assert_close(layer(tokens), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.alpha, alpha)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
def test_a_folded_layer_leaves_out_what_weighs_nothing(weights: list[float], attention: bool) -> None:
    layer, tokens = Judge(3).double().layer(nn.Identity(), attention), random(3, 5, DIM)
    layer.weigh(torch.tensor(weights))
    with torch.no_grad():
        expected = layer(tokens)
        layer.fold()
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.alpha[0] > 0, torch.tensor(weights) > 0)
    wide = sum(w > 0 for w in weights) * BOTTLENECK
    if wide == BOTTLENECK or not attention:
        assert layer.folded_down.shape == layer.folded_up.shape == (wide, DIM)
    layer.weigh(None)
    assert layer.folded_down is layer.folded_down_bias is None


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("num_sets", [1, 3])
def test_a_folded_layer_is_the_layer_also_where_its_input_learns(num_sets: int, attention: bool) -> None:
    layer = Judge(num_sets).double().layer(nn.Identity(), attention).requires_grad_(False)
    for weights in (None, torch.arange(1.0, num_sets + 1)):
        layer.weigh(weights)
        found = []
        for _ in range(2):  # as it is, then folded
            tokens = random(3, 5, DIM).requires_grad_()
            out = layer(tokens)
            (out * random(3, 5, DIM, seed=1)).sum().backward()
            found.append([out.detach(), layer.alpha, tokens.grad])
            layer.fold()
        for plain, folded in zip(*found, strict=True):
            torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


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


def test_one_set_with_attention_is_one_set_without_bit_for_bit() -> None:
    block, judge, tokens = plain_block(), Judge(1), random(2, 5, DIM, dtype=torch.float32)
    assert torch.equal(judge.layer(block)(tokens), judge.layer(block, attention=False)(tokens))


@pytest.mark.parametrize("num_sets", [1, 2, 8])
def test_without_attention_a_layer_averages_its_adaptors(num_sets: int) -> None:
    block, judge, tokens = plain_block().double(), Judge(num_sets).double(), random(2, 5, DIM)
    h = block(tokens)
    adapted = [up(nn.functional.gelu(down(h))) for down, up in zip(judge.downs, judge.ups, strict=True)]
    torch.testing.assert_close(judge.layer(block, attention=False)(tokens), h + torch.stack(adapted).mean(0))


def test_equal_keys_weigh_the_adaptors_alike() -> None:
    layer = Judge(4).layer(plain_block())
    assert layer.attention is not None
    nn.init.zeros_(layer.attention.key)
    layer(random(3, 5, DIM, dtype=torch.float32))
    assert layer.alpha is not None
    torch.testing.assert_close(layer.alpha, torch.full((3, 4), 0.25))


def test_an_image_is_weighed_by_itself_alone() -> None:
    layer, tokens = Judge(4).double().layer(plain_block().double()), random(3, 5, DIM)
    together = layer(tokens)
    for i in range(3):
        torch.testing.assert_close(layer(tokens[i : i + 1])[0], together[i])


def test_further_arguments_go_to_the_block() -> None:
    class Shifted(nn.Module):
        def forward(self, tokens: Tensor, by: float, *, rope: float) -> Tensor:
            return tokens + by * rope

    layer, tokens = Judge(2).layer(Shifted()), torch.zeros(1, 2, DIM)
    plain = Judge(2).layer(nn.Identity())
    assert torch.equal(layer(tokens, 2.0, rope=3.0), plain(tokens + 6))


def backbones() -> dict[str, Backbone]:
    return {"timm": Backbone(tiny.timm_vit(), PIXELS), "own": Backbone(tiny.create(), PIXELS)}


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
    model.trainable_adaptors()
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
    model.trainable_adaptors()
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
    narrow = Backbone(tiny.create(dim=4), PIXELS)
    deep = Backbone(tiny.create(depth=4), PIXELS)
    shallow = Backbone(tiny.create(depth=2), PIXELS)
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
    one = Grappa(Backbone(tiny.create(dim=4), PIXELS), 1, 1, attention=False)
    two = Grappa(Backbone(tiny.create(dim=4), PIXELS), 2, 1, attention=False)
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
    shifted = Backbone(model, replace(PIXELS, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)))
    plain = Backbone(model, replace(PIXELS, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    scaled = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(shifted(images), plain(scaled))


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
