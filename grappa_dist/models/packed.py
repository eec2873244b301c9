"""The model that step 2 trains: S adaptor sets side by side on the same images, the shared part computed once.

Shapes: B images, T tokens, D channels, S sets, H bottleneck. The sets part after the first block: from there on, row
s * B + b is image b as set s sees it, and the S sets run as one larger batch. A set depends on its own rows and weights
only, so it gets the values and gradients of training alone, up to the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grappa_dist.models.backbone import Backbone
from grappa_dist.models.class_token_block import last_block
from grappa_dist.models.grappa import Adaptors
from grappa_dist.models.precision import computed_again_alike

FEWEST_COMPILED = 2  # images: torch.compile specialises on 0 and 1, and it has a limit of graphs


class PackedLayer(nn.Module):
    """A block and, behind it, one adaptor of each of the S sets: out_s = h_s + A_s(h_s)."""

    def __init__(self, block: nn.Module, num_sets: int, dim: int, bottleneck: int, *, first: bool) -> None:
        super().__init__()
        self.block, self.first = block, first
        self.sets = nn.ModuleList(Adaptors(1, dim, bottleneck) for _ in range(num_sets))
        self.recompute = False  # activations in the backward pass, instead of keeping them
        self.compiled: Callable[..., Tensor] | None = None  # `compute`, for batches of several images

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(S*B, T, D), of the first layer (B, T, D), -> (S*B, T, D); further arguments go to the block."""
        images = len(tokens) if self.first else len(tokens) // len(self.sets)
        compute = self.compiled if self.compiled is not None and images >= FEWEST_COMPILED else self.compute
        return compute(tokens, *args, **kwargs)

    def compute(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `forward`, never compiled."""
        if not self.first:
            return self._kept(self._later_layer, tokens, *args, **kwargs)
        with torch.no_grad():  # nothing before the first adaptor learns, so there is nothing to recompute
            h: Tensor = self.block(tokens, *args, **kwargs)
        return self._kept(self._first_layer, h)

    def _kept(self, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The result of `run`, whose activations are kept for the backward pass, or recomputed in it."""
        if self.recompute and torch.is_grad_enabled():
            found: Tensor = checkpoint(computed_again_alike(run), *args, use_reentrant=False, **kwargs)
            return found
        return run(*args, **kwargs)

    def _first_layer(self, h: Tensor) -> Tensor:
        down = torch.cat([a.down_weight for a in self._adaptors])  # (S*H, D): one matmul for all sets
        a = F.gelu(F.linear(h, down, torch.cat([a.down_bias for a in self._adaptors])))
        count, width = len(self.sets), self._adaptors[0].bottleneck
        a = a.view(h.shape[0] * h.shape[1], count, width).transpose(0, 1)  # (S, B*T, H)
        return (self._up(a).view(count, *h.shape) + h).flatten(0, 1)

    def _later_layer(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h: Tensor = self.block(tokens, *args, **kwargs)
        x = h.reshape(len(self.sets), len(h) // len(self.sets) * h.shape[1], h.shape[2])  # (S, B*T, D)
        down = torch.stack([a.down_weight for a in self._adaptors])  # (S, H, D)
        bias = torch.stack([a.down_bias for a in self._adaptors]).unsqueeze(1)
        return h + self._up(F.gelu(torch.baddbmm(bias, x, down.mT))).view_as(h)

    def _up(self, a: Tensor) -> Tensor:
        """(S, B*T, H) -> (S, B*T, D), each set by its own matrix."""
        bias = torch.stack([s.up_bias for s in self._adaptors])  # (S, 1, D)
        return torch.baddbmm(bias, a, torch.stack([s.up_weight for s in self._adaptors]))

    @property
    def _adaptors(self) -> list[Adaptors]:
        return list(self.sets)  # type: ignore[arg-type]


class PackedGrappa(nn.Module):
    """A frozen backbone with S adaptor sets side by side: RGB in [0, 1] (B, 3, P, P) -> features (S, B, D) by set.

    Wraps the `blocks` of the backbone in place; only the last one may be opened.

    Args:
        recompute: activations, in the backward pass.
        class_token_only: the last block computes that token alone, where the features are its and the block is known.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_sets: int,
        bottleneck: int,
        *,
        recompute: bool = False,
        class_token_only: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.num_sets, self.embed_dim = backbone, num_sets, backbone.embed_dim
        *blocks, last = backbone.blocks
        last, self.whole_because = last_block(backbone) if class_token_only else (last, "asked for")
        self.requires_grad_(False)
        for index, block in enumerate([*blocks, last]):
            layer = PackedLayer(block, num_sets, backbone.embed_dim, bottleneck, first=index == 0)
            layer.recompute = recompute
            backbone.blocks[index] = layer

    @property
    def layers(self) -> list[PackedLayer]:
        return list(self.backbone.blocks)

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.backbone(images)
        return z.view(self.num_sets, len(images), self.embed_dim)

    def adaptors(self, index: int) -> list[Adaptors]:
        """The adaptors of one set, by layer."""
        return [layer.sets[index] for layer in self.layers]  # type: ignore[misc]

    def initialise(self, index: int, rng: torch.Generator) -> None:
        """The initial weights of one set, a function of `rng` alone."""
        for adaptors in self.adaptors(index):
            adaptors.initialise(rng)

    def parameters_of(self, index: int) -> list[nn.Parameter]:
        """The parameters that one set learns, without its classifier."""
        return [parameter for adaptors in self.adaptors(index) for parameter in adaptors.parameters()]

    def adaptor_tensors(self, index: int) -> dict[str, Tensor]:
        """One set, to be saved, in the layout of `Grappa.adaptor_tensors`."""
        return {
            f"layers.{i}.{name}": tensor
            for i, adaptors in enumerate(self.adaptors(index))
            for name, tensor in adaptors.tensors(0).items()
        }


def activation_bytes(model: nn.Module, image_size: int) -> int:
    """Bytes that each image of a batch keeps in memory between forward and backward.

    Also on the meta device, where nothing is computed; there and on a CPU, activations are float32.
    """

    def kept(images: int) -> int:
        frozen = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        seen = dict[int, int]()

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in frozen:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        device = next(model.parameters()).device
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.empty(images, 3, image_size, image_size, device=device))
        return sum(seen.values())

    return kept(2) - kept(1)
