"""Formulas on this device against their plain form: the Triton kernel, the fused layer, norm-softmax; compile's trial.

Shapes: P rows, K targets, E columns, B images, T tokens, D channels, N sets, H bottleneck.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.gpu_check.checks import BF16, TERA, Figure, Found, Machine, NotHere
from grappa_dist.gpu_check.inputs import largest_distance, unit_rows
from grappa_dist.gpu_check.limits import fastest_s
from grappa_dist.models import Adaptors, Attention, GrappaLayer, PackedGrappa, create_backbone
from grappa_dist.models.precision import products_in
from grappa_dist.progress import lost_trials
from grappa_dist.search.backends import triton_is_faster, within_error_bound
from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.training.compile import compile_if_faster
from grappa_dist.training.norm_softmax_loss import norm_softmax

GAMMA = 16.0
FP32_NEAR, BF16_NEAR = 2e-4, 4e-2  # shares of the largest value: sums over thousands of terms in another order


def kernel(machine: Machine) -> Found:
    """The three largest scores of each row against a plain product and topk; estimates within their error bound."""
    if importlib.util.find_spec("triton") is None:
        raise NotHere("triton is not installed: k-means searches in float32")
    from grappa_dist.search.triton_topk import top_scores

    shapes = machine.sized(
        ((16384, 4096, 384), (1000, 777, 100), (1, 3, 64), (5000, 2, 384)), ((130, 140, 36), (1, 2, 36))
    )
    wrong = [str(shape) for shape in shapes if not _as_topk(machine, shape)]
    x, c = (torch.from_numpy(unit_rows(n, machine.sized(384, 24), 64, seed)).to(machine.device)
            for n, seed in machine.sized(((2048, 1), (1024, 2)), ((64, 1), (40, 2))))  # fmt: skip
    bounded = within_error_bound(TritonGenerator(TritonGenerator.residual_norm(x)), x, c)
    reasons = [f"not the scores of topk for {', '.join(wrong)}"] * bool(wrong)
    reasons += ["estimates exceed their error bound"] * (not bounded)
    if machine.tiny:
        return Found("in Triton's interpreter", wrong="; ".join(reasons))
    num, targets, width = shapes[0]
    a, b = _bf16(machine, num, width), _bf16(machine, targets, width)
    offsets = _offsets(b)
    flops = 2.0 * num * targets * width / fastest_s(lambda: top_scores(a, b, offsets), machine.device)
    chosen = "the trial takes it" if triton_is_faster(machine.device) else "the trial leaves it: no faster than float32"
    chosen = "; ".join([chosen, *lost_trials()])
    reached = Figure(f"{num:,} x {targets:,} x {width}:", flops / TERA, "TFLOP/s", machine.share(flops, BF16), "bf16")
    return Found(chosen, (reached,), "; ".join(reasons))


def _bf16(machine: Machine, rows: int, width: int) -> Tensor:
    return torch.from_numpy(unit_rows(rows, width, 64, rows)).to(machine.device).bfloat16()


def _offsets(y: Tensor) -> Tensor:
    """-|y|^2 / 2, with which the largest score is the nearest target's, (K,) float32."""
    return y.float().square().sum(1) / -2


def _as_topk(machine: Machine, shape: tuple[int, int, int]) -> bool:
    """Whether values are those of topk, and each is the score of the column beside it, up to rounding."""
    from grappa_dist.search.triton_topk import PLACES, ROUNDING, top_scores

    x, y = _bf16(machine, shape[0], shape[2]), _bf16(machine, shape[1], shape[2])
    values, columns = top_scores(x, y, _offsets(y))
    dense = x.double() @ y.double().T + _offsets(y).double()
    count = min(PLACES, shape[1])
    expected = dense.topk(count, dim=1).values
    near = 1e-5 + 2 * ROUNDING * expected.abs()
    free = values[:, count:].isneginf().all()
    own = dense.gather(1, columns[:, :count])
    differ = (columns[:, :count].sort(1).values.diff(dim=1) != 0).all()
    fits = ((values[:, :count] - expected).abs() <= near).all() & ((values[:, :count] - own).abs() <= near).all()
    return bool(fits & free & differ)


class PlainLayer(nn.Module):
    """Algorithm 1 of the paper, line by line, around a pre-norm block of timm."""

    def __init__(self, block: Any, adaptors: Adaptors, attention: Attention) -> None:
        super().__init__()
        self.block, self.adaptors, self.attention = block, adaptors, attention

    def forward(self, tokens: Tensor) -> Tensor:
        block, sets = self.block, self.adaptors
        x = tokens + block.attn(block.norm1(tokens))
        y = block.mlp(block.norm2(x))
        h = x + y
        outputs = []  # U_i (B, T, D)
        for i in range(sets.num_sets):
            part = slice(i * sets.bottleneck, (i + 1) * sets.bottleneck)
            a = F.gelu(F.linear(h, sets.down_weight[part], sets.down_bias[part]))
            outputs.append(F.linear(a, sets.up_weight[part].T, sets.up_bias[i]) + y)
        query = h.mean(1) @ self.attention.query.T
        logits = [(query * (u.mean(1) @ self.attention.key.T)).sum(1) / math.sqrt(h.shape[-1]) for u in outputs]
        alpha = torch.softmax(torch.stack(logits, 1), 1)
        return sum((alpha[:, i, None, None] * u for i, u in enumerate(outputs)), x)


