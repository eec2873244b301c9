"""The frozen ViT, from timm or from a user's own function; it is checked on one image before it is used.

Shapes: B images, S pixels a side, T tokens, D channels.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.data.transforms import Preprocess

# What loading a file of something else, or of another model's weights, raises
_MISFITS = (RuntimeError, LookupError, EOFError, TypeError, AttributeError, pickle.UnpicklingError, SafetensorError)
_LARGEST_PATCH = 64  # pixels at the lower edge that are tried before they count as seen
_TRIAL_SCALE = 0.1  # of the weights that a model on "meta" is tried with


def forward_precision(device: torch.device, *, bf16: bool | None = None) -> AbstractContextManager[object]:
    """The precision of a forward pass, as a context; weights, their gradients and optimizer states are always float32.

    Args:
        bf16: whether matrix products are in bfloat16; None: only on a GPU, as in training.
    """
    enabled = device.type == "cuda" if bf16 is None else bf16
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


class Backbone(nn.Module):
    """The frozen ViT, always in eval mode: RGB in [0, 1] (B, 3, S, S) -> image features z (B, D), not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        missing = [name for name in ("patch_embed", "blocks", "norm", "embed_dim") if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"backbone.name: {type(model).__name__} has no {', '.join(missing)}; "
                "it needs patch_embed, blocks, norm, embed_dim"
            )
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # the engine broadcasts bytes and refuses strides
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.embed_dim = int(model.embed_dim)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    @property
    def blocks(self) -> Any:
        """The transformer blocks, a ModuleList or Sequential that can be assigned to."""
        return self.model.blocks

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: the method has no dropout or batch statistics in the frozen model."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        model: Any = self.model
        if hasattr(model, "forward_features") and hasattr(model, "forward_head"):  # timm: registers, poolings, norms
            return model.forward_head(model.forward_features(x), pre_logits=True)
        tokens = model.patch_embed(x)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[:, 0]


def create_backbone(
    name: str,
    kwargs: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    pretrained: bool = True,
) -> Backbone:
    """The backbone called `timm:<model>` or `<module>:<function>`.

    Args:
        overrides: fields of `Preprocess`; what is absent comes from timm's data config, else it is ImageNet's.
        checkpoint: a local file of weights (safetensors, or a torch file that loads with weights_only).
        pretrained: False builds the architecture only, for weights that are loaded afterwards.

    Raises:
        ValueError: an unknown model, function or file, or weights that do not fit or cannot be downloaded.
    """
    source, _, function = name.partition(":")
    if checkpoint and pretrained and not Path(checkpoint).is_file():
        raise ValueError(f"backbone.checkpoint={checkpoint!r} does not exist")
    if source != "timm":
        model = _call(source, function, kwargs)
        if checkpoint and pretrained:
            _load(model, checkpoint)
        return Backbone(model, replace(_default_preprocess(model), **overrides))
    size = {"img_size": overrides["image_size"]} if "image_size" in overrides else {}
    model = _timm(function, {**size, **kwargs}, checkpoint if pretrained else None, pretrained)
    # timm's data config has the size of the pretraining, whatever size was asked for
    size = {"image_size": kwargs["img_size"]} if isinstance(kwargs.get("img_size"), int) else {}
    return Backbone(model, replace(_default_preprocess(model), **{**size, **overrides}))


def _default_preprocess(model: nn.Module) -> Preprocess:
    if not hasattr(model, "pretrained_cfg"):
        return Preprocess()
    declare_torchvision_ops()
    from timm.data.config import resolve_model_data_config

    given = resolve_model_data_config(model)
    return Preprocess(
        image_size=given["input_size"][1],
        interpolation=given["interpolation"],
        crop_share=given["crop_pct"],
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
    )


