"""Which model a stage runs: a small description that is sent to workers, and the model that they build from it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, numbered
from grappa_dist.checksums import MANIFEST, compare, damaged, read_manifest, verified
from grappa_dist.config import BackboneConfig, fingerprint
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.worker import release_memory
from grappa_dist.files import Sum, read_bytes, read_json, read_tensors, save_tensors
from grappa_dist.files import replace as replace_file
from grappa_dist.models import Backbone, Grappa, check_image_size, create_backbone
from grappa_dist.models.backbone import check_name, check_weights, source_of
from grappa_dist.models.grappa import check_strength
from grappa_dist.models.model_config import CONFIG_FILE, check_config, check_size, is_own_backbone, with_strength
from grappa_dist.models.precision import Precision
from grappa_dist.models.shared_backbone import SharedBackbone
from grappa_dist.models.weights import check_weights_file, load_tensors
from grappa_dist.storage import open_to_read, open_to_write
from grappa_dist.variants import at_strength, split_strength

ADAPTORS_FILE, FUSION_FILE = "adaptors.safetensors", "grappa.safetensors"
WEIGHTS_FILE = "model.safetensors"
MODULES_FILE = "modules.json"  # in the index folder of a run


@dataclass(frozen=True)
class ModelSpec:
    """The frozen backbone; with adaptor sets; with adaptor sets and their fusion; or an exported model."""

    name: str  # as in the report: backbone, k=64, average, ...
    backbone: BackboneConfig
    bottleneck: int = 0
    adaptors: tuple[Artifact, ...] = ()
    fusion: Artifact | None = None  # None with several sets: their average
    random_sets: int = 0  # randomly initialised sets, trained with the fusion and saved with it, not in `adaptors`
    galleries: Artifact | None = None  # weights of the sets for the images of each task
    exported: Path | None = None  # directory of an exported model, in place of the artefacts
    weights_sha256: str = ""  # of an exported model, its identity: `identity_of`
    set_weights: tuple[float, ...] = ()  # of the exported model, where not as exported
    trusted: bool = False  # whether the module that an exported model names may be imported
    strength: float = 1.0  # of adaptation: `Grappa.set_strength`

    @property
    def inputs(self) -> dict[str, Artifact | str]:
        more = {"fusion": self.fusion, "galleries": self.galleries, "weights": self.weights_sha256}
        more["weighed"] = json.dumps(self.set_weights) if self.set_weights else ""
        more["strength"] = "" if self.strength == 1 else str(self.strength)
        return {**numbered("adaptors", self.adaptors), **{name: given for name, given in more.items() if given}}

    @property
    def sets(self) -> list[str]:
        """Names of the adaptor sets: of their partitions, or numbers for randomly initialised sets."""
        random = [f"random {number}" for number in range(1, self.random_sets + 1)]
        return random or [artifact.kind.removeprefix("adaptors/") for artifact in self.adaptors]

    def at(self, strength: float) -> ModelSpec:
        """The same model at a strength of adaptation.

        Raises:
            ValueError: it is not in [0, 4], or there are no adaptor sets.
        """
        check_strength(strength, len(self.sets))
        return replace(self, name=at_strength(split_strength(self.name)[0], strength), strength=float(strength))

    @property
    def has_attention(self) -> bool:
        """Whether there is a learned attention; a single set has none."""
        return self.fusion is not None and self.random_sets != 1

    @property
    def weights_vary(self) -> bool:
        """Whether the weights of the sets depend on the image, by attention or by its gallery."""
        return self.has_attention or self.galleries is not None


def backbone_settings(config: BackboneConfig) -> dict[str, Any]:
    """What identifies the backbone: its settings, and the hashes of a checkpoint file and of a user's own module.

    Raises:
        ValueError: the checkpoint or the module is not there.
    """
    settings = config.model_dump(mode="json", exclude={"checkpoint", "precision"})
    if config.computes_in != "fp32":  # artefacts were named before there was another precision
        settings["precision"] = config.computes_in
    if not config.name.startswith("timm:"):
        source = source_of(config.name)
        settings["source_sha256"] = _sha256(source, os.stat(source).st_mtime_ns)
    if config.checkpoint:
        if not Path(config.checkpoint).is_file():
            raise ValueError(f"backbone.checkpoint={config.checkpoint!r} does not exist")
        settings["checkpoint_sha256"] = _sha256(config.checkpoint, Path(config.checkpoint).stat().st_mtime_ns)
    return settings


@lru_cache
def _sha256(path: str, mtime_ns: int) -> str:
    """A file's hash, computed once for the names of many artefacts."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_backbone(config: BackboneConfig, *, pretrained: bool = True) -> Backbone:
    """The frozen ViT of a config, in its precision.

    Raises:
        ValueError: it cannot be built, or does not take images of that size.
    """
    overrides = config.model_dump(include={field.name for field in fields(Preprocess)}, exclude_none=True)
    backbone = create_backbone(
        config.name, config.kwargs, overrides, checkpoint=config.checkpoint, pretrained=pretrained, pool=config.pool
    )
    check_image_size(backbone, config.name, config.kwargs)
    return backbone.compute_in(config.computes_in)


