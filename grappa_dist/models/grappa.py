"""The Grappa layer and model: adaptor sets and the attention over them (Almazan et al., ECCV 2022, Sec. 3).

Shapes: B images, T tokens, D channels, N adaptor sets, H bottleneck, L layers.

This file holds the parameters. Eq. (3), the attention over the adaptors, and the fusion of their outputs are computed
by `attention` and `fused_adaptors` of models/fused_adaptors.py, in training and inference alike. Step 2 trains its
sets in models/packed.py. tests/reference.py has Algorithm 1 line by line, as the reference that tests compare with.

The layer wraps any block and never opens it. With x and y the two terms of the block's output h = x + y, the paper's
U_i = A_i(h) + y and out = sum_i alpha_i U_i + x equal h + sum_i alpha_i A_i(h), since alpha sums to one; and y adds the
same number to all N logits, which softmax ignores.

At a strength s of adaptation, which is set after training, the layer gives h + s (out - h), the backbone at 0.
The attention of a layer is computed as without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.models.backbone import Backbone
from grappa_dist.models.fused_adaptors import AttentionParameters, Weights, fused_adaptors
from grappa_dist.variants import MOST_STRENGTH


class Adaptors(nn.Module):
    """The N bottleneck adaptors A_i(h) = up_i(GELU(down_i(h))) after one block, side by side: two matmuls for all.

    `up` starts at exactly zero, so a fresh model is the backbone, bit for bit.
    """

    def __init__(self, num_sets: int, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.num_sets, self.dim, self.bottleneck = num_sets, dim, bottleneck
        # NaN until initialised or loaded
        self.down_weight = nn.Parameter(torch.full((num_sets * bottleneck, dim), math.nan))
        self.down_bias = nn.Parameter(torch.full((num_sets * bottleneck,), math.nan))
        self.up_weight = nn.Parameter(torch.zeros(num_sets * bottleneck, dim))
        self.up_bias = nn.Parameter(torch.zeros(num_sets, dim))

    @torch.no_grad()
    def initialise(self, rng: torch.Generator) -> None:
        """The default init of a linear layer for `down`, zeros for `up`."""
        bound = 1 / math.sqrt(self.dim)
        self.down_weight.uniform_(-bound, bound, generator=rng)
        self.down_bias.uniform_(-bound, bound, generator=rng)
        self.up_weight.zero_()
        self.up_bias.zero_()

    @torch.no_grad()
    def randomise(self, rng: torch.Generator) -> None:
        """The default init of a linear layer for `down` and `up`: the start of sets that no labels have trained."""
        self.initialise(rng)
        bound = 1 / math.sqrt(self.bottleneck)
        self.up_weight.uniform_(-bound, bound, generator=rng)
        self.up_bias.uniform_(-bound, bound, generator=rng)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Adaptor `index` in the layout of two linear layers: down (H, D), (H,) and up (D, H), (D,)."""
        part = slice(index * self.bottleneck, (index + 1) * self.bottleneck)
        return {
            "down.weight": self.down_weight[part].detach().contiguous(),
            "down.bias": self.down_bias[part].detach().contiguous(),
            "up.weight": self.up_weight[part].detach().T.contiguous(),
            "up.bias": self.up_bias[index].detach().contiguous(),
        }

    @torch.no_grad()
    def load(self, sets: Sequence[Mapping[str, Tensor]]) -> None:
        """Fills all N adaptors from what `tensors` gave."""
        self.down_weight.copy_(torch.cat([s["down.weight"] for s in sets]))
        self.down_bias.copy_(torch.cat([s["down.bias"] for s in sets]))
        self.up_weight.copy_(torch.cat([s["up.weight"].T for s in sets]))
        self.up_bias.copy_(torch.stack([s["up.bias"] for s in sets]))


