"""Any model by its name: a run directory, an exported model, or a backbone without adaptors; on a device.

Shapes: N adaptor sets, D channels.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.config import BackboneConfig, read
from grappa_dist.export import RetrievalModel, load_model
from grappa_dist.models import Backbone, Grappa
from grappa_dist.models.backbone import check_name
from grappa_dist.models.grappa import GrappaLayer
from grappa_dist.models.precision import Precision
from grappa_dist.models.spec import backbone_of, build_backbone, exported_spec, preprocess_of

OWN_BACKBONE = "backbone"  # the word for the backbone of a model that has adaptors
_BACKBONE_NAME = re.compile(r"[A-Za-z_][\w.]*:[\w.-]+")  # timm:<model> or <module>:<function>
_PRECISION = "backbone.precision="
Named = str | Path | nn.Module  # what a caller may give as a model


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to embed images."""

    name: str  # as the caller called it
    variant: str  # "average", "neighbours", ...; "backbone" without adaptors
    model: nn.Module = field(repr=False)  # a Backbone or a Grappa, frozen, on its device
    sha256: str  # of its weights, and of its precision where that is not fp32
    sets: tuple[str, ...] = ()  # names of the adaptor sets, (N,); none without adaptors
    galleries: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # weights (N,) of its sets, by task
    gallery: str | None = None  # the one whose weights are set

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def precision(self) -> Precision:
        return backbone_of(self.model).precision

    @property
    def has_adaptors(self) -> bool:
        return isinstance(self.model, Grappa) and any(isinstance(b, GrappaLayer) for b in self.model.backbone.blocks)

    def describe(self) -> str:
        """For messages: the name, which of a run's models it is, and the beginning of its `sha256`."""
        what = f"{self.variant}{f', gallery {self.gallery}' if self.gallery else ''}"
        what += "" if self.precision == "fp32" else f", {self.precision}"
        return f"{self.name} ({what}, sha256 {self.sha256[:12]})"

    def weigh(self, task: str) -> None:
        """Sets the weights of the adaptor sets that the run found for a task; where it found none, those of none."""
        if self.gallery is None and self.galleries and isinstance(self.model, Grappa):
            self.model.weigh(self.galleries.get(task))
            self.model.fold()

    def backbone(self) -> OpenModel:
        """The same backbone without adaptors, on the same device."""
        if not isinstance(self.model, Grappa) or not self.has_adaptors:
            return self
        bare = copy.deepcopy(self.model.backbone)
        for place, layer in enumerate(list(bare.blocks)):
            bare.blocks[place] = layer.block
        return OpenModel(f"the backbone of {self.name}", OWN_BACKBONE, bare, _sha256_of(bare))


def open_model(
    given: Named,
    device: str = "auto",
    *,
    gallery: str | None = None,
    strength: float | None = None,
    settings: Iterable[str] = (),
    trust_modules: bool | None = None,
) -> OpenModel:
    """The model that a name stands for.

    Args:
        given: a run directory, that of an exported model, `timm:<model>`, `<module>:<function>`, or a model in memory:
            what `load_model` returns, or a `Backbone`, which are used where they are.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<number>".
        gallery: of a model of the variant `gallery`: the task whose weights of the sets are used.
        strength: of adaptation, in [0, 4], of a model in a folder; None: as exported.
        settings: `backbone.key=value`, as of a run, of a named backbone; of a model with its own, the precision alone.
        trust_modules: as for `load_model`; a module that is named here itself is imported.

    Raises:
        ValueError: there is no such model, or no such device, or settings are given for a model that has its own; the
            message says what would be right.
    """
    where = device_of(device)
    _check_folder(given, strength)
    if is_backbone(given):
        return _bare(str(given), settings, where)
    precision = _precision_of(given, settings)
    if isinstance(given, nn.Module):
        return _in_memory(given)
    text, folder = str(given), Path(str(given)).expanduser()
    how: dict[str, Any] = {"trust_modules": trust_modules, "precision": precision, "strength": strength}
    spec, model = exported_spec(folder, gallery, **how), load_model(folder, **how)
    if gallery is not None:
        model.weigh(model.galleries[gallery])
    grappa, sets = model.grappa.to(where), tuple(model.sets)
    return OpenModel(text, spec.name, grappa, spec.weights_sha256, sets, model.galleries, gallery)


def _check_folder(given: Named, strength: float | None) -> None:
    """Raises ValueError for a name that is no folder and nothing else, or a strength for what is no folder."""
    if is_backbone(given) or isinstance(given, nn.Module):
        if strength is not None:
            what = f"a {type(given).__name__} in memory" if isinstance(given, nn.Module) else f"the backbone {given}"
            raise ValueError(f"strength={strength}: is of a model in a folder, which has adaptor sets; this is {what}")
    elif not Path(given).expanduser().is_dir():
        raise ValueError(
            f"{given}: is no folder; expected a run directory, an exported model's, timm:<model> or <module>:<function>"
        )