def check_checkpoint(config: BackboneConfig) -> tuple[str, ...]:
    """Checks a checkpoint as far as that takes no module of a user's own; remarks on it.

    Raises:
        ValueError: it does not exist, holds no weights, or those of another model of timm.
    """
    if config.checkpoint is None:
        return ()
    if config.name.startswith("timm:"):
        return build_backbone(config).remarks
    check_weights_file(config.checkpoint)
    return ()


def check_ready(config: BackboneConfig) -> None:
    """Checks that the weights can be had before workers start, where these run on this machine.

    Raises:
        ValueError: they are not in the cache and cannot be downloaded.
    """
    if config.checkpoint is None and not os.environ.get("RAY_ADDRESS"):  # other machines have other caches
        check_name(config.name)
        check_weights(config.name)


def build(spec: ModelSpec, device: torch.device) -> nn.Module:
    """The model of a description, frozen, on the device; an exported one folded, as its weights are final."""
    if spec.exported is not None:
        exported, _ = load_grappa(spec.exported, trust_modules=spec.trusted, precision=spec.backbone.computes_in)
        exported.requires_grad_(False).eval()
        if spec.set_weights:
            exported.weigh(torch.tensor(spec.set_weights))
        if exported.num_sets:
            exported.set_strength(spec.strength)
        exported.fold()
        return exported.to(device)
    backbone = build_backbone(spec.backbone)
    if not spec.sets:
        return backbone.to(device)
    return _filled(Grappa(backbone, len(spec.sets), spec.bottleneck, attention=spec.has_attention), spec, device)