def _call(module: str, function: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        create = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ValueError(f"backbone.name={module}:{function}: {error}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"backbone.name={module}:{function}: the module has no {function!r}") from error
    try:
        return create(**kwargs)
    except TypeError as error:
        raise ValueError(f"backbone.kwargs={dict(kwargs)}: {error}") from error


def _load(model: nn.Module, path: str) -> None:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except _MISFITS as error:
        raise _unreadable(path) from error
    try:
        model.load_state_dict(weights)
    except _MISFITS as error:
        raise _misfit(path, error) from error


def _timm(name: str, kwargs: Mapping[str, Any], checkpoint: str | None, pretrained: bool) -> nn.Module:
    _check_timm(name)
    import timm

    if pretrained and not checkpoint:
        check_weights(f"timm:{name}")
    try:
        if checkpoint:
            return _timm_from_file(name, kwargs, checkpoint)
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.kwargs={dict(kwargs)} do not suit timm:{name}: {error}") from error


def _timm_from_file(name: str, kwargs: Mapping[str, Any], checkpoint: str) -> nn.Module:
    """The model with a file's weights, which timm renames and resizes as it does with downloaded ones."""
    if checkpoint.endswith(".npz"):
        raise _unreadable(checkpoint)
    import timm

    def create(**options: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0, **options, **kwargs)

    with torch.random.fork_rng(devices=()):
        untouched = create(pretrained=False)
        try:
            # Not as {"file": ...}: older versions of timm unpickle that, with any code in it
            weights = timm.models.load_state_dict(checkpoint, weights_only=True)
        except _MISFITS as error:
            raise _unreadable(checkpoint) from error
        try:
            model = create(pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
            del model.pretrained_cfg["state_dict"]  # a copy of all weights
        except _MISFITS as error:
            raise _misfit(checkpoint, error) from error
    # timm accepts missing weights where it drops a classifier: what still equals the seeded values was never loaded
    pairs = zip(model.named_parameters(), untouched.parameters(), strict=True)
    missing = [key for (key, a), b in pairs if a.ndim > 1 and torch.equal(a, b) and (a != a.flatten()[0]).any()]
    if missing:
        raise _misfit(checkpoint, f"it has no {', '.join(missing[:3])}" + ", ..." * (len(missing) > 3))
    loaded: nn.Module = model
    return loaded


def _unreadable(checkpoint: str) -> ValueError:
    """Without the text of the original error, which advises to unpickle what may run code."""
    return ValueError(
        f"backbone.checkpoint={checkpoint!r} cannot be read as weights: expected an undamaged .safetensors file, or a "
        "PyTorch file (.pt, .pth, .bin) of tensors alone, as torch.save(model.state_dict(), FILE) writes it"
    )


def _misfit(checkpoint: str, why: object) -> ValueError:
    reason = " ".join(str(why).split())
    return ValueError(f"backbone.checkpoint={checkpoint!r} does not fit the backbone: {reason[:300]}")


def check_name(name: str) -> None:
    """Raises ValueError for a `timm:` model that this timm does not know."""
    source, _, model = name.partition(":")
    if source == "timm":
        _check_timm(model)


def check_weights(name: str) -> None:
    """Raises ValueError where the weights of a `timm:` model are neither in the local cache nor can be downloaded."""
    source, _, model = name.partition(":")
    if source == "timm" and not _weights_reachable(model):
        raise ValueError(
            f"the weights of backbone.name={name} are not in the local cache and their hub cannot be reached; "
            "download them elsewhere and set backbone.checkpoint=FILE.safetensors"
        )


def _check_timm(name: str) -> None:
    declare_torchvision_ops()
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        raise ValueError(
            f"backbone.name=timm:{name}: timm {timm.__version__} has no such model"
            + (f"; near it: {', '.join(close)}" if close else "")
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model exists, its weights of this name do not
        raise ValueError(f"backbone.name=timm:{name}: {error}") from error


def _weights_reachable(name: str) -> bool:
    """Whether timm will find the weights; checked first because its own retries take a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return True  # timm raises its own error at once
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return True
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def check_image_size(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    """Runs `patch_embed` on one image; a backbone without weights (on "meta") is tried with random ones.

    Raises:
        ValueError: the model was made for another size, its patches leave out pixels at the edge, or its tokens are not
            (B, T, D); the message has what would be right.
    """
    with torch.no_grad(), torch.device("cpu"):  # models may be built under another default device
        _check(backbone, name, kwargs)


def _check(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    patches = _on_cpu(backbone.model.patch_embed)  # type: ignore[arg-type]
    size = backbone.preprocess.image_size
    wrong = f"backbone.image_size={size} does not suit backbone.name={name}"
    try:
        tokens = _tokens(patches, torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        right = _accepted_size(patches, _declared_sizes(backbone.model, kwargs), size)
        reason = " ".join(str(error).split())[:200]
        if right is None:
            raise ValueError(
                f"backbone.name={name}: patch_embed fails on an image of backbone.image_size={size} ({reason}); "
                "give the side that the model was made for, if that is why"
            ) from error
        advice = f"it takes backbone.image_size={right}, or kwargs that make it for {size}"
        raise ValueError(f"{wrong}: {advice} ({reason})") from error
    plain = not hasattr(backbone.model, "forward_features")
    if plain and not (tokens.ndim == 3 and tokens.shape[::2] == (1, backbone.embed_dim)):
        raise ValueError(
            f"backbone.name={name}: patch_embed must make tokens (B, T, embed_dim) of images, here "
            f"(1, T, {backbone.embed_dim}); it makes {tuple(tokens.shape)}"
        )
    if unseen := _unseen(patches, size, tokens):
        raise ValueError(
            f"{wrong}: its patches do not reach the last {unseen} of {size} pixels; give a multiple of the patch, such "
            f"as backbone.image_size={size - unseen}"
        )


def _on_cpu(patches: nn.Module) -> nn.Module:
    """The module itself, or a copy with random weights where it has none."""
    if not any(tensor.is_meta for tensor in (*patches.parameters(), *patches.buffers())):
        return patches
    rng = torch.Generator().manual_seed(0)
    filled = copy.deepcopy(patches).to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.copy_(_TRIAL_SCALE * torch.randn(parameter.shape, generator=rng))
    for buffer in filled.buffers():
        buffer.zero_()
    return filled


def _tokens(patches: nn.Module, images: Tensor) -> Tensor:
    """The tokens of images; some models return the shape of the grid of patches with them."""
    found: Tensor | tuple[Tensor, ...] = patches(images)
    return found if isinstance(found, Tensor) else found[0]


def _unseen(patches: nn.Module, size: int, blank: Tensor) -> int:
    """Rows of pixels at the lower edge that change no token."""
    for unseen in range(min(_LARGEST_PATCH, size)):
        image = torch.zeros(1, 3, size, size)
        image[:, :, size - 1 - unseen] = 1
        if not torch.equal(_tokens(patches, image), blank):
            return unseen
    return 0


def _declared_sizes(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterable[int]:
    """The sizes in the arguments of a model, and in its attributes."""
    of_parts = [getattr(part, "img_size", None) for part in (model, model.patch_embed)]
    for size in (kwargs.get("image_size"), kwargs.get("img_size"), *of_parts):
        side = size[0] if isinstance(size, tuple | list) and size else size
        if isinstance(side, int):
            yield side


def _accepted_size(patches: nn.Module, sizes: Iterable[int], refused: int) -> int | None:
    """The first of the sizes, but the refused one, that the patches take; else None."""
    for size in sizes:
        try:
            patches(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        if size != refused:
            return size
    return None
