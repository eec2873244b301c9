"""Models of one frozen backbone: held once in memory, and run side by side on the same images.

Up to the first adaptor all of them compute the same: patch embedding, positions, first block. Side by side, patch
embedding and first block are computed by the first model and copied to the others; a copy costs a hundredth of a
block. The rest runs model by model, as of each alone: the same products of the same shapes, so the same bits.

Shapes: B images, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.models.backbone import Backbone
from grappa_dist.models.grappa import Grappa, GrappaLayer
from grappa_dist.progress import trial_lost


class SharedBackbone:
    """A frozen backbone whose models take turns: each puts its own layers into it before it runs."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self._parts = backbone, [_Part(), _Part()]
        self._compared = False  # whether the first images have shown that all models give these parts the same
        patches: Any = backbone.model.patch_embed
        if isinstance(patches, nn.Module) and not isinstance(patches, torch.jit.ScriptModule):
            patches.forward = partial(self._parts[0], patches.forward)
        backbone.blocks[0] = _FirstBlock(backbone.blocks[0], self._parts[1])
        self._blocks = tuple(backbone.blocks)

    def model(self, num_sets: int, bottleneck: int, *, attention: bool) -> Grappa:
        """Another model of this backbone, its sets not initialised; without sets the frozen backbone itself."""
        _put(self.backbone, self._blocks)
        return _TakingTurns(self.backbone, num_sets, bottleneck, attention=attention)

    def side_by_side(self, models: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
        """The features (B, D) of models of this backbone, of images (B, 3, S, S): those of each alone, bit for bit.

        In memory are, beside what one model takes, two sets of tokens (B, T, D) that are kept for the next models.
        """
        if len(models) < 2:
            return [model(images) for model in models]
        with self._kept():
            found = []
            for model in models:
                for part in self._parts:
                    part.begin(compares=not self._compared)
                found.append(model(images))
        self._compared = True
        return found

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """While inside, what the parts compute for the first model is kept for the others."""
        try:
            yield
        finally:
            for part in self._parts:
                part.forget()


class _TakingTurns(Grappa):
    """A Grappa that shares its backbone with others, so its layers may not be there until it runs."""

    def __init__(self, backbone: Backbone, num_sets: int, bottleneck: int, *, attention: bool) -> None:
        super().__init__(backbone, num_sets, bottleneck, attention=attention)
        self.own = nn.ModuleList(backbone.blocks)

    @property
    def layers(self) -> list[GrappaLayer]:
        return [*self.own] if self.num_sets else []

    def forward(self, images: Tensor) -> Tensor:
        _put(self.backbone, self.own)
        return super().forward(images)


def _put(backbone: Backbone, blocks: Iterable[nn.Module]) -> None:
    for index, block in enumerate(blocks):
        backbone.blocks[index] = block


class _Part:
    """What the first model computes of a part of the backbone, and the others are given.

    Of a model that calls the part several times, the first call alone: what others are given may depend on adaptors.
    """

    def __init__(self) -> None:
        self._found: tuple[Any, Any] | None = None  # what the part was given by the first model, and what it returned
        self._asked = self._compares = self._differs = False
        self._keeps = False

    def begin(self, *, compares: bool) -> None:
        """A model begins.

        Args:
            compares: whether what it gives is compared with what the first model gave.
        """
        self._keeps, self._asked, self._compares = not self._differs, False, compares

    def forget(self) -> None:
        self._found, self._keeps = None, False

    def __call__(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._keeps or self._asked:
            return compute(*args, **kwargs)
        self._asked = True
        if self._found is not None and self._compares and not _same(self._found[0], (args, kwargs)):
            self._differs = True
            trial_lost("the first block computed once for several models", "models give it different tokens")
        if self._differs:
            return compute(*args, **kwargs)
        if self._found is None:
            given = _copied((args, kwargs)) if self._compares else None
            self._found = given, compute(*args, **kwargs)
        return _copied(self._found[1])  # a model may add to it in place


class _FirstBlock(nn.Module):
    """The first block, which stands at its place alone even where the same module is another block as well."""

    def __init__(self, block: nn.Module, part: _Part) -> None:
        super().__init__()
        self.block, self.part = block, part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(self.block, *args, **kwargs)


def _copied(value: Any) -> Any:
    """The value, its tensors copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def _same(one: Any, other: Any) -> bool:
    """Whether two values have the same tensors, bit for bit, and the same of all else."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, int | float | str) and bool(one == other))