def _filled(
    model: Grappa,
    spec: ModelSpec,
    device: torch.device,
    *,
    same_sets: Grappa | None = None,
    same_fusion: Grappa | None = None,
) -> Grappa:
    """The model with its trained weights, frozen, on the device.

    Args:
        same_sets: one that holds the same adaptor sets there; they are not held twice.
        same_fusion: one that holds the same fusion there, likewise.
    """
    if same_sets is not None:
        for layer, other in zip(model.layers, same_sets.layers, strict=True):
            layer.adaptors = other.adaptors
    elif spec.sets:
        model.load_adaptors(_load_sets(spec))
    if same_fusion is not None:
        for layer, other in zip(model.layers, same_fusion.layers, strict=True):
            layer.attention = other.attention
    elif spec.fusion:
        model.load_attention(load_weights(spec.fusion.path / FUSION_FILE))
    if spec.sets:
        model.set_strength(spec.strength)
    return model.requires_grad_(False).eval().to(device)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Trained tensors of an artefact.

    Raises:
        DamagedArtifact: the file is not what was written, or has a number that is not finite.
    """
    try:
        tensors: dict[str, Tensor] = read_tensors(verified(path))
    except SafetensorError as error:
        raise damaged(path, f"is no safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise damaged(path, f"has numbers in {name} that are not finite")
    return tensors


def _load_sets(spec: ModelSpec) -> list[dict[str, Tensor]]:
    if not spec.random_sets or spec.fusion is None:
        return [load_weights(a.path / ADAPTORS_FILE) for a in spec.adaptors]
    sets: list[dict[str, Tensor]] = [{} for _ in range(spec.random_sets)]
    for name, tensor in load_weights(spec.fusion.path / ADAPTORS_FILE).items():
        _, index, rest = name.split(".", 2)
        sets[int(index)][rest] = tensor
    return sets


def save_random_sets(model: Grappa, folder: Path) -> None:
    """Writes all sets of a model to one file, for `ModelSpec.random_sets`."""
    tensors = {
        f"sets.{index}.{name}": tensor
        for index in range(model.layers[0].adaptors.num_sets)
        for name, tensor in model.adaptor_tensors(index).items()
    }
    save_tensors(folder / ADAPTORS_FILE, tensors)


def exported_spec(
    run_or_model_dir: Path,
    gallery: str | None = None,
    *,
    trust_modules: bool | None = None,
    precision: Precision | None = None,
    strength: float | None = None,
) -> ModelSpec:
    """The description of an exported model.

    Args:
        gallery: the task of the run whose set weights are used; None: as exported, which is the average for the variant
            `gallery`.
        trust_modules, precision, strength: as for `load_grappa`.

    Raises:
        ValueError: the directory holds no model, one of an unknown format, one that names a module which is not
            trusted, or one without weights for that gallery or without adaptor sets for that strength.
    """
    folder, config = exported_config(run_or_model_dir)
    check_trust(run_or_model_dir, config["backbone"], trust_modules)
    computes_in = precision or config.get("precision", "fp32")
    backbone = BackboneConfig(
        name=config["backbone"]["name"], kwargs=config["backbone"]["kwargs"], precision=computes_in
    )
    path = _whole(folder, WEIGHTS_FILE, config)
    if strength is not None:
        check_strength(strength, len(config["sets"]))
        config = with_strength(config, strength)
    at = config.get("strength", 1.0)
    weights = identity_of(_sha256(str(path), path.stat().st_mtime_ns), computes_in, at)
    return ModelSpec(
        config["variant"],
        backbone,
        exported=folder.resolve(),
        weights_sha256=weights,
        set_weights=_set_weights(folder, config, gallery),
        trusted=True,
        strength=at,
    )


def _set_weights(folder: Path, config: Mapping[str, Any], gallery: str | None) -> tuple[float, ...]:
    """The weights of the sets for a gallery, if one is named; raises ValueError where the model has none for it."""
    galleries: dict[str, list[float]] = config.get("galleries", {})
    if gallery is not None and gallery not in galleries:
        raise ValueError(
            f"{folder} has no weights for the gallery {gallery!r}; it has {', '.join(galleries) or 'none'}"
        )
    return tuple(galleries[gallery]) if gallery is not None else ()


def identity_of(weights_sha256: str, precision: Precision, strength: float = 1.0) -> str:
    """What tells apart models whose features are not to be mixed: the hash of the weights or, of these with precision
    and strength of adaptation, as far as they are not fp32 and 1."""
    more = ([precision] if precision != "fp32" else []) + ([f"strength {strength}"] if strength != 1 else [])
    return hashlib.sha256(" ".join([weights_sha256, *more]).encode()).hexdigest() if more else weights_sha256


def exported_config(run_or_model_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of an exported model, given that or its run's, and the content of its config.json.

    Raises:
        ValueError: the directory holds no model, one of an unknown format, or one whose config.json was damaged.
    """
    folder = run_or_model_dir
    folder = folder / "model" if (folder / "model" / CONFIG_FILE).is_file() else folder
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run_or_model_dir} holds no model: expected {CONFIG_FILE}, or model/{CONFIG_FILE} of a finished run"
        )
    return folder, check_config(read_json(_whole(folder, CONFIG_FILE)), folder / CONFIG_FILE)


