"""The frozen ViT, from timm or from a user's own function. Shapes: B images, S pixels a side, T tokens, D channels."""

from __future__ import annotations

import importlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist._compat import declare_torchvision_ops

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """How an image becomes the backbone's input."""

    image_size: int = 224
    resize: str = "crop"  # shorter side to image_size / crop_share, then the centre; or "squash"
    interpolation: str = "bicubic"
    crop_share: float = 1.0
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD


class Backbone(nn.Module):
    """Frozen, in eval mode for good; RGB in [0, 1] (B, 3, S, S) -> image features z (B, D), not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        missing = [name for name in ("patch_embed", "blocks", "norm", "embed_dim") if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"backbone {type(model).__name__} has no {', '.join(missing)}; "
                "it needs patch_embed, blocks, norm, embed_dim"
            )
        self.model = model.requires_grad_(False).eval()
        self.pixels = pixels
        self.embed_dim = int(model.embed_dim)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, 3, 1, 1), persistent=False)

    @property
    def blocks(self) -> Any:
        """The transformer blocks, a ModuleList or Sequential that can be assigned to."""
        return self.model.blocks

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: a frozen model's dropout and statistics are no part of the method."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        model: Any = self.model
        if hasattr(model, "forward_features") and hasattr(
            model, "forward_head"
        ):  # timm: registers, poolings, extra norms
            return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[no-any-return]
        tokens = model.patch_embed(x)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[:, 0]  # type: ignore[no-any-return]


def create_backbone(
    name: str,
    kwargs: Mapping[str, Any],
    pixels: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    pretrained: bool = True,
) -> Backbone:
    """The backbone called `timm:<model>` or `<module>:<function>`.

    Args:
        pixels: overrides of `Pixels`; what is absent comes from timm's data config, else it is ImageNet's.
        checkpoint: a local file of weights (safetensors, or a torch file that loads with weights_only).
        pretrained: False builds the architecture alone, for weights that are loaded afterwards.

    Raises:
        ValueError: an unknown model, function or file, or weights that cannot be had offline.
    """
    source, _, function = name.partition(":")
    if source == "timm":
        size = {"img_size": pixels["image_size"]} if "image_size" in pixels and "img_size" not in kwargs else {}
        model = _timm(function, {**size, **kwargs}, checkpoint, pretrained)
    else:
        model = _call(source, function, kwargs)
        if checkpoint and pretrained:
            model.load_state_dict(_read(checkpoint))
    return Backbone(model, replace(_default_pixels(model), **pixels))


def _default_pixels(model: nn.Module) -> Pixels:
    if not hasattr(model, "pretrained_cfg"):
        return Pixels()
    declare_torchvision_ops()
    from timm.data import resolve_model_data_config

    known = resolve_model_data_config(model)
    return Pixels(
        image_size=known["input_size"][1],
        interpolation=known["interpolation"],
        crop_share=known["crop_pct"],
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
    )


def _timm(name: str, kwargs: Mapping[str, Any], checkpoint: str | None, pretrained: bool) -> nn.Module:
    declare_torchvision_ops()
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        raise ValueError(
            f"backbone.name=timm:{name}: timm {timm.__version__} has no such model"
            + (f"; near it: {', '.join(close)}" if close else "")
        )
    overlay = {"file": checkpoint} if checkpoint else None
    if checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f"backbone.checkpoint={checkpoint!r} does not exist")
    if pretrained and not checkpoint and not _weights_reachable(name):
        raise ValueError(
            f"the weights of timm:{name} are not in the local cache and their hub cannot be reached; "
            "download them elsewhere and set backbone.checkpoint=FILE.safetensors"
        )
    return timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=0, **kwargs)  # type: ignore[no-any-return]


def _weights_reachable(name: str) -> bool:
    """Whether timm will find the weights, asked first because its own retries take a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        return True  # timm raises its own error at once
    if any(
        isinstance(try_to_load_from_cache(known.hf_hub_id, f), str) for f in ("model.safetensors", "pytorch_model.bin")
    ):
        return True
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def _call(module: str, function: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        create = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ValueError(f"backbone.name={module}:{function}: {error}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"backbone.name={module}:{function}: the module has no {function!r}") from error
    try:
        return create(**kwargs)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"backbone.kwargs={dict(kwargs)}: {error}") from error


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"backbone.checkpoint={path!r} does not exist")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
