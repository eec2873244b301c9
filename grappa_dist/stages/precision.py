"""The precision of a run: `backbone.precision=auto` settles once for a run directory, and is fp32 or bf16 from then on.

It settles as the features that are there were computed; where there are none, as bf16 if the workers have GPUs. A CPU
that is fast in bfloat16 does not decide: a run on CPUs would have other results on another CPU. So a directory that is
begun on GPUs goes on in bf16 on CPUs, and the other way round.
"""

from __future__ import annotations

from dataclasses import replace

from grappa_dist.artifacts import Store, finished
from grappa_dist.bucket import here
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.placement import may_have_gpus
from grappa_dist.files import make_folder, read_json, write_json
from grappa_dist.models.precision import Precision
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.embed import features_of
from grappa_dist.stages.run import Run
from grappa_dist.variants import BACKBONE

PRECISION_FILE = "precision.json"  # in the index folder of a run


def settled(config: Config, store: Store, train: ImageShards) -> Config:
    """The settings in the precision of the run directory; where `auto` is not settled yet, as they are."""
    found = _asked(config) or _recorded(store) or _of_features(config, store, train)
    return _in(config, found or "fp32")


def settle(run: Run, train: ImageShards) -> Run:
    """The same for a run, by its workers where nothing is there; `record` keeps what is found."""
    config, store = run.config, run.store
    why, found = "as asked for", _asked(config)
    if found is None:
        why, found = "as the run directory began", _recorded(store)
        found = found or _of_features(config, store, train)
    if found is None:
        gpus = run.runner.has_gpus()
        why, found = ("the workers have GPUs", "bf16") if gpus else ("the workers have no GPUs", "fp32")
    if found == "bf16":
        run.console.log(f"precision: matrix products in bfloat16 (backbone.precision={found}: {why})")
    elif _asked(config) is None and may_have_gpus(config.resources):
        run.console.log(f"precision: float32 ({why}); backbone.precision=bf16 is faster on GPUs, and another result")
    run.console.event("precision", precision=found, because=why)
    given = run.given and _in(run.given, found)
    return replace(run, config=_in(config, found), given=given)


def record(run: Run) -> None:
    """Keeps the precision of a run that is about to begin for later runs with `auto`."""
    path, found = run.store.root / "index" / PRECISION_FILE, run.config.backbone.computes_in
    if _recorded(run.store) != found:
        make_folder(path.parent)
        write_json(path, {"precision": found})


def _asked(config: Config) -> Precision | None:
    asked = config.backbone.precision
    return None if asked == "auto" else asked


def _recorded(store: Store) -> Precision | None:
    try:
        found = read_json(here(store.root / "index" / PRECISION_FILE))["precision"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged: then the features tell
        return None
    return "bf16" if found == "bf16" else "fp32"


def _of_features(config: Config, store: Store, train: ImageShards) -> Precision | None:
    """The precision of the features that are there; None: there are none."""
    if not any((store.root / "features" / BACKBONE).glob("*")):
        return None  # of many shards, names alone take seconds
    kinds: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in kinds:
        spec = ModelSpec(BACKBONE, _in(config, precision).backbone)
        if any(finished(features_of(store, spec, config.embed, train))):
            return precision
    return None


def _in(config: Config, precision: Precision) -> Config:
    """The settings in a precision; `auto` stays where it means the same, as reports are named by all settings."""
    if config.backbone.computes_in == precision:
        return config
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"precision": precision})})