def _whole(folder: Path, name: str, config: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """The path of a file of an exported model, once it is found to hold what was written.

    Its checksum is in manifest.json, or where that was not copied along in config.json. Models that were exported
    before there were checksums are taken as they are.

    Raises:
        ValueError: the file is damaged or missing.
    """
    manifest, path = folder / MANIFEST, folder / name
    if manifest.is_file():
        files = read_manifest(read_bytes(manifest), manifest)
    else:
        files = {file: Sum(**found) for file, found in config.get("files", {}).items()}
    if name in files and (why := compare(path, files[name])):
        raise ValueError(
            f"{path} {why}: the model is damaged. Copy it again from where it was exported, or run the command of its "
            f"run directory again, which makes it anew (if {name} was changed on purpose, remove {manifest})"
        )
    return path


def check_trust(run_or_model_dir: Path, backbone: Mapping[str, Any], trust_modules: bool | None) -> None:
    """Raises ValueError where a model names a module that would be imported, and so run, without its caller's word.

    A model directory is data, which may come from anyone. In a run directory that module is trusted which a run of
    this user imported there, as `note_module` has noted it.
    """
    name = backbone["name"]
    trusted = is_own_backbone(name, backbone["kwargs"]) or trust_modules
    if trust_modules is None and not trusted:
        trusted = _of_module(name, backbone["kwargs"]) in _noted(_run_of(run_or_model_dir) / "index" / MODULES_FILE)
    if not trusted:
        raise ValueError(
            f"the model of {run_or_model_dir} names the backbone {name}: that module would be imported and run. If you "
            "trust whoever wrote the model, load it with --trust-modules, or trust_modules=True in Python"
        )


def _run_of(root: Path) -> Path:
    """The run whose model is loaded; a folder of runs of several seeds links that of the first, `seed-0/model`."""
    link = root / "model"
    target = Path(os.readlink(link)) if link.is_symlink() else Path()
    return root / target.parent if target.name == "model" else root


def note_module(index: Path, config: BackboneConfig) -> None:
    """Notes in the index folder of a run that it imports the module of its backbone.

    The note holds the number of its own file (inode): in a copy, or unpacked from an archive of someone else, it is
    void. Mirrors do not have it.
    """
    path, own = index / MODULES_FILE, _of_module(config.name, config.kwargs)
    known = _noted(path)
    if is_own_backbone(config.name, config.kwargs) or own in known:
        return

    def write(temporary: Path) -> None:
        with open_to_write(temporary) as file:
            note = {"inode": os.fstat(file.fileno()).st_ino, "modules": sorted({*known, own})}
            file.write(json.dumps(note).encode())

    replace_file(path, write)
    path.chmod(0o600)


def _of_module(name: str, kwargs: Mapping[str, Any]) -> str:
    return fingerprint({"name": name, "kwargs": dict(kwargs)})


def _noted(path: Path) -> set[str]:
    """The modules in a note that a process of this user wrote, and that nobody else can have changed."""
    try:
        found, note = path.lstat(), read_json(path)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        return set(note["modules"]) if private and note["inode"] == found.st_ino else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def load_grappa(
    run_or_model_dir: Path,
    *,
    trust_modules: bool | None = None,
    precision: Precision | None = None,
    strength: float | None = None,
) -> tuple[Grappa, dict[str, Any]]:
    """An exported model with its weights, and the content of its config.json.

    Args:
        trust_modules: whether the module of a backbone `module:function` may be imported; None: only in a run directory
            where a run of the same user imported it.
        precision: in which it computes; None: as in its run, on any device.
        strength: of adaptation, in [0, 4]; None: as exported.

    Raises:
        ValueError: the directory holds no model, one of an unknown format, one that names a module which is not
            trusted, or a file of it is damaged; or that is no strength, or the model has no adaptor sets.
    """
    folder, config = exported_config(run_or_model_dir)
    check_trust(run_or_model_dir, config["backbone"], trust_modules)
    pixels = {name: tuple(value) if isinstance(value, list) else value for name, value in config["pixels"].items()}
    path = _whole(folder, WEIGHTS_FILE, config)
    check_size(path, config, pixels)
    given = config["backbone"]
    backbone = create_backbone(given["name"], given["kwargs"], pixels, pretrained=False, pool=given.get("pool"))
    grappa = Grappa(backbone, len(config["sets"]), config["bottleneck"], attention=config["attention"])
    _load_all(grappa, path, given["name"])
    backbone.compute_in(precision or config.get("precision", "fp32"))
    if strength is not None or "strength" in config:
        grappa.set_strength(config["strength"] if strength is None else strength)
    return grappa, config


def _load_all(grappa: Grappa, path: Path, name: str) -> None:
    """Loads the weights of a model; raises ValueError where they are not those of this one.

    Args:
        name: of the backbone.
    """
    tensors = read_tensors(path)
    try:
        missing, unexpected = load_tensors(grappa, tensors)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"{path} is of another model than {name} builds here: {' '.join(str(error).split())}"
        ) from error
    if missing or unexpected:
        raise ValueError(
            f"{path} is of another model than {name} builds here: it lacks {', '.join(missing[:3]) or 'nothing'} and "
            f"has {', '.join(unexpected[:3]) or 'nothing'} beside"
        )


