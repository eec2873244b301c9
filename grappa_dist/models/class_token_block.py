"""The last block where the features are its class token's: query, projection and MLP for that token alone.

The only file that opens a block. timm's are recognised by their types and tried on an image before they are used; an
unknown block, or one with another result, stays whole. Shapes: B images, T tokens, D channels, A heads of C channels.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grappa_dist.models.backbone import Backbone
from grappa_dist.progress import trial_lost

TOLERANCE = 1e-9  # of the largest feature, in double precision: far above rounding


class ClassTokenBlock(nn.Module):
    """The class token after a block of timm's, equal up to rounding: (B, T, D) -> (B, 1, D).

    Without dropout and stochastic depth, as a `Backbone` is always in eval mode.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, tokens: Tensor, **given: Any) -> Tensor:
        """`given`: what the model passes to its blocks, if anything: rotary positions or a bias of relative ones."""
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if given.keys() - {"rope", "shared_rel_pos_bias"}:  # such as a mask, with which no backbone is called
            whole: Tensor = self.block(tokens, **given)
            return whole[:, :1]
        attended = _attend(self.block.attn, self.block.norm1(tokens), **given)
        x = tokens[:, :1] + self._scaled(1, attended)
        return x + self._scaled(2, self.block.mlp(self.block.norm2(x)))

    def _scaled(self, part: int, x: Tensor) -> Tensor:
        """Layer scale, which is a module in some blocks and a parameter or None in others."""
        if hasattr(self.block, f"ls{part}"):
            scaled: Tensor = getattr(self.block, f"ls{part}")(x)
            return scaled
        gamma = getattr(self.block, f"gamma_{part}")
        return x if gamma is None else gamma * x


def last_block(backbone: Backbone) -> tuple[nn.Module, str]:
    """The last block, as a ClassTokenBlock where features are its class token's; else whole, and the reason why.

    On the meta device, where nothing is computed, types and shapes decide.
    """
    block = list(backbone.blocks)[-1]
    pooling = getattr(backbone.model, "global_pool", None)
    if pooling != "token" and hasattr(backbone.model, "forward_head"):
        return block, f"the features are pooled by {pooling or 'nothing'!r}, not the class token's"
    if not _is_known(block):
        return block, f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__} is not known"
    why = _differs(backbone)
    return (block, why) if why else (ClassTokenBlock(block), "")


def _is_known(block: nn.Module) -> bool:
    if not type(block).__module__.startswith("timm."):
        return False
    from timm.models import beit, eva, vision_transformer

    rotary = getattr(import_module("timm.layers"), "AttentionRope", None)  # not in every timm that may be installed
    attentions: dict[type, tuple[Any, ...]] = {
        vision_transformer.Block: (getattr(vision_transformer, "Attention", None),),
        eva.EvaBlock: (eva.EvaAttention, rotary),
        beit.Block: (beit.Attention,),
    }
    attn = getattr(block, "attn", None)
    return type(attn) in attentions.get(type(block), ()) and getattr(attn, "num_kv_groups", 1) == 1


def _differs(backbone: Backbone) -> str:
    """Why the features of an image of noise differ with the class token alone; "" if they do not.

    Earlier blocks are skipped, so it takes the time of one block.
    """
    *others, last = backbone.blocks
    size, device = backbone.preprocess.image_size, backbone.mean.device
    noise = torch.rand(1, 3, size, size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    with torch.no_grad():
        shallow = copy.deepcopy(backbone, {id(block): _Identity() for block in others}).double()
        try:
            right = shallow(noise.to(device).double())
            shallow.blocks[len(others)] = ClassTokenBlock(shallow.blocks[len(others)])
            found = shallow(noise.to(device).double())
        except Exception as error:  # an unknown block may raise anything; then it stays whole
            trial_lost("a last block for the class token alone", error)
            return f"a trial of {type(last).__name__} failed: {' '.join(str(error).split())[:200]}"
        if found.is_meta or bool((found - right).abs().max() <= TOLERANCE * right.abs().max()):
            return ""
    return f"in a trial {type(last).__name__} computes something else than expected, with timm {_timm_version()}"


def _timm_version() -> str:
    import timm

    return str(timm.__version__)


class _Identity(nn.Module):
    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tokens


def _attend(attn: Any, x: Tensor, rope: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """Attention of the class token over all tokens, (B, T, D) -> (B, 1, D)."""
    q, k, v = _projected(attn, x)
    q, k = (getattr(attn, f"{name}_norm", nn.Identity())(t) for name, t in (("q", q), ("k", k)))
    if rope is not None:  # the class token has no position
        k = _rotated(attn, k, rope)
    q, k = q.type_as(v), k.type_as(v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_position_bias(attn, shared_rel_pos_bias))
    out = getattr(attn, "norm", nn.Identity())(out.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    found: Tensor = attn.proj(out if gate is None else out * gate(x[:, :1]).sigmoid())
    return found


def _projected(attn: Any, x: Tensor) -> list[Tensor]:
    """Query of the class token, (B, A, 1, C); keys and values of all tokens, (B, A, T, C)."""
    if attn.qkv is None:
        parts = [attn.q_proj(x[:, :1]), attn.k_proj(x), attn.v_proj(x)]
    else:
        width, bias = len(attn.qkv.weight) // 3, _bias(attn)
        of_q, of_others = (None, None) if bias is None else (bias[:width], bias[width:])
        query = F.linear(x[:, :1], attn.qkv.weight[:width], of_q)
        parts = [query, *F.linear(x, attn.qkv.weight[width:], of_others).chunk(2, -1)]
    return [part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in parts]


def _bias(attn: Any) -> Tensor | None:
    """(3 * A * C,): of the `qkv` layer in timm's plain attention, three separate parameters in the others."""
    if getattr(attn, "q_bias", None) is None:
        bias: Tensor | None = attn.qkv.bias
        return bias
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _rotated(attn: Any, k: Tensor, rope: Tensor) -> Tensor:
    layers: Any = import_module("timm.layers")
    prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    options = {"half": True} if half else {}  # older versions of timm have no such option
    return torch.cat([k[:, :, :prefix], layers.apply_rot_embed_cat(k[:, :, prefix:], rope, **options)], 2)


def _position_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """The bias of relative positions for the class token's query, (1, A, 1, T)."""
    bias = shared  # (A, T, T), of all blocks alike
    if getattr(attn, "relative_position_bias_table", None) is not None:
        of_block: Tensor = attn._get_rel_pos_bias()  # (1, A, T, T)
        bias = of_block if shared is None else of_block + shared
    return None if bias is None else bias[..., :1, :]
