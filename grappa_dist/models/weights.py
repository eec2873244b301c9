"""Weights in files: a backbone's own, with what is said of a file of something else; and those of a whole model."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grappa_dist.files import read_tensors
from grappa_dist.storage import open_to_read

# What loading a file of something else, or of another model's weights, raises
_MISFITS = (RuntimeError, LookupError, EOFError, TypeError, AttributeError, pickle.UnpicklingError, SafetensorError)
_NAMED = 3  # keys that a message lists


def load_own(model: nn.Module, path: str) -> None:
    """Fills a user's own module with a file of its state dict.

    Raises:
        ValueError: the file is of something else, or of another model.
    """
    weights, expected = _read(path), model.state_dict()
    if not (isinstance(weights, Mapping) and weights and all(isinstance(t, Tensor) for t in weights.values())):
        raise _misfit(path, _flat(weights), expected)
    try:
        missing, unexpected = load_tensors(model, weights)
    except _MISFITS as error:
        raise _misfit(path, weights, expected, error) from error
    if missing or unexpected:
        raise _misfit(path, weights, expected, missing=missing)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as a file holds it: each tensor contiguous and in memory of its own.

    A tensor with several names, as a backbone that wraps another module has them, is there once, under the first.

    Raises:
        ValueError: something in the state is no tensor.
    """
    found, storages = dict[str, Tensor](), set[int]()
    for name, tensor in _distinct(model).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} in its state_dict is a {type(tensor).__name__}, expected tensors alone")
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return found


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Fills a model with what `tensors_of` gave; names that are missing in it, and names that the model has not.

    Raises:
        RuntimeError: shapes differ.
    """
    names = _names_of_one_tensor(model.state_dict())
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    return [name for name in missing if not any(twin in tensors for twin in names[name])], list(unexpected)


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, a tensor with several names under the first alone."""
    state = model.state_dict()
    names = _names_of_one_tensor(state)
    return {name: tensor for name, tensor in state.items() if names[name][0] == name}


def _names_of_one_tensor(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """By name, all names of the same tensor."""
    groups = dict[tuple[object, ...], list[str]]()
    for name, tensor in state.items():
        place: tuple[object, ...] = (name,)  # of what is empty, on "meta" or no tensor
        if isinstance(tensor, Tensor) and tensor.data_ptr():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        groups.setdefault(place, []).append(name)
    return {name: names for names in groups.values() for name in names}


def timm_from_file(name: str, kwargs: Mapping[str, Any], checkpoint: str) -> nn.Module:
    """The model with a file's weights, which timm renames and resizes as it does with downloaded ones.

    Raises:
        ValueError: the file is of something else, or of another model.
    """
    import timm

    found = _read(checkpoint)
    weights = timm.models.clean_state_dict(dict(_unwrapped(found)))
    if not weights:
        raise _unreadable(checkpoint, "it holds no tensors")

    def create(seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=0, **options, **kwargs)

    def filled(seed: int) -> Any:
        model = create(seed, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(weights)})
        del model.pretrained_cfg["state_dict"]  # a copy of all weights
        return model

    with torch.random.fork_rng(devices=()):
        untouched = create(0, pretrained=False)
        try:
            model = filled(0)
        except _MISFITS as error:
            raise _misfit(checkpoint, _flat(found), untouched.state_dict(), error) from error
        missing = _equal_tensors(untouched, model)
        if missing:  # never loaded, or saved by someone who seeded as is done here
            missing = sorted(set(missing) & set(_equal_tensors(create(1, pretrained=False), filled(1))))
    if missing:
        raise _misfit(checkpoint, _flat(found), untouched.state_dict(), missing=missing)
    loaded: nn.Module = model
    return loaded