class _Models:
    """Models of one frozen backbone on one device, each built when it is first asked for."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.shared = SharedBackbone(build_backbone(spec.backbone).to(device))
        self._device, self._built = device, dict[Any, Grappa]()

    def of(self, spec: ModelSpec) -> Grappa:
        sets = (spec.bottleneck, spec.adaptors, spec.random_sets, spec.fusion if spec.random_sets else None)
        key = (sets, spec.fusion, spec.galleries, spec.strength)  # a gallery's model is weighed
        if key not in self._built:
            model = self.shared.model(len(spec.sets), spec.bottleneck, attention=spec.has_attention)
            same_sets = next((found for held, found in self._built.items() if held[0] == sets), None)
            same_fusion = next((found for held, found in self._built.items() if held[:2] == key[:2]), None)
            self._built[key] = _filled(model, spec, self._device, same_sets=same_sets, same_fusion=same_fusion)
        return self._built[key]


_latest: dict[tuple[Any, ...], _Models | nn.Module] = {}


def cached_model(spec: ModelSpec, device: torch.device) -> nn.Module:
    """As `build`, from what is kept: a worker embeds many shards with one model.

    Kept are the models of one backbone, which hold its weights and every adaptor set once, or one exported model.
    """
    if spec.exported is None:
        return _models_of(spec, device).of(spec)
    key = (spec.backbone.model_dump_json(), spec.weights_sha256, spec.set_weights, str(device))
    if key not in _latest:
        release_cached_model()
        _latest[key] = build(spec, device)
    found = _latest[key]
    assert isinstance(found, nn.Module)
    return found


def cached_side_by_side(
    specs: Sequence[ModelSpec], device: torch.device
) -> tuple[dict[str, nn.Module], Callable[[Sequence[nn.Module], Tensor], list[Tensor]]]:
    """Models of the same backbone by name, kept as `cached_model` keeps them, and what runs some of them on the same
    images: see `SharedBackbone.side_by_side`."""
    models = _models_of(specs[0], device)
    return {spec.name: models.of(spec) for spec in specs}, models.shared.side_by_side


def _models_of(spec: ModelSpec, device: torch.device) -> _Models:
    key = (spec.backbone.model_dump_json(), str(device))
    if key not in _latest:
        release_cached_model()
        _latest[key] = _Models(spec, device)
    found = _latest[key]
    assert isinstance(found, _Models)
    return found


def release_cached_model() -> None:
    """Releases the memory of the models that `cached_model` keeps."""
    if _latest:
        _latest.clear()
        release_memory()  # some backbones hold references to themselves


def preprocess_of(model: nn.Module) -> Preprocess:
    """The preprocessing of images for a model of `build`."""
    return backbone_of(model).preprocess


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model of `build`, its blocks wrapped if it has adaptors."""
    backbone = model.backbone if isinstance(model, Grappa) else model
    assert isinstance(backbone, Backbone)
    return backbone
