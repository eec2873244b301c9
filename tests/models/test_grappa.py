from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.models import Adaptors, Attention, GrappaLayer
from tests import reference
from tests.models import tiny

DIM, BOTTLENECK = 12, 3


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_block() -> nn.Module:
    tiny.timm_vit()  # so that timm can be imported
    from timm.models.vision_transformer import Block

    block: nn.Module = Block(DIM, num_heads=3, qkv_bias=True)
    tiny.fill(block, seed=7, scale=0.5)
    return block.eval()


class Parts(nn.Module):
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
            {f"{part}.{name}": p for part, m in (("down", d), ("up", u)) for name, p in m.named_parameters()}
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
    block, parts = plain_block().to(dtype), Parts(num_sets).to(dtype)
    layer = parts.layer(block)
    ours, theirs = (random(3, tokens, DIM, dtype=dtype).requires_grad_() for _ in range(2))
    found = layer(ours)
    expected = reference.grappa_layer(theirs, block, list(parts.downs), list(parts.ups), parts.q, parts.k)
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
    check(layer.attention.query.grad, parts.q.weight.grad)
    check(layer.attention.key.grad, parts.k.weight.grad)
    for gradients, parameters in zip(gradients_by_set(layer.adaptors), parts.sets(), strict=True):
        for name, parameter in parameters.items():
            check(gradients[name], parameter.grad)


def test_gradients_of_the_attention_pass_gradcheck() -> None:
    layer = Parts(3).double().layer(nn.Identity())
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
    out = Parts(3).double().layer(nn.Identity())(tokens)
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_frozen_adaptors_have_the_same_gradients_of_input_query_and_key() -> None:
    whole, frozen = Parts(4).layer(nn.Identity()), Parts(4).layer(nn.Identity())
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
    layer, kept = Parts(8).layer(nn.Identity()), {}
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
        layer = Parts(4).layer(nn.Identity())
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
    layer = Parts(3).layer(nn.Identity())
    tokens = random(2, 5, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(tokens.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(tokens), rtol=0.05, atol=0.05)


def test_tokens_may_lie_in_any_order_in_memory() -> None:
    layer = Parts(3).layer(nn.Identity())
    tokens = random(2, 5, DIM, dtype=torch.float32)
    turned = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer(turned), layer(tokens))
    with torch.no_grad():
        assert torch.equal(layer(turned), layer(tokens))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("num_sets", [1, 2, 8])
def test_a_folded_layer_is_the_layer_to_rounding(num_sets: int, attention: bool) -> None:
    layer, tokens = Parts(num_sets).double().layer(nn.Identity(), attention), random(3, 5, DIM)
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
    layer, tokens = Parts(3).double().layer(nn.Identity(), attention), random(3, 5, DIM)
    layer.weigh(torch.tensor(weights))
    with torch.no_grad():
        expected = layer(tokens)
        layer.fold()
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.alpha[0] > 0, torch.tensor(weights) > 0)
    wide = sum(w > 0 for w in weights) * BOTTLENECK
    if wide == BOTTLENECK or not attention:
        assert layer.wide.down.shape == layer.wide.up.shape == (wide, DIM)
    layer.weigh(None)
    assert layer.wide is layer.product is None


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("num_sets", [1, 3])
def test_a_folded_layer_is_the_layer_also_where_its_input_learns(num_sets: int, attention: bool) -> None:
    layer = Parts(num_sets).double().layer(nn.Identity(), attention).requires_grad_(False)
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


def test_one_set_with_attention_is_one_set_without_bit_for_bit() -> None:
    block, parts, tokens = plain_block(), Parts(1), random(2, 5, DIM, dtype=torch.float32)
    assert torch.equal(parts.layer(block)(tokens), parts.layer(block, attention=False)(tokens))


@pytest.mark.parametrize("num_sets", [1, 2, 8])
def test_without_attention_a_layer_averages_its_adaptors(num_sets: int) -> None:
    block, parts, tokens = plain_block().double(), Parts(num_sets).double(), random(2, 5, DIM)
    h = block(tokens)
    adapted = [up(nn.functional.gelu(down(h))) for down, up in zip(parts.downs, parts.ups, strict=True)]
    torch.testing.assert_close(parts.layer(block, attention=False)(tokens), h + torch.stack(adapted).mean(0))


def test_equal_keys_weigh_the_adaptors_alike() -> None:
    layer = Parts(4).layer(plain_block())
    assert layer.attention is not None
    nn.init.zeros_(layer.attention.key)
    layer(random(3, 5, DIM, dtype=torch.float32))
    assert layer.alpha is not None
    torch.testing.assert_close(layer.alpha, torch.full((3, 4), 0.25))


def test_an_image_is_weighed_by_itself_alone() -> None:
    layer, tokens = Parts(4).double().layer(plain_block().double()), random(3, 5, DIM)
    together = layer(tokens)
    for i in range(3):
        torch.testing.assert_close(layer(tokens[i : i + 1])[0], together[i])


def test_further_arguments_go_to_the_block() -> None:
    class Shifted(nn.Module):
        def forward(self, tokens: Tensor, by: float, *, rope: float) -> Tensor:
            return tokens + by * rope

    layer, tokens = Parts(2).layer(Shifted()), torch.zeros(1, 2, DIM)
    plain = Parts(2).layer(nn.Identity())
    assert torch.equal(layer(tokens, 2.0, rope=3.0), plain(tokens + 6))
