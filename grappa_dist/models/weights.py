"""Weights in files: a backbone's own, with what is said of a file of something else; and those of a whole model."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grappa_dist.console import pluralize
from grappa_dist.files import read_tensors
from grappa_dist.storage import open_to_read

# What loading a file of something else, or of another model's weights, raises
_MISFITS = (RuntimeError, LookupError, EOFError, TypeError, AttributeError, pickle.UnpicklingError, SafetensorError)
_NAMED = 3  # keys that a message lists
_PATCHES = "patch_embed.proj.weight"  # in timm's ViTs
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OF_TRAINING = re.compile("head|classifier|decoder|mask|^fc$")  # in the first part of a name


def load_own(model: nn.Module, path: str) -> None:
    """Fills a user's own module with a file of its state dict.

    Raises:
        ValueError: the file is of something else, or of another model.
    """
    weights, expected, whose = _read(path), model.state_dict(), f"backbone.checkpoint={path!r} does"
    if not (isinstance(weights, Mapping) and weights and all(isinstance(t, Tensor) for t in weights.values())):
        raise _misfit(whose, _flat(weights), expected)
    try:
        missing, unexpected = load_tensors(model, weights)
    except _MISFITS as error:
        raise _misfit(whose, weights, expected, error) from error
    if missing or unexpected or _reshaped(weights, expected):
        raise _misfit(whose, weights, expected, missing=missing)


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


def timm_with_weights(name: str, kwargs: Mapping[str, Any], checkpoint: str | None) -> tuple[nn.Module, list[str]]:
    """A timm model with the weights of a file, else with its own, as timm renames and resizes them; and remarks.

    Raises:
        ValueError: the file is of something else, or the weights are of another model, which timm itself accepts
            wherever it drops a classifier.
    """
    import timm

    found: Any = _read(checkpoint) if checkpoint else {}
    weights = dict(timm.models.clean_state_dict(dict(_unwrapped(found))))
    if checkpoint and not weights:
        raise _unreadable(checkpoint, "it holds no tensors")
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"state_dict": dict(weights)}} if checkpoint else {}
    whose = f"backbone.checkpoint={checkpoint!r} does" if checkpoint else f"the weights of backbone.name=timm:{name} do"
    with torch.device("meta"):
        expected = (empty := timm.create_model(name, pretrained=False, num_classes=0, **kwargs)).state_dict()
    with torch.random.fork_rng(devices=()), _watched_loading(type(empty)) as loading:
        try:
            model: Any = timm.create_model(name, pretrained=True, num_classes=0, **overlay, **kwargs)
        except _MISFITS as error:
            if not loading.given and not checkpoint:  # there was nothing to load
                raise
            raise _misfit(whose, _flat(found) or loading.given, expected, error) from error
    if checkpoint:
        del model.pretrained_cfg["state_dict"]  # a copy of all weights
    if loading.missing:
        raise _misfit(whose, _flat(found) or loading.given, expected, missing=loading.missing)
    cut_off = [key for key in loading.unexpected if "depth" in kwargs and _block(key) >= kwargs["depth"]]
    foreign = [key for key in loading.unexpected if key not in cut_off and _is_of_backbone(key, model)]
    differs = _reshaped(loading.given, expected) or _sides(weights) not in ((), _sides(expected))
    if foreign or differs:
        raise _misfit(whose, weights or loading.given, expected, missing=(), unknown=foreign)
    loaded: nn.Module = model
    return loaded, list(_remarks(str(checkpoint), weights, expected, loading.unexpected)) if checkpoint else []


@dataclass
class _Loading:
    """What timm gave a model to load, once it had renamed and resized weights, and what did not fit."""

    given: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()


@contextmanager
def _watched_loading(kind: type[nn.Module]) -> Iterator[_Loading]:
    """Notes what does not fit while models of a class are filled: timm tells its log and nobody else."""
    loading, plain = _Loading(), kind.load_state_dict

    def load(self: nn.Module, state: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        loading.given = state
        found = plain(self, state, strict=False)
        loading.missing, loading.unexpected = found
        return type(found)([], [])

    of_class = vars(kind).get("load_state_dict")
    kind.load_state_dict = load  # type: ignore[method-assign, assignment]
    try:
        yield loading
    finally:
        if of_class is None:
            del kind.load_state_dict
        else:
            kind.load_state_dict = of_class  # type: ignore[method-assign]


def _is_of_backbone(key: str, model: nn.Module) -> bool:
    """Whether a name that a model has not shows weights of another one: a further block, norm or token.

    Heads, decoders and mask tokens belong to a training.
    """
    top, _, rest = key.partition(".")
    return not _OF_TRAINING.search(top) and (not rest or top in dict(model.named_children()))


def _sides(tensors: Mapping[str, Any]) -> tuple[int, ...]:
    """The sides of a patch in pixels, by timm's names; () if they are not to be seen."""
    patches = tensors.get(_PATCHES)
    return tuple(patches.shape[2:]) if isinstance(patches, Tensor) and patches.ndim == 4 else ()