def _equal_tensors(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the parameters that are equal in two models, those of one value aside.

    timm accepts missing weights where it drops a classifier: what still equals the seeded values was never loaded.
    """
    pairs = zip(a.named_parameters(), b.parameters(), strict=True)
    return [key for (key, x), y in pairs if x.ndim > 1 and torch.equal(x, y) and bool((x != x.flatten()[0]).any())]


def _read(path: str) -> Any:
    """What a file of tensors holds, by its content and not by the end of its name."""
    try:
        with open_to_read(Path(path)) as file:
            start = file.read(512)
            if start[8:9] == b"{":
                return read_tensors(Path(path))
            if why := _no_weights(start):
                raise _unreadable(path, why)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training, beside its weights
                return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"backbone.checkpoint={path!r} cannot be read: {error.strerror}") from error
    except _MISFITS as error:
        raise _unreadable(path, "") from error


def _no_weights(start: bytes) -> str:
    """What the first bytes of a file say that it is in place of weights, or ""."""
    text = start.lstrip().lower()
    if not start:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, as a download leaves that was not let in"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, to be replaced by `git lfs pull`"
    if not any(start):
        return "it begins with zeros, as an unfinished download does"
    if start.startswith(b"\x93NUMPY") or (b".npy" in start[:100] and start.startswith(b"PK")):
        return "it is a file of NumPy"
    if text.startswith((b"{", b"[")):
        return "it is JSON"
    return ""


def _unreadable(checkpoint: str, why: str) -> ValueError:
    """Without the text of the original error, which advises to unpickle what may run code."""
    return ValueError(
        f"backbone.checkpoint={checkpoint!r} cannot be read as weights{f' ({why})' if why else ''}: expected an "
        "undamaged .safetensors file, or a PyTorch file (.pt, .pth, .bin) of tensors alone, as "
        "torch.save(model.state_dict(), FILE) writes it"
    )


def _unwrapped(found: Any) -> Mapping[str, Any]:
    """The weights in what a file holds, by the names that timm's own reader knows, in its order."""
    if not isinstance(found, Mapping):
        return {}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found.get(key), Mapping):
            inner: Mapping[str, Any] = found[key]
            return inner
    return found


def _flat(found: Any, above: str = "") -> dict[str, Any]:
    """The tensors in nested dictionaries, by names that are joined by "/"."""
    if not isinstance(found, Mapping):
        return {above.removesuffix("/") or f"a {type(found).__name__}": found}
    flat = dict[str, Any]()
    for key, value in found.items():
        flat |= _flat(value, f"{above}{key}/") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def _reshaped(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs in shape, as a message has it."""
    both = ((key, found[key], expected[key]) for key in found if key in expected and isinstance(found[key], Tensor))
    return [f"{key} is {tuple(a.shape)}, expected {tuple(b.shape)}" for key, a, b in both if a.shape != b.shape]


def _misfit(
    checkpoint: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    error: object = "",
    *,
    missing: Sequence[str] | None = None,
) -> ValueError:
    """An error that names keys of the file and those that are expected."""
    absent = [key for key in expected if key not in found] if missing is None else list(missing)
    unknown = [key for key in found if key not in expected]
    parts = []
    if prefix := _prefix(found, expected):
        where, _, rest = prefix.rpartition("/")
        inside = f"the tensors in {where!r}" if where else "its tensors"
        without = f", without {rest!r} in front of the names" if rest else ""
        parts.append(f"its names begin with {prefix!r}; save {inside} to a file of their own{without}")
    if expected:
        parts.append(f"it has no {listed(absent)}" if absent else "")
        parts.append("; ".join(_reshaped(found, expected)[:_NAMED]))
    parts.append(f"it has {listed(unknown)}" + ", which the backbone has not" * bool(expected) if unknown else "")
    reason = "; ".join(part for part in parts if part) or " ".join(str(error).split())[:300]
    return ValueError(f"backbone.checkpoint={checkpoint!r} does not fit the backbone: {reason}")


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _prefix(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """What stands in front of most of the expected names in the file, of several the first; "" if nothing does."""
    counts = dict[str, int]()
    for key in found:
        cuts = [i + 1 for i, letter in enumerate(key) if letter in "./"]
        for cut in cuts:
            if key[cut:] in expected:
                counts[key[:cut]] = counts.get(key[:cut], 0) + 1
    best = max(counts, key=lambda prefix: counts[prefix], default="")
    return best if counts.get(best, 0) * 2 > len(expected) else ""