class Attention(nn.Module):
    """Q and K (D, D) of Eq. (3): alpha = softmax_i( (Q pool(h)) . (K pool(A_i(h))) / sqrt(D) ).

    No bias, no value projection. `attention` in models/fused_adaptors.py computes it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.full((dim, dim), math.nan))  # NaN until initialised or loaded
        self.key = nn.Parameter(torch.full((dim, dim), math.nan))

    @torch.no_grad()
    def initialise(self, rng: torch.Generator) -> None:
        """The default init of a linear layer."""
        bound = 1 / math.sqrt(len(self.query))
        self.query.uniform_(-bound, bound, generator=rng)
        self.key.uniform_(-bound, bound, generator=rng)


class WideSet(nn.Module):
    """Sets whose weights are the same for all images, folded into one of F' bottlenecks, zero weights left out.

    Its tensors are derived, so no state dict has them.
    """

    down: Tensor  # (F', D)
    down_bias: Tensor  # (F',)
    up: Tensor  # (F', D)
    up_bias: Tensor  # (1, D)

    def __init__(self, adaptors: Adaptors, alpha: Tensor) -> None:
        super().__init__()
        wide = alpha.repeat_interleave(adaptors.bottleneck)
        kept = wide.nonzero().flatten() if bool((alpha == 0).any()) else slice(None)  # a slice copies nothing
        self._add("down", adaptors.down_weight[kept].detach())
        self._add("down_bias", adaptors.down_bias[kept].detach())
        self._add("up", adaptors.up_weight[kept] * wide[kept].unsqueeze(1))
        self._add("up_bias", (alpha @ adaptors.up_bias).unsqueeze(0))

    def _add(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def weights(self) -> Weights:
        return self.down, self.down_bias, self.up, self.up_bias


class GrappaLayer(nn.Module):
    """A block followed by N adaptors and, with `attention`, their fusion; without it they are averaged.

    With N = 1 it is the layer of M + P_i, which step 2 trains as a `PackedGrappa` (equal up to rounding).
    """

    prior: Tensor | None
    wide: WideSet | None  # by `fold`, where alpha is the same for all images
    product: Tensor | None  # K^T Q, by `fold`, where it is not

    def __init__(self, block: nn.Module, adaptors: Adaptors, attention: Attention | None) -> None:
        super().__init__()
        self.block, self.adaptors, self.attention = block, adaptors, attention
        self.register_buffer("prior", None, persistent=False)
        self.register_buffer("product", None, persistent=False)
        self.register_module("wide", None)
        self._single = False  # whether all sets but one have weight zero
        self.strength = 1.0  # of adaptation
        self.alpha: Tensor | None = None  # (B, N) of the last forward, detached

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D); further arguments go to the block."""
        h: Tensor = self.block(tokens, *args, **kwargs)
        out = self._adapted(h)
        return out if self.strength == 1 else torch.lerp(h, out, self.strength)  # at 0 it is h to the bit

    def _adapted(self, h: Tensor) -> Tensor:
        """The layer's output at full strength, (B, T, D)."""
        sets = self.adaptors
        if self.wide is not None:
            out, _ = fused_adaptors(h, self.wide.weights, AttentionParameters())
            self.alpha = self._constant_alpha().expand(h.shape[0], -1)
            return out
        weights = (sets.down_weight, sets.down_bias, sets.up_weight, sets.up_bias)
        out, self.alpha = fused_adaptors(h, weights, self._attention_parameters())
        return out

    def _attention_parameters(self) -> AttentionParameters:
        if self._has_constant_alpha:
            return AttentionParameters(prior=self.prior)
        assert self.attention is not None
        if self.product is not None:
            return AttentionParameters(product=self.product, prior=self.prior)
        return AttentionParameters(self.attention.query, self.attention.key, prior=self.prior)

    @property
    def _has_constant_alpha(self) -> bool:
        """Whether alpha is the same for all images."""
        return self.attention is None or self.adaptors.num_sets == 1

    def _constant_alpha(self) -> Tensor:
        """alpha where it is the same for all images, (N,)."""
        even = self.adaptors.up_bias.new_zeros(self.adaptors.num_sets)
        return (even if self.prior is None else even + self.prior).softmax(-1)

    @torch.no_grad()
    def weigh(self, weights: Tensor | None) -> None:
        """Multiplies alpha by `weights` (N,), not all zero, and normalises it to sum to one; None: no weights.

        Without attention, alpha is the normalised weights.
        """
        self.wide = self.product = None
        self.prior = None if weights is None else weights.to(self.adaptors.up_bias).log()
        self._single = weights is not None and int(weights.count_nonzero()) == 1

    @torch.no_grad()
    def fold(self) -> None:
        """For inference with the weights as they are: sets of constant alpha become one, else Q and K one matrix."""
        if self._has_constant_alpha or self._single:
            self.wide = WideSet(self.adaptors, self._constant_alpha())
        elif self.attention is not None:
            self.product = self.attention.key.T @ self.attention.query


