"""config.json of an exported model: data from anyone, checked before a module or a tensor is made of it.

Shapes: N adaptor sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from grappa_dist.models.backbone import create_backbone
from grappa_dist.models.grappa import Grappa
from grappa_dist.storage import open_to_read
from grappa_dist.variants import MOST_STRENGTH, at_strength, split_strength

FORMAT = 1  # of an exported model
STRENGTH_FORMAT = 2  # of one with a strength of adaptation: earlier versions, which would not heed it, refuse it
CONFIG_FILE = "config.json"
DEMO_BACKBONE = "grappa_dist.demo.backbone:create"
_MOST_SETS, _WIDEST, _LARGEST_IMAGE = 4096, 2**16, 2**13
_SPARE = 1.01  # by which a model may be larger than its file: buffers that are computed

Name = Annotated[str, Field(min_length=1, max_length=300)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Backbone(_Strict):
    name: Name
    kwargs: dict[str, Any]
    pool: Literal["token", "avg", "map"] | None = None


class _Pixels(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")
    image_size: int = Field(ge=1, le=_LARGEST_IMAGE)
    resize: Literal["crop", "squash"]
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    crop_share: FiniteFloat = Field(gt=0, le=1)
    mean: list[FiniteFloat] = Field(min_length=3, max_length=3)
    std: list[Positive] = Field(min_length=3, max_length=3)


class _Sum(_Strict):
    bytes: int = Field(ge=0)
    xxh3: str | None = Field(max_length=64)


class _Config(_Strict):
    variant: Name
    sets: list[Name] = Field(max_length=_MOST_SETS)
    backbone: _Backbone
    pixels: _Pixels
    bottleneck: int = Field(ge=0, le=_WIDEST)
    attention: bool
    strength: FiniteFloat = Field(1.0, ge=0, le=MOST_STRENGTH)  # of adaptation, where it is not 1
    precision: Literal["fp32", "bf16"] = "fp32"  # in which its run computed; not in models of earlier versions
    galleries: dict[str, list[Annotated[FiniteFloat, Field(ge=0)]]] = Field(default_factory=dict)
    files: dict[str, _Sum] = Field(default_factory=dict)


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """The content of config.json once it is found to be what `export` writes.

    Raises:
        ValueError: it is of another version, or an entry of it is not as it is written.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is a {type(config).__name__}, expected an object")
    if config.get("format") not in (FORMAT, STRENGTH_FORMAT):
        known = f"{FORMAT} and {STRENGTH_FORMAT}"
        raise ValueError(f"{path}: format {config.get('format')!r}, this version reads {known}")
    try:
        found = _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}={first['input']!r:.80}: {first['msg']}") from None
    for name in found.files:
        if Path(name).name != name:
            raise ValueError(f"{path}: files={name!r:.80}: expected names of files in this folder")
    if "strength" in config and not found.sets:
        raise ValueError(f"{path}: strength={found.strength}: expected none, as the model has no adaptor sets")
    for task, weights in found.galleries.items():
        if len(weights) != len(found.sets) or not any(weights):
            raise ValueError(
                f"{path}: galleries.{task!r:.80}: expected {len(found.sets)} weights, of at least 0 and not all 0"
            )
    return config


def with_strength(config: Mapping[str, Any], strength: float) -> dict[str, Any]:
    """The content of config.json of the same model at a strength of adaptation."""
    variant = at_strength(split_strength(config["variant"])[0], strength)
    found = {**config, "format": FORMAT, "variant": variant}
    found.pop("strength", None)
    return found if strength == 1 else {**found, "format": STRENGTH_FORMAT, "strength": float(strength)}


def is_own_backbone(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether building this backbone runs no code but timm's and this package's, and reads no file that it names."""
    return name.startswith("timm:") or (name == DEMO_BACKBONE and not kwargs)


def check_size(weights: Path, config: Mapping[str, Any], pixels: Mapping[str, Any]) -> None:
    """Raises ValueError where the model of timm that config.json describes is larger than the weights beside it.

    It is built without memory first: a few bytes of config.json could else ask for any amount.

    Args:
        weights: the file, model.safetensors.
    """
    given = config["backbone"]
    name, kwargs = given["name"], given["kwargs"]
    sizes = list(_sizes(weights))
    where = f"{weights.with_name(CONFIG_FILE)}: the model that it describes is larger than {weights.name} beside it"
    for number in _numbers(kwargs):
        if abs(number) > max(sum(sizes), _LARGEST_IMAGE) or not number == number:
            raise ValueError(f"{where}: backbone.kwargs has {number}")
    if not name.startswith("timm:"):
        return
    if isinstance(depth := kwargs.get("depth", 0), int) and depth > len(sizes):
        raise ValueError(f"{where}: backbone.kwargs.depth={depth}, and the file has {len(sizes)} tensors")
    with torch.device("meta"):
        backbone = create_backbone(name, kwargs, pixels, pretrained=False, pool=given.get("pool"))
        model = Grappa(backbone, len(config["sets"]), config["bottleneck"], attention=config["attention"])
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    if needed > _SPARE * sum(sizes):
        raise ValueError(f"{where}: {needed:,} numbers, the file has {sum(sizes):,}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in arguments, within lists and objects too."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _sizes(path: Path) -> Iterator[int]:
    """How many numbers each tensor of a safetensors file has, by its header alone."""
    from safetensors import SafetensorError, safe_open

    open_to_read(path).close()  # says why it cannot be read
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                count = 1
                for side in file.get_slice(name).get_shape():
                    count *= side
                yield count
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file: {error}") from None
