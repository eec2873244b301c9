"""A model of a run, or of an exported folder, in another format: written aside, compared with the model, then renamed.

What does not give the model's embeddings is never under the name that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from grappa_dist.checksums import MANIFEST
from grappa_dist.config import CONFIG_FILE as RUN_CONFIG
from grappa_dist.console import format_bytes, pluralize
from grappa_dist.export import RetrievalModel, load_model
from grappa_dist.files import Sum, make_folder, read_json, remove_folder, rename, save_tensors, sync, write_json
from grappa_dist.formats import exportable as exporting
from grappa_dist.formats import hub, onnx
from grappa_dist.formats.checking import CHECK_IMAGES, Check, Embed, check, images_to_check
from grappa_dist.formats.exportable import (
    DTYPES,
    Dtype,
    Exportable,
    describe_interface,
    describe_preprocess,
    trace,
)
from grappa_dist.models.model_config import CONFIG_FILE, with_strength
from grappa_dist.models.spec import WEIGHTS_FILE, check_trust, exported_config
from grappa_dist.models.weights import tensors_of

Format = Literal["onnx", "torch", "safetensors", "hub-folder"]
FORMATS: tuple[Format, ...] = get_args(Format)
FOLDERS = ("safetensors", "hub-folder")  # formats that load_model reads
RECORD = "export.json"  # in a folder; beside a file, its name and .json
_PACKAGES = {"onnx": onnx.PACKAGES, "torch": (), "safetensors": ("safetensors",), "hub-folder": ("safetensors",)}
Log = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be written of a model, and how it is checked."""

    to: Format
    name: str | None = None  # of a run's models, as in the table of scores; None: the one that the run exported
    dtype: Dtype = "fp32"
    gallery: str | None = None  # of the variant `gallery`: whose weights of the sets are written, for onnx and torch
    check_images: Sequence[str] = ()  # folders, lists or shards; none: generated images
    check_count: int = CHECK_IMAGES
    trust_modules: bool | None = None
    strength: float | None = None  # of adaptation; None: as exported


def convert(source: Path, out: Path, wanted: Wanted, log: Log = lambda line: None) -> Check:
    """Writes a model in a format, and beside or in it a record of what it is and how it was checked.

    Args:
        source: a run directory, or an exported model's; it is not changed.
        out: the file of onnx and torch, the folder of the others; nothing must be there.
        log: gets lines about what is done.

    Raises:
        ValueError: there is no such model, or it is not trusted; or the format cannot hold it; or the embeddings of
            what was written are not the model's. Then nothing is left at `out`.
    """
    _check_free(wanted, out)
    aside = out.with_name(f".{out.name}.partial")
    remove_folder(aside)
    make_folder(aside)
    try:
        folder = _model_folder(source, wanted, aside)
        model = _opened(folder, wanted, log)
        write = _write_folder if wanted.to in FOLDERS else _write_file
        return write(_Task(source, folder, model, wanted, log), aside, out)
    finally:
        remove_folder(aside)