def open_models(
    model: Named,
    against: Named | None,
    device: str = "auto",
    *,
    gallery: str | None = None,
    strength: float | None = None,
    settings: Iterable[str] = (),
    trust_modules: bool | None = None,
) -> dict[str, OpenModel]:
    """A model, and the one that it is compared with, by what they are called; the model alone where there is no other.

    Args:
        against: as `model`; "backbone": the model's own, if it has adaptors; None: nothing.
        gallery, strength: of the model, as of `open_model`, as are the others; settings are those of each backbone that
            is named.

    Raises:
        ValueError: as of `open_model`.
    """
    mine, theirs = _settings_of_each(tuple(settings), model, against)
    first: dict[str, Any] = {"gallery": gallery, "strength": strength, "settings": mine}
    opened = open_model(model, device, trust_modules=trust_modules, **first)
    own = isinstance(against, str) and against == OWN_BACKBONE
    if against is None or (own and not opened.has_adaptors):
        return {opened.variant: opened}
    other = opened.backbone() if own else open_model(against, device, settings=theirs, trust_modules=trust_modules)
    return dict(zip(_called(opened, other, own=own), (opened, other), strict=True))


def _settings_of_each(
    settings: tuple[str, ...], model: Named, against: Named | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings for each model: for those that are named backbones; else for the first, which refuses them. The
    precision is for both, but for a model in memory."""
    if against is None or isinstance(against, nn.Module) or str(against) == OWN_BACKBONE:
        return settings, ()
    common = tuple(setting for setting in settings if setting.startswith(_PRECISION))
    if not is_backbone(against):
        return settings, common
    if is_backbone(model):
        return settings, settings
    return () if isinstance(model, nn.Module) else common, settings


def _called(model: OpenModel, other: OpenModel, *, own: bool) -> tuple[str, str]:
    """Two different names: of the variants, else as the caller named them, else with numbers.

    Args:
        own: whether the other is the model's own backbone, which alone is called so.
    """
    variant = other.variant if own or other.has_adaptors or not model.has_adaptors else other.name
    for names in ((model.variant, variant), (model.name, other.name)):
        if names[0] != names[1]:
            return names
    return f"{model.name} (1)", f"{other.name} (2)"


def is_backbone(given: Named) -> bool:
    """Whether this names a backbone, which takes settings, and no model that has its own."""
    return not isinstance(given, nn.Module) and bool(_BACKBONE_NAME.fullmatch(str(given))) and not Path(given).exists()


def _precision_of(given: Named, settings: Iterable[str]) -> Precision | None:
    """The precision that is asked for of a model with settings of its own; None, also for `auto`: its own.

    Raises:
        ValueError: there are other settings, or the model is in memory.
    """
    settings, in_memory = list(settings), isinstance(given, nn.Module)
    asked = [] if in_memory else [setting for setting in settings if setting.startswith(_PRECISION)]
    if needless := " ".join(setting for setting in settings if setting not in asked):
        what = f"a {type(given).__name__}" if isinstance(given, nn.Module) else given
        raise ValueError(
            f"{needless}: settings are for a backbone that is named, such as timm:<model>; {what} has its own "
            "(a file whose name has a '=' is written with ./ before it)"
        )
    found = _backbone_config("timm:any", asked).precision
    return None if found == "auto" else found


def _bare(name: str, settings: Iterable[str], device: torch.device) -> OpenModel:
    for setting in settings:
        if not setting.startswith("backbone.") or setting.startswith("backbone.name"):
            raise ValueError(f"{setting}: expected settings of the backbone, such as backbone.image_size=224")
    config = _backbone_config(name, settings)
    check_name(name, config.kwargs)
    bare = build_backbone(config).to(device)
    return OpenModel(name, OWN_BACKBONE, bare, _sha256_of(bare))


def _backbone_config(name: str, settings: Iterable[str]) -> BackboneConfig:
    return read({"name": "model", "data": {"train": ("none",)}, "backbone": {"name": name}}, settings).backbone


def device_of(name: str) -> torch.device:
    """The device of a name; "auto": a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
    if name not in known:
        raise ValueError(f"device {name!r}: this machine has {', '.join(known)}; expected one of them, or auto")
    return torch.device(name)


def _in_memory(model: nn.Module) -> OpenModel:
    inner = model.grappa if isinstance(model, RetrievalModel) else model
    if not isinstance(inner, Backbone | Grappa):
        raise ValueError(
            f"a {type(model).__name__} is given as a model; expected what grappa_dist.load_model returns, or its path"
        )
    galleries = model.galleries if isinstance(model, RetrievalModel) else {}
    sets = tuple(model.sets) if isinstance(model, RetrievalModel) else ()
    variant = "adapted" if isinstance(inner, Grappa) else OWN_BACKBONE
    return OpenModel(f"a {type(model).__name__}", variant, inner.eval(), _sha256_of(inner), sets, galleries)


def _sha256_of(model: nn.Module) -> str:
    """A hash of the weights, of a strength that is not 1, and of what images become before the model sees them."""
    digest = hashlib.sha256(repr(sorted(asdict(preprocess_of(model)).items())).encode())
    if isinstance(model, Grappa) and model.strength != 1:
        digest.update(f"strength {model.strength}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
