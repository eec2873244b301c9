"""N bottleneck adaptors and their fusion on a block's output, forward and backward, without a B x N x T x D tensor.

out = h + sum_i alpha_i A_i(h), A_i(h) = up_i(GELU(down_i(h))), Algorithm 1 of Almazan et al., ECCV 2022.
Shapes: B images, T tokens, D channels, N sets, H bottleneck; F = N * H, the bottlenecks side by side.

`attention` is Eq. (3) and `fused_adaptors` the whole layer after its block; both run in training and inference.

The mean over tokens commutes with the up-projection, so the attention needs only the pooled GELU. The backward pass
needs one (B, T, F) tensor, the input of the GELU; the GELU is computed again, which is cheap. `h` is kept only where
the down-projection learns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # down (F, D) and (F,), up (F, D) and (N, D)
_gelu_, _gelu_backward = torch.ops.aten.gelu_.default, torch.ops.aten.gelu_backward.default


@dataclass(frozen=True)
class AttentionParameters:
    """The parameters of the attention: Q and K (D, D), or K^T Q, or neither for equal scores; and a prior (N,)."""

    query: Tensor | None = None
    key: Tensor | None = None
    prior: Tensor | None = None  # logarithms, added to the scores
    product: Tensor | None = None


def attention(pooled: Tensor, gelu: Tensor, up: Tensor, up_bias: Tensor, parameters: AttentionParameters) -> Tensor:
    """Eq. (3), as trained and run: alpha (B, N) = softmax_i( (Q h) . (K A_i) / sqrt(D) + prior_i ), h and A_i pooled.

    Args:
        pooled: the mean of h over tokens, (B, D).
        gelu: the mean of GELU(down(h)) over tokens, (B, F).
    """
    num_sets, dim = up_bias.shape
    projected = _projected(pooled, parameters)
    if projected is None:
        logits = pooled.new_zeros((pooled.shape[0], num_sets))  # `len` would fix the batch size of an exported graph
    else:
        within = (F.linear(projected, up) * gelu).view(-1, num_sets, len(up) // num_sets).sum(-1)
        logits = (within + F.linear(projected, up_bias)) / math.sqrt(dim)
    return (logits if parameters.prior is None else logits + parameters.prior).softmax(-1)


def _projected(pooled: Tensor, parameters: AttentionParameters) -> Tensor | None:
    """K^T Q h, (B, D), whose products with A_i are those of Q h with K A_i."""
    if parameters.product is not None:
        return F.linear(pooled, parameters.product)
    if parameters.query is None or parameters.key is None:
        return None
    return F.linear(F.linear(pooled, parameters.query), parameters.key.T)


def fused_adaptors(h: Tensor, weights: Weights, parameters: AttentionParameters) -> tuple[Tensor, Tensor]:
    """The output (B, T, D) in the type of h, and alpha (B, N), detached.

    Under autocast the two large products run in its type, everything pooled in that of Q and K.
    """
    if torch.compiler.is_exporting():
        return _exported(h, weights, parameters)
    h, kind = h.contiguous(), h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    inputs = (h, *weights, parameters.query, parameters.key, parameters.prior, parameters.product)
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            out: tuple[Tensor, Tensor] = _Fused.apply(dtype, *inputs)  # type: ignore[no-untyped-call]
            return out
        down, down_bias, *_ = weights
        a = _gelu_(F.linear(h.to(dtype), down.to(dtype), down_bias.to(dtype)))
        alpha, _ = _weigh(h, a, weights, parameters)
        return _add_up(h, a, alpha, weights), alpha


def _exported(h: Tensor, weights: Weights, parameters: AttentionParameters) -> tuple[Tensor, Tensor]:
    """The same for `torch.export`: nothing in place, as exporters may lose a write through a view, without an error.

    Weights are of one type, perhaps of half precision; all that is pooled is computed in float32.
    """
    down, down_bias, up, up_bias = weights
    a = F.gelu(F.linear(h, down, down_bias))
    given = (parameters.query, parameters.key, parameters.prior, parameters.product)
    wide = AttentionParameters(*(t if t is None else t.float() for t in given))
    alpha = attention(h.float().mean(1), a.float().mean(1), up.float(), up_bias.float(), wide)
    if len(up_bias) > 1:
        a = a * _over_bottlenecks(alpha, len(up)).to(a.dtype)
    return h + (alpha @ up_bias.float()).to(h.dtype).unsqueeze(1) + a @ up, alpha


def _weigh(
    h: Tensor, a: Tensor, weights: Weights, parameters: AttentionParameters
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """alpha (B, N), and the pooled h (B, D) and the pooled GELU (B, F) that it is computed from."""
    *_, up, up_bias = weights
    pooled = h.mean(1, dtype=up.dtype), a.mean(1, dtype=up.dtype)
    return attention(*pooled, up, up_bias, parameters), pooled


def _add_up(h: Tensor, a: Tensor, alpha: Tensor, weights: Weights) -> Tensor:
    """h + sum_i alpha_i (up_i a_i + b_i), (B, T, D); overwrites `a`."""
    *_, up, up_bias = weights
    if len(up_bias) > 1:
        a *= _over_bottlenecks(alpha, len(up)).to(a.dtype)
    return _plus_product(h + (alpha @ up_bias).to(h.dtype).unsqueeze(1), a, up.to(a.dtype))


def _plus_product(total: Tensor, a: Tensor, matrix: Tensor) -> Tensor:
    """total + a @ matrix, in place of `total`, (B, T, D)."""
    if total.dtype == a.dtype:
        total.view(-1, total.shape[-1]).addmm_(a.view(-1, a.shape[-1]), matrix)
        return total
    return total.add_(a @ matrix)


def _over_bottlenecks(alpha: Tensor, width: int) -> Tensor:
    """(B, N) -> (B, 1, F)."""
    return alpha.repeat_interleave(width // alpha.shape[1], 1).unsqueeze(1)


class _Inputs(NamedTuple):
    """A value for each input of `_Fused`: whether it needs a gradient, or the gradient."""

    dtype: Any
    h: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    query: Any
    key: Any
    prior: Any
    product: Any


class _Leaves(NamedTuple):
    """The inputs of `attention`, or their gradients."""

    pooled: Tensor
    gelu: Tensor
    up: Tensor
    up_bias: Tensor
    query: Tensor | None
    key: Tensor | None
    prior: Tensor | None
    product: Tensor | None


class _Fused(torch.autograd.Function):
    """Gradients of everything that needs them; alpha is an output without gradient."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, h: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        weights, parameters = rest[:4], AttentionParameters(*rest[4:])
        down, down_bias, *_ = weights
        z = F.linear(h.to(dtype), down.to(dtype), down_bias.to(dtype))  # (B, T, F)
        a = F.gelu(z)
        alpha, pooled = _weigh(h, a, weights, parameters)  # type: ignore[arg-type]
        out = _add_up(h, a, alpha, weights)  # type: ignore[arg-type]
        ctx.save_for_backward(z, alpha, *pooled, h if _Inputs(*ctx.needs_input_grad).down else None, *rest)
        ctx.tokens, ctx.h_dtype = h.shape[1], h.dtype
        ctx.mark_non_differentiable(alpha)
        return out, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, alpha, pooled_h, pooled_a, h, down, _, up, up_bias, *parameters = ctx.saved_tensors
        needs = _Inputs(*ctx.needs_input_grad)
        out_grad = grads[0].contiguous()
        flat = out_grad.to(z.dtype).view(-1, len(down[0]))
        grad_a = (flat @ up.to(z.dtype).T).view_as(z)  # as if alpha were one
        a, summed = F.gelu(z), out_grad.sum(1, dtype=up.dtype)
        wide = _over_bottlenecks(alpha, len(up)).to(z.dtype)
        up_grad = (a * wide).view(-1, len(up)).T @ flat if needs.up else None
        per_unit = a.mul_(grad_a).sum(1, dtype=up.dtype)
        grad_alpha = per_unit.view(*alpha.shape, -1).sum(-1) + F.linear(summed, up_bias)
        small = _attention_grads(_Leaves(pooled_h, pooled_a, up, up_bias, *parameters), grad_alpha, needs)
        grad_a.mul_(wide).add_((small.gelu / ctx.tokens).to(z.dtype).unsqueeze(1))
        grad_z = _gelu_backward(grad_a, z)
        grad_h = None
        if needs.h:
            grad_h = out_grad + (small.pooled / ctx.tokens).to(ctx.h_dtype).unsqueeze(1)
            grad_h = _plus_product(grad_h, grad_z, down.to(z.dtype))
        down_grad = grad_z.view(-1, len(down)).T @ h.to(z.dtype).view(-1, h.shape[-1]) if needs.down else None
        down_bias_grad = grad_z.sum((0, 1), dtype=down.dtype) if needs.down_bias else None
        up_grad = None if up_grad is None else up_grad.to(up.dtype) + small.up
        up_bias_grad = alpha.T @ summed + small.up_bias if needs.up_bias else None
        down_grad = None if down_grad is None else down_grad.to(down.dtype)
        of_attention = (small.query, small.key, small.prior, small.product)
        return _Inputs(None, grad_h, down_grad, down_bias_grad, up_grad, up_bias_grad, *of_attention)


def _attention_grads(leaves: _Leaves, grad: Tensor, needs: _Inputs) -> _Leaves:
    """Gradients of alpha's (B, N) inputs, zeros or None where there is none: by autograd, as all of it is pooled."""
    needed = (True, True, needs.up, needs.up_bias, needs.query, needs.key, needs.prior, needs.product)
    with torch.enable_grad():
        copies = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(leaves, needed, strict=True)]
        fresh = _Leaves(*copies)  # type: ignore[arg-type]  # those that may be None are
        parameters = AttentionParameters(fresh.query, fresh.key, fresh.prior, fresh.product)
        alpha = attention(fresh.pooled, fresh.gelu, fresh.up, fresh.up_bias, parameters)
    learned = [t for t in fresh if t is not None and t.requires_grad]
    if not alpha.requires_grad:
        found = {id(t): torch.zeros_like(t) for t in learned}
    else:
        given = torch.autograd.grad(alpha, learned, grad, allow_unused=True, materialize_grads=True)
        found = {id(t): g for t, g in zip(learned, given, strict=True)}
    return _Leaves(*[None if t is None else found.get(id(t)) for t in fresh])  # type: ignore[arg-type]