@dataclass(frozen=True)
class _Task:
    source: Path  # as the user named it
    folder: Path  # of the exported model
    model: RetrievalModel
    wanted: Wanted
    log: Log

    @property
    def config(self) -> dict[str, Any]:
        return _config_of(self.folder, self.wanted)

    def compared(self, exported: Embed) -> Check:
        wanted = self.wanted
        images, source = images_to_check(wanted.check_images, wanted.check_count, self.model.transform)
        found = check(self.model, exported, images, source, wanted.dtype)
        self.log(f"check   {found.describe()}")
        return found

    def about(self) -> dict[str, Any]:
        """What every format records of the model."""
        config = self.config
        return {
            "variant": config["variant"],
            "sets": config["sets"],
            "gallery": self.wanted.gallery,
            "backbone": config["backbone"],
            "dtype": self.wanted.dtype,
            **({"strength": config["strength"]} if "strength" in config else {}),
            "preprocess": describe_preprocess(self.model.transform.preprocess),
            "versions": versions(_PACKAGES[self.wanted.to]),
        }


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of this package and of what made the file."""
    return {name: metadata.version(name) for name in ("grappa-dist", "torch", "timm", *more)}


def _model_folder(source: Path, wanted: Wanted, aside: Path) -> Path:
    """The exported model: that of the source, or one of its run's, written aside.

    Raises:
        ValueError: there is none of that name, or its backbone is a module that is not trusted.
    """
    if wanted.name is not None and (source / RUN_CONFIG).is_file():
        from grappa_dist.run_models import export_from_run

        trust, strength = wanted.trust_modules, wanted.strength
        return export_from_run(source, wanted.name, aside / "model", trust_modules=trust, strength=strength)
    folder, config = exported_config(source)
    if wanted.name not in (None, config["variant"]):
        raise ValueError(f"{source} is the folder of one model, {config['variant']}; --name {wanted.name} is of a run")
    check_trust(source, config["backbone"], wanted.trust_modules)
    return folder


def _config_of(folder: Path, wanted: Wanted) -> dict[str, Any]:
    """The content of config.json, at the strength that is wanted."""
    config = exported_config(folder)[1]
    return config if wanted.strength is None else with_strength(config, wanted.strength)


def _opened(folder: Path, wanted: Wanted, log: Log) -> RetrievalModel:
    """The model with the weights of its gallery, and a line about it."""
    strength = wanted.strength
    model = load_model(folder, trust_modules=True, precision="fp32", strength=strength)  # as _model_folder has checked
    config = _config_of(folder, wanted)
    if wanted.gallery is not None and wanted.to in FOLDERS:
        raise ValueError(
            f"--gallery-weights {wanted.gallery}: is for onnx and torch; a folder has those of all galleries"
        )
    if wanted.gallery is not None and wanted.gallery not in model.galleries:
        known = ", ".join(model.galleries) or "none"
        raise ValueError(f"{folder} has no weights for the gallery {wanted.gallery!r}; it has {known}")
    if wanted.gallery is not None:
        model.weigh(model.galleries[wanted.gallery])
    elif model.galleries and wanted.to not in FOLDERS:
        log("warning: the model weighs its sets by galleries and none was named: this is their average")
    numbers = sum(p.numel() for p in model.grappa.parameters())
    log(f"model   {config['variant']}, {pluralize(len(model.sets), 'adaptor set')}, {numbers:,} numbers")
    return model


def _write_file(task: _Task, aside: Path, out: Path) -> Check:
    """ONNX or .pt2: a file, and its record beside it."""
    wanted, path = task.wanted, aside / f"model{'.onnx' if task.wanted.to == 'onnx' else '.pt2'}"
    narrow = wanted.to == "onnx" and wanted.dtype == "bf16"
    exportable = Exportable(task.model, wanted.dtype, computes="fp32" if narrow else None).eval()
    if wanted.to == "onnx":
        onnx.check_possible(_bytes(exportable), str(out))
    about = {**task.about(), **describe_interface(exportable, task.model.embed_dim)}
    traced = trace(exportable, f"the backbone {task.config['backbone']['name']}")
    if wanted.to == "onnx":
        about |= {"opset": onnx.OPSET, "computes": "fp32" if narrow else wanted.dtype}
        onnx.write(traced, path, about, narrow=narrow)
    else:
        exporting.write(traced, path, about)
    found = task.compared((onnx if wanted.to == "onnx" else exporting).read(path))
    written = {"format": wanted.to, "file": out.name, **vars(Sum.of(path)), **about, "check": asdict(found)}
    write_json(aside / "record", written)
    sync(path)
    rename(aside / "record", _record_of(out))  # first: where there is a file, there is its record
    rename(path, out)
    sync(out.parent)
    opset = f", opset {onnx.OPSET}" if wanted.to == "onnx" else ""
    task.log(f"{wanted.to:<7} {out}  ({format_bytes(out.stat().st_size)}, {wanted.dtype}{opset}, any batch size)")
    return found


def _check_free(wanted: Wanted, out: Path) -> None:
    """Raises ValueError where something is; an empty folder, and a record whose file a kill has prevented, are not."""
    is_folder = wanted.to in FOLDERS
    record = _record_of(out)
    taken = {
        out: out.exists() and not (is_folder and out.is_dir() and not any(out.iterdir())),
        record: not is_folder and record.exists() and not _is_record_of(record, out),
    }
    for path in (path for path, is_taken in taken.items() if is_taken):
        raise ValueError(f"{path} is there already; expected a name that is free")


def _is_record_of(record: Path, out: Path) -> bool:
    try:
        return bool(read_json(record)["file"] == out.name)
    except (ValueError, KeyError, TypeError, OSError):
        return False


def _record_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _write_folder(task: _Task, aside: Path, out: Path) -> Check:
    """What load_model reads; for the Hub with its card and the description of the preprocessing."""
    wanted, folder = task.wanted, aside / "folder"
    make_folder(folder)
    tensors = {
        name: tensor.to(DTYPES[wanted.dtype]) if tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors_of(task.model.grappa).items()
    }
    save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    files = {WEIGHTS_FILE: vars(Sum.of(folder / WEIGHTS_FILE))}
    write_json(folder / CONFIG_FILE, {**task.config, "dtype": wanted.dtype, "files": files})
    found = task.compared(load_model(folder, trust_modules=True, precision="fp32"))
    about = task.about()
    write_json(folder / RECORD, {"format": wanted.to, **about, "check": asdict(found)})
    if wanted.to == "hub-folder":
        hub.write(folder, hub.facts_of(task.source, task.config, about, found))
    assert not (folder / MANIFEST).exists()
    if out.is_dir():
        out.rmdir()
    for path in folder.iterdir():
        sync(path)
    rename(folder, out)
    sync(out.parent)
    size = sum(path.stat().st_size for path in out.iterdir())
    task.log(
        f"folder  {out}  ({format_bytes(size)}, {wanted.dtype}; {', '.join(sorted(p.name for p in out.iterdir()))})"
    )
    return found
