"""The models of a finished run: which there are, and any of them in a folder of its own, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grappa_dist.artifacts import Store
from grappa_dist.data.open_images import is_generated, open_images
from grappa_dist.export import write_model
from grappa_dist.files import make_folder, remove_folder, rename
from grappa_dist.inputs import look
from grappa_dist.layout import lay_out
from grappa_dist.models.spec import ModelSpec, check_trust
from grappa_dist.output import suggestion
from grappa_dist.stages.run import read_config


def models_of(run_dir: Path) -> Mapping[str, ModelSpec]:
    """The models of a run that are trained, by their names in the table of scores. Writes nothing.

    Raises:
        ValueError: there is no such run, or its images cannot be read, so that it is unknown which models are its own.
    """
    config, store = read_config(run_dir), Store(run_dir)
    inputs = look(config, run_dir)
    if inputs.missing or not is_generated(config.data, store):
        raise ValueError(f"{run_dir}: some images of data.train and data.test are in no shard; run it first")
    train, test = open_images(inputs.config.data, store, config.resources, write_index=False)
    models = lay_out(inputs.config, store, train, test).models
    return {name: spec for name, spec in models.items() if _is_trained(spec)}


def _is_trained(spec: ModelSpec) -> bool:
    needs = [*spec.adaptors, *(artifact for artifact in (spec.fusion, spec.galleries) if artifact is not None)]
    return all(artifact.complete for artifact in needs)


def image_counts(run_dir: Path) -> dict[str, int]:
    """How many images a run has adapted to, `train`, and how many it is scored on, `test`, if there are any.

    Raises:
        ValueError: there is no such run, or its images cannot be read.
    """
    config = read_config(run_dir)
    inputs = look(config, run_dir)
    train, test = open_images(inputs.config.data, Store(run_dir), config.resources, write_index=False)
    return {"train": len(train)} | ({} if test is None else {"test": len(test)})


def export_from_run(
    run_dir: Path, name: str, out: Path, *, trust_modules: bool | None = None, strength: float | None = None
) -> Path:
    """Writes one of the models of a run into a new folder, which `load_model` reads; returns it.

    Args:
        run_dir: of a run that has trained this model; it is not changed, and its `model` stays as it is.
        name: as in the table of scores: backbone, k=<K> or a variant, at a strength (`average@0.5`) or not.
        out: the folder; it must not exist, or be empty.
        trust_modules: whether the module of a backbone `module:function` may be imported; None: only where a run of the
            same user imported it.
        strength: of adaptation, in [0, 4], whether the run has scored it or not; None: that of the name.

    Raises:
        ValueError: there is no such run or model, its module is not trusted, or the folder holds something; or the
            strength is another number, or one of the backbone.
    """
    models = models_of(run_dir)
    if name not in models:
        raise ValueError(f"{run_dir} has no model {name!r}; it has {', '.join(models)}{suggestion(name, models)}")
    spec = models[name] if strength is None else models[name].at(strength)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; expected a folder that does not exist, or is empty")
    backbone = read_config(run_dir).backbone
    check_trust(run_dir, {"name": backbone.name, "kwargs": backbone.kwargs}, trust_modules)
    partial = out.with_name(f".{out.name}.partial")
    remove_folder(partial)
    make_folder(partial)
    write_model(spec, partial, {"export": spec.name, "reason": "asked for, from a finished run"})
    for path in partial.glob(".*"):  # checksums, which config.json has
        path.unlink()
    if out.is_dir():
        out.rmdir()
    rename(partial, out)
    return out