def _remarks(
    checkpoint: str, weights: Mapping[str, Any], expected: Mapping[str, Tensor], unused: Sequence[str]
) -> Iterator[str]:
    """What is accepted of a file, and should be known."""
    if unused:
        yield f"backbone.checkpoint={checkpoint!r} has {listed(unused)}, which the backbone has not: not used"
    positions = (weights.get("pos_embed"), expected.get("pos_embed"))
    found, wanted = (tuple(p.shape) if isinstance(p, Tensor) else None for p in positions)
    if found and wanted and found != wanted:
        yield (
            f"backbone.checkpoint={checkpoint!r} has positions for images of another size, which are resized: "
            f"pos_embed is {found}, here {wanted} (backbone.image_size is the size in pixels)"
        )


def check_weights_file(path: str) -> None:
    """Raises ValueError for a file that is not there, or holds no weights of any model."""
    found = _read(path)
    if not any(isinstance(tensor, Tensor) for tensor in _flat(found).values()):
        raise _unreadable(path, "it holds no tensors")


def _read(path: str) -> Any:
    """What a file of tensors holds, by its content and not by the end of its name."""
    if not Path(path).is_file():
        what = "is no file" if Path(path).exists() else "does not exist"
        raise ValueError(f"backbone.checkpoint={path!r} {what}")
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
    """What differs in shape or is no number of floating point, as a message has it."""
    both = ((key, found[key], expected[key]) for key in found if key in expected and isinstance(found[key], Tensor))
    shapes, types = list[str](), list[str]()
    for key, a, b in both:
        if a.shape != b.shape:
            shapes.append(f"{key} is {tuple(a.shape)}, expected {tuple(b.shape)}")
        elif b.is_floating_point() and not a.is_floating_point():
            types.append(f"{key} is {a.dtype}, expected torch.float32 or another floating point type")
    return [*shapes, *types]


def _misfit(
    whose: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    error: object = "",
    *,
    missing: Sequence[str] | None = None,
    unknown: Sequence[str] | None = None,
) -> ValueError:
    """An error that names keys of the file and those that are expected.

    Args:
        whose: how the sentence begins: what it is that "does" not fit.
        missing: names that nothing is loaded into; None: those expected that the file has not.
        unknown: names that show another model; None: those of the file that are not expected.
    """
    absent = [key for key in expected if key not in found] if missing is None else list(missing)
    beyond = [key for key in found if key not in expected] if unknown is None else list(unknown)
    parts = []
    if prefix := _prefix(found, expected):
        where, _, rest = prefix.rpartition("/")
        inside = f"the tensors in {where!r}" if where else "its tensors"
        without = f", without {rest!r} in front of the names" if rest else ""
        parts.append(f"its names begin with {prefix!r}; save {inside} to a file of their own{without}")
    elif _num_blocks(found) not in (0, _num_blocks(expected)):
        parts.append(f"it has {pluralize(_num_blocks(found), 'block')}, the backbone {_num_blocks(expected)}")
    if expected:
        parts.append(f"it has no {listed(absent)}" if absent else "")
        parts.append("; ".join(_reshaped(found, expected)[:_NAMED]))
    parts.append(f"it has {listed(beyond)}" + ", which the backbone has not" * bool(expected) if beyond else "")
    reason = "; ".join(part for part in parts if part) or " ".join(str(error).split())[:300]
    return ValueError(f"{whose} not fit the backbone: {reason}")


def _num_blocks(names: Iterable[str]) -> int:
    """How many blocks names as those of timm have; 0 where there are none."""
    return len({_block(name) for name in names} - {-1})


def _block(name: str) -> int:
    """The number of a block, in a name as those of timm; -1 if it is not of one."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else -1


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
