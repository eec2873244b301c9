"""Whether a backbone can take images of the size that is asked for, tried out on one image before any is read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.models.backbone import Backbone

_LARGEST_PATCH = 64  # pixels at the edge that are looked for in vain before they count as seen
_SCALE = 0.1


def check_image_size(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    """Tries the patches of one image; a backbone without weights (on "meta") is told by its shapes.

    Raises:
        ValueError: the model was made for another size, its patches leave pixels at the edge out, or what it makes of
            patches is not (B, T, D), saying what would be right.
    """
    with torch.no_grad(), torch.device("cpu"):  # whatever is the default where models are built
        _check(backbone, name, kwargs)


def _check(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    patches = _on_cpu(backbone.model.patch_embed)  # type: ignore[arg-type]
    size = backbone.pixels.image_size
    said = f"backbone.image_size={size} does not suit backbone.name={name}"
    try:
        tokens = _tokens(patches, torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        right = _fitting(patches, _known_sizes(backbone.model, kwargs), size)
        reason = " ".join(str(error).split())[:200]
        if right is None:
            raise ValueError(
                f"backbone.name={name}: patch_embed fails on an image of backbone.image_size={size} ({reason}); "
                "give the side that the model was made for, if that is why"
            ) from error
        advice = f"it takes backbone.image_size={right}, or kwargs that make it for {size}"
        raise ValueError(f"{said}: {advice} ({reason})") from error
    own = not hasattr(backbone.model, "forward_features")
    if own and not (tokens.ndim == 3 and tokens.shape[::2] == (1, backbone.embed_dim)):
        raise ValueError(
            f"backbone.name={name}: patch_embed must make tokens (B, T, embed_dim) of images, here "
            f"(1, T, {backbone.embed_dim}); it makes {tuple(tokens.shape)}"
        )
    if unseen := _unseen(patches, size, tokens):
        raise ValueError(
            f"{said}: its patches do not reach the last {unseen} of {size} pixels; give a multiple of the patch, such "
            f"as backbone.image_size={size - unseen}"
        )


def _on_cpu(patches: nn.Module) -> nn.Module:
    """The module itself, or a copy with some values where it has none."""
    if not any(tensor.is_meta for tensor in (*patches.parameters(), *patches.buffers())):
        return patches
    draws = torch.Generator().manual_seed(0)
    made = copy.deepcopy(patches).to_empty(device="cpu")
    for parameter in made.parameters():
        parameter.copy_(_SCALE * torch.randn(parameter.shape, generator=draws))
    for buffer in made.buffers():
        buffer.zero_()
    return made


def _tokens(patches: nn.Module, images: Tensor) -> Tensor:
    """What becomes of images; some models give the shape of the grid of patches beside it."""
    made: Tensor | tuple[Tensor, ...] = patches(images)
    return made if isinstance(made, Tensor) else made[0]


def _unseen(patches: nn.Module, size: int, blank: Tensor) -> int:
    """Rows of pixels at the lower edge that change no token."""
    for unseen in range(min(_LARGEST_PATCH, size)):
        image = torch.zeros(1, 3, size, size)
        image[:, :, size - 1 - unseen] = 1
        if not torch.equal(_tokens(patches, image), blank):
            return unseen
    return 0


def _known_sizes(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterable[int]:
    """The sizes that a model was told, or says that it takes."""
    of_parts = [getattr(part, "img_size", None) for part in (model, model.patch_embed)]
    for told in (kwargs.get("image_size"), kwargs.get("img_size"), *of_parts):
        side = told[0] if isinstance(told, tuple | list) and told else told
        if isinstance(side, int):
            yield side


def _fitting(patches: nn.Module, sizes: Iterable[int], refused: int) -> int | None:
    for size in sizes:
        try:
            patches(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        if size != refused:
            return size
    return None