class Grappa(nn.Module):
    """A frozen backbone whose every block is a Grappa layer: RGB in [0, 1] (B, 3, S, S) -> features z (B, D).

    Without sets, `of_backbone`, the blocks stay as they are.
    """

    def __init__(self, backbone: Backbone, num_sets: int, bottleneck: int, *, attention: bool) -> None:
        super().__init__()
        self.backbone, self.num_sets = backbone, num_sets
        self.embed_dim = backbone.embed_dim
        for index, block in enumerate(list(backbone.blocks) if num_sets else ()):
            adaptors = Adaptors(num_sets, backbone.embed_dim, bottleneck)
            backbone.blocks[index] = GrappaLayer(block, adaptors, Attention(backbone.embed_dim) if attention else None)

    @classmethod
    def of_backbone(cls, backbone: nn.Module) -> Grappa:
        """The backbone as a model without adaptor sets: the same features, bit for bit."""
        assert isinstance(backbone, Backbone)
        return cls(backbone, 0, 0, attention=False)

    @property
    def layers(self) -> list[GrappaLayer]:
        return list(self.backbone.blocks) if self.num_sets else []

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def weigh(self, weights: Tensor | None) -> None:
        """Weights of the N adaptor sets in every layer, the same for all images; an attention is multiplied by them.

        Args:
            weights: (N,), at least 0, not all 0; all but one 0 is the model of that set. None: as trained.

        Raises:
            ValueError: they are not N, or not such numbers.
        """
        sets = self.num_sets
        if weights is not None and (
            weights.shape != (sets,) or not bool((weights >= 0).all() and weights.isfinite().all() and weights.any())
        ):
            raise ValueError(f"weights must be {sets} numbers of at least 0, not all 0, got {weights.tolist()}")
        for layer in self.layers:
            layer.weigh(weights)

    @property
    def strength(self) -> float:
        """Of adaptation; 1 is the model as trained."""
        return self.layers[0].strength if self.num_sets else 1.0

    def set_strength(self, strength: float) -> None:
        """How far every layer goes from its block's output, 0: the backbone bit for bit, to its own, 1: as trained, or
        beyond.

        The attention of a layer is computed as without it; of later layers it changes with their input. It stays until
        it is set again, whatever is weighed and folded.

        Raises:
            ValueError: it is not in [0, MOST_STRENGTH], or there are no adaptor sets.
        """
        check_strength(strength, self.num_sets)
        for layer in self.layers:
            layer.strength = float(strength)

    def fold(self) -> None:
        """Makes inference cheaper, equal up to rounding, until `weigh`; parameters must not change afterwards."""
        for layer in self.layers:
            layer.fold()

    def last_attention(self) -> Tensor:
        """alpha of the last forward, (B, L, N)."""
        return torch.stack([layer.alpha for layer in self.layers if layer.alpha is not None], 1)

    def adaptor_tensors(self, index: int = 0) -> dict[str, Tensor]:
        """Adaptor set `index`, to be saved."""
        return {
            f"layers.{i}.{name}": t
            for i, layer in enumerate(self.layers)
            for name, t in layer.adaptors.tensors(index).items()
        }

    def load_adaptors(self, sets: Sequence[Mapping[str, Tensor]]) -> None:
        """Fills the N sets, each from what `adaptor_tensors` gave.

        Raises:
            ValueError: the sets are not N, or of another depth or width.
        """
        if len(sets) != self.num_sets:
            raise ValueError(f"{len(sets)} adaptor sets for a model of {self.num_sets}")
        for tensors in sets:
            _check_fit("an adaptor set", tensors, self.adaptor_tensors())
        for i, layer in enumerate(self.layers):
            names = ("down.weight", "down.bias", "up.weight", "up.bias")
            layer.adaptors.load([{name: s[f"layers.{i}.{name}"] for name in names} for s in sets])

    def attention_tensors(self) -> dict[str, Tensor]:
        """The fusion's Q and K of every layer, to be saved."""
        return {
            f"layers.{i}.{name}": p.detach().contiguous()
            for i, layer in enumerate(self.layers)
            if layer.attention is not None
            for name, p in layer.attention.named_parameters()
        }

    @torch.no_grad()
    def load_attention(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills Q and K from what `attention_tensors` gave.

        Raises:
            ValueError: they are of a model of another depth or width.
        """
        _check_fit("the fusion", tensors, self.attention_tensors())
        for i, layer in enumerate(self.layers):
            if layer.attention is not None:
                for name, p in layer.attention.named_parameters():
                    p.copy_(tensors[f"layers.{i}.{name}"])

    def trainable_attention(self, *, and_adaptors: bool = False) -> None:
        """Step 3: gradients for Q and K alone, or for the adaptors too."""
        self.requires_grad_(False)
        for layer in self.layers:
            layer.adaptors.requires_grad_(and_adaptors)
        for layer in self.layers:
            if layer.attention is not None:
                layer.attention.requires_grad_(True)


def check_strength(strength: float, num_sets: int) -> None:
    """Raises ValueError for what is no strength of adaptation of a model of so many adaptor sets."""
    if not num_sets:
        raise ValueError(f"strength={strength}: the model is the backbone alone and has no adaptor sets")
    if not 0 <= strength <= MOST_STRENGTH:
        raise ValueError(
            f"strength={strength}: expected a number from 0, the backbone, to {MOST_STRENGTH:g}; 1 is as trained"
        )


def _check_fit(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError for other names or shapes: copying would broadcast a small tensor and ignore one too many."""
    for name in sorted(found.keys() | expected.keys()):
        given, right = (tuple(t[name].shape) if name in t else None for t in (found, expected))
        if given != right:
            raise ValueError(
                f"{what} does not fit the model: {name} is {given or 'missing'}, expected {right or 'none'}"
            )