def algorithm_1(machine: Machine) -> Found:
    """Output and gradients of a fused layer: in float32 against Algorithm 1, in bfloat16 against float32."""
    images, tokens, dim, sets, bottleneck = machine.sized((16, 197, 384, 8, 64), (2, 5, 24, 3, 4))
    layer, plain = _layers(machine, dim, sets, bottleneck)
    inputs = torch.randn(images, tokens, dim, generator=torch.Generator().manual_seed(1)).to(machine.device)
    expected = _values(plain, inputs, bf16=False)
    exact = largest_distance(_values(layer, inputs, bf16=False), expected)
    rounded = largest_distance(_values(layer, inputs, bf16=True), expected)
    by_plain = largest_distance(_values(plain, inputs, bf16=True), expected)
    wrong = [f"float32 differs by {exact:.1e}, {FP32_NEAR:.0e} allowed"] * (not exact <= FP32_NEAR)
    allowed = max(BF16_NEAR, 2 * by_plain)
    wrong += [f"bfloat16 differs by {rounded:.1e}, {allowed:.1e} allowed"] * (not rounded <= allowed)
    text = f"float32 differs by {exact:.1e}, bfloat16 by {rounded:.1e} (Algorithm 1 itself in bfloat16: {by_plain:.1e})"
    if machine.tiny:
        return Found(text, wrong="; ".join(wrong))
    times = [fastest_s(lambda m=m: _values(m, inputs, bf16=True), machine.device) for m in (plain, layer)]  # type: ignore[misc]
    return Found(
        text, (Figure("forward and backward", times[0] / times[1], "x Algorithm 1's speed"),), "; ".join(wrong)
    )


def _layers(machine: Machine, dim: int, sets: int, bottleneck: int) -> tuple[nn.Module, nn.Module]:
    declare_torchvision_ops()
    from timm.models.vision_transformer import Block

    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        block = Block(dim, num_heads=dim // machine.sized(64, 8), qkv_bias=True).eval()
    adaptors, attention = Adaptors(sets, dim, bottleneck), Attention(dim)
    adaptors.randomise(rng)
    attention.initialise(rng)
    block.requires_grad_(False)
    layers = GrappaLayer(block, adaptors, attention), PlainLayer(block, adaptors, attention)
    return layers[0].to(machine.device), layers[1].to(machine.device)


def _values(layer: nn.Module, inputs: Tensor, *, bf16: bool) -> list[Tensor]:
    """The output, and the gradients of inputs and of all that learns."""
    inputs = inputs.clone().requires_grad_()
    learning = [inputs, *(p for p in layer.parameters() if p.requires_grad)]
    with products_in("bf16" if bf16 else "fp32", inputs.device):
        out = layer(inputs).float()
    weights = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), learning)]


def softmax(machine: Machine) -> Found:
    """Loss and gradients of Eq. (2), against cross entropy of all logits in float64."""
    images, classes, dim = machine.sized((256, 50_000, 384), (8, 300, 24))
    rng = torch.Generator().manual_seed(0)
    z, weight = (torch.randn(n, dim, generator=rng).to(machine.device) for n in (images, classes))
    labels = torch.randint(classes, (images,), generator=rng).to(machine.device)
    ours, dense = (_softmax_values(z, weight, labels, dense=dense) for dense in (False, True))
    distance = largest_distance(ours, dense)
    wrong = "" if distance <= FP32_NEAR else f"differs by {distance:.1e}, {FP32_NEAR:.0e} allowed"
    found = f"{images} images, {classes:,} classes: loss and gradients differ by {distance:.1e}"
    if machine.tiny:
        return Found(found, wrong=wrong)
    seconds = fastest_s(lambda: _softmax_values(z, weight, labels, dense=False), machine.device)
    flops = 10.0 * images * classes * dim / seconds  # five products of images, classes and channels
    return Found(found, (Figure("", flops / TERA, "TFLOP/s", machine.share(flops, "fp32"), "fp32"),), wrong)


def _softmax_values(z: Tensor, weight: Tensor, labels: Tensor, *, dense: bool) -> list[Tensor]:
    z, weight = (t.double() if dense else t for t in (z, weight))
    z, weight = z.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    if dense:
        loss = F.cross_entropy(GAMMA * F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T, labels)
    else:
        loss = norm_softmax(z, weight, labels, GAMMA)
    return [loss.detach(), *torch.autograd.grad(loss, [z, weight])]


def compile_trial(machine: Machine) -> Found:
    """What `resources.compile=auto` would decide here; wrong where the compiler fails or gives other values."""
    vit, size, sets, images = machine.sized(("vit_small_patch16_224", 224, 8, 128), ("vit_tiny_patch16_224", 32, 2, 2))
    name, overrides = "grappa_dist.gpu_check.inputs:untrained_vit", {"image_size": size}
    backbone = create_backbone(name, {"name": vit, "image_size": size}, overrides)
    model = PackedGrappa(backbone, sets, 64)
    for index in range(sets):
        model.initialise(index, torch.Generator().manual_seed(index))
        for parameter in model.parameters_of(index):
            parameter.requires_grad_(True)
    machine.log("compiling")
    model.backbone.compute_in(machine.precision)
    verdict = compile_if_faster(model.to(machine.device), images)
    fine = verdict.startswith(("compiled", "not compiled: not faster", "not compiled: no GPU"))
    return Found(verdict if fine else "", wrong="" if fine else verdict)
