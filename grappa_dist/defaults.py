"""The settings of a run that was given images and no config: what suits their number and the machine, and what tests.

They are written into the run directory with the run, so that a further call goes on with them, whatever the machine;
arguments that are given again replace what is there. docs/own_images.md has the reasons for the values.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from grappa_dist.config import CONFIG_FILE, BackboneConfig, Config, DataConfig, Section, absolute_path, read
from grappa_dist.console import pluralize
from grappa_dist.data.index import COMMITTED
from grappa_dist.distributed.placement import WorkerParts
from grappa_dist.inputs import Inputs, look
from grappa_dist.inputs.entries import Entry
from grappa_dist.inputs.growing import WHOLE
from grappa_dist.make_shards.progress import Log
from grappa_dist.stages.run import configs_of_seeds, read_config

Split = Literal["test", "none", "classes", "folders"]
BACKBONE = "timm:vit_small_patch16_224.dino"
LEAST_IMAGES = 8
BAD_IMAGES = 5  # that stop no run of few images, unless they are a fifth of them
FEW_IMAGES, SOME_IMAGES = 1000, 10_000  # from which on there are more sets, fewer epochs and larger batches
LEAST_CLASSES = 4  # to be divided: two that train, two that test
MOST_WORKERS = 4  # on a CPU: each has a copy of the model
MOST_LABELS = 4096  # on a CPU, where classifiers of more classes take most of the time
DENSE = 5  # images a label of the finest set
PASSES, LEAST_EPOCHS, MOST_EPOCHS = 2500, 2, 10  # images that a set is shown at least, by as many epochs as that takes
STRENGTHS = (0.5, 2.0)  # of adaptation, for labelled test images to choose from


def settings_of_run(
    images: Sequence[str],
    root: Path,
    *,
    test: Sequence[str] = (),
    split: Split | None = None,
    backbone: str | None = None,
    overrides: Sequence[str] = (),
    log: Log = lambda line: None,
) -> Config:
    """The settings of a run that may have begun: those of its directory with what is given anew, else fresh ones.

    Args:
        images: folders of images, lists or shards; empty: those of the run directory.
        split: which images test, where `test` does not say.
        overrides: `section.key=value`.
        log: gets a few lines that say what was chosen.

    Raises:
        ValueError: there is neither a run nor images; an argument or the images cannot be used.
    """
    kept = next((path for path in (root / CONFIG_FILE, *configs_of_seeds(root)) if path.is_file()), None)
    if kept is None:
        return starting_config(images, root, test=test, split=split, backbone=backbone, overrides=overrides, log=log)
    before = read_config(kept.parent).absolute(root)
    given = [f"backbone.name={backbone}"] if backbone else []
    config = read_config(kept.parent, [*given, *overrides])
    paths = _as_shards(images or before.data.train, test)
    if test or split or (images and tuple(map(absolute_path, paths["train"])) != before.data.train):
        data = {"collection": None, "collection_kwargs": {}, **divided(paths, root, split=split, log=log)}
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    config = _on_this_machine(config).absolute(root)
    changed = ", ".join(_changes(before, config))
    log(f"{kept}: goes on with these settings{f', but for {changed}' if changed else ''}")
    return config


def starting_config(
    images: Sequence[str],
    root: Path,
    *,
    test: Sequence[str] = (),
    split: Split | None = None,
    backbone: str | None = None,
    has_gpu: bool | None = None,
    overrides: Sequence[str] = (),
    log: Log = lambda line: None,
) -> Config:
    """The settings that a run starts from; the arguments are those of `settings_of_run`.

    Args:
        has_gpu: whether to choose for a GPU; None: whether there is one here or may be in a cluster.

    Raises:
        ValueError: there are no images, or too few; the arguments or the images cannot be used.
    """
    if not images:
        raise ValueError(f"expected a folder of images; {root} has no {CONFIG_FILE} of an earlier run to go on with")
    has_gpu = torch.cuda.is_available() or bool(os.environ.get("RAY_ADDRESS")) if has_gpu is None else has_gpu
    data = divided(_as_shards(images, test), root, split=split, log=log)
    sizes = _sizes(data, root)
    rows = sizes["train"]
    if rows < LEAST_IMAGES:
        what = f"{', '.join(map(str, images))}: {pluralize(rows, 'image')} to adapt to"
        raise ValueError(f"{what}; expected at least {LEAST_IMAGES}, better some hundreds")
    if rows < BAD_IMAGES / DataConfig.model_fields["max_bad_share"].default:
        data["max_bad_share"] = min(0.2, round(BAD_IMAGES / rows, 3))
    chosen = _for_gpu(rows) if has_gpu else _for_cpu(rows, len(os.sched_getaffinity(0)))
    if sizes.get("test"):
        chosen.setdefault("evaluate", {})["strengths"] = STRENGTHS
    tree = {"name": root.name or "run", "data": data, "backbone": {"name": backbone or BACKBONE}, **chosen}
    config = read(tree, overrides).absolute(root)
    for line in _describe(config, has_gpu=has_gpu):
        log(line)
    return config


def _for_cpu(rows: int, cores: int) -> dict[str, dict[str, Any]]:
    """Sections that differ from the defaults where no worker has a GPU."""
    if rows < FEW_IMAGES:
        ks, epochs, batch = _labels(rows, 2), _epochs(rows), 32
    else:
        ks, epochs, batch = (
            _labels(rows, 4),
            _epochs(rows) if rows < SOME_IMAGES else 1,
            64 if rows < SOME_IMAGES else 128,
        )
    return {
        "embed": {"batch_size": WHOLE},
        "clustering": {"num_labels": ks},
        "adapt": {"epochs": epochs, "global_batch": batch, "micro_batch": 8},
        "fuse": {"variants": ["average"], "projector": [1024, 1024, 1024], "micro_batch": 16},
        "evaluate": {"view_queries": 32},
        "resources": {"cpus_per_worker": _cpus_per_worker(cores), "adapt_ranks": max(1, _workers(cores) // len(ks))},
    }


def _for_gpu(rows: int) -> dict[str, dict[str, Any]]:
    """The same where workers have GPUs: the defaults, but enough steps for few images."""
    if rows >= FEW_IMAGES:
        return {"adapt": {"micro_batch": "auto"}}
    return {
        "clustering": {"num_labels": _labels(rows, 4)},
        "adapt": {"epochs": max(4, _epochs(rows)), "global_batch": 32},
    }


def _epochs(rows: int) -> int:
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, round(PASSES / rows)))


def _labels(rows: int, sets: int) -> list[int]:
    """Powers of two, the finest with about DENSE images a label, each a quarter of the next."""
    finest = min(2 ** round(math.log2(max(2, rows / DENSE))), MOST_LABELS)
    return [k for step in reversed(range(sets)) if (k := finest // 4**step) > 1]


def _cpus_per_worker(cores: int) -> int:
    return max(1, cores // MOST_WORKERS)


def _workers(cores: int) -> int:
    return cores // _cpus_per_worker(cores)


def _on_this_machine(config: Config) -> Config:
    """With workers that fit: a larger machine may have asked for more CPUs, and more of them for a job."""
    where, cores = config.resources, config.resources.num_cpus or len(os.sched_getaffinity(0))
    if os.environ.get("RAY_ADDRESS"):
        return config
    fewer: dict[str, int] = {}
    if where.cpus_per_worker != "auto" and where.cpus_per_worker > cores:
        fewer["cpus_per_worker"] = _cpus_per_worker(cores)
    workers = cores // fewer.get("cpus_per_worker", WorkerParts.here(where).cpus)
    if where.workers == "auto" and where.gpus_per_worker == "auto" and where.adapt_ranks > workers:
        fewer["adapt_ranks"] = workers
    return config.model_copy(update={"resources": where.model_copy(update=fewer)})


def _describe(config: Config, *, has_gpu: bool) -> list[str]:
    """What was chosen, in a few lines."""
    clustering, adapt, fuse = config.clustering, config.adapt, config.fuse
    ks = "auto" if clustering.num_labels == "auto" else ", ".join(map(str, clustering.num_labels))
    where = "a GPU" if has_gpu else "a CPU, as there is no GPU"
    lines = [
        f"settings for {where}: adaptor sets for K = {ks}, {pluralize(adapt.epochs, 'epoch')} each in batches of "
        f"{adapt.global_batch}; the backbone is {config.backbone.name}"
    ]
    if fuse.variants == ("average",):
        lines.append(
            "no fusion is trained: all sets count alike, which no trained fusion has beaten so far "
            "('fuse.variants=[average, neighbours]' trains one)"
        )
    kept = Path(config.out or ".") / CONFIG_FILE
    lines.append(f"a run keeps all settings in {kept}; each can be given as section.key=value")
    return lines


def divided(paths: Mapping[str, Sequence[str]], root: Path, *, split: Split | None, log: Log) -> dict[str, Any]:
    """The section `data` for images: which of them train and which test.

    Without `split`, test images are those that are named, or the folders test/ or val/ beside train/, or, of at least
    LEAST_CLASSES class folders, the second half of the classes; of fewer classes or images all test, too. Images
    without classes all train, and none test.

    Args:
        paths: to train on and to test on.

    Raises:
        ValueError: the images do not have what `split` needs.
    """
    train, test = list(paths["train"]), list(paths["test"])
    if test and split not in (None, "none"):
        raise ValueError(f"--split {split} and --test: expected one of them, for both say which images test")
    data: dict[str, Any] = {"train": train, "test": test, "split": "none" if split in ("none", "test") else "auto"}
    if split == "test":
        return {**data, "test": train}
    if split == "classes":
        return {**data, "split": "classes"}
    found = _look(data, root)
    if split == "folders" and not found.test:
        raise ValueError(f"--split folders: {', '.join(train)} has no folders train/ beside test/ or val/")
    if test or found.test or split is not None:
        return data
    classes = _classes(found.train)
    if not classes:
        return data
    trains = sorted(classes)[: -(-len(classes) // 2)]  # as make_shards divides them
    if len(classes) >= LEAST_CLASSES and sum(classes[name] for name in trains) >= LEAST_IMAGES:
        return {**data, "split": "classes"}
    log(
        f"{pluralize(len(classes), 'class folder')} with {pluralize(classes.total(), 'image')}, too few to be divided: "
        "all images train, without their labels, and all test (--split none tests none)"
    )
    return {**data, "test": train}


def _classes(entries: Sequence[Entry]) -> Counter[str]:
    """Images of each class; empty unless every image has one."""
    items = [item for entry in entries if entry.growing is not None for item in entry.growing.items]
    labels = Counter(item.label for item in items if item.label is not None)
    return Counter({str(label): n for label, n in labels.items()}) if labels.total() == len(items) else Counter()


def _as_shards(images: Sequence[str], test: Sequence[str]) -> dict[str, list[str]]:
    """The paths to train on and to test on; a folder of make_shards counts as its parts train/ and test/."""
    found: dict[str, list[str]] = {"train": [], "test": list(test)}
    for path in images:
        parts = [part for part in ("train", "test") if (Path(path) / part / COMMITTED).is_file()]
        if "train" not in parts:
            found["train"].append(path)
            continue
        for part in parts if not test else ["train"]:
            found[part].append(str(Path(path) / part))
    return found


def _look(data: Mapping[str, Any], root: Path) -> Inputs:
    return look(Config(name="", data=DataConfig.model_validate(data), backbone=BackboneConfig(name=BACKBONE)), root)


def _sizes(data: Mapping[str, Any], root: Path) -> dict[str, int]:
    return _look(data, root).sizes


def _changes(before: Config, now: Config) -> list[str]:
    """The settings that differ, as section.key."""
    found = list[str]()
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        if isinstance(new, Section):
            found += [f"{name}.{key}" for key in type(new).model_fields if getattr(old, key) != getattr(new, key)]
        elif old != new:
            found.append(name)
    return found


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a Python call as `section.key=value`: {"adapt.epochs": 5} and {"adapt": {"epochs": 5}} alike.

    Raises:
        ValueError: a value is none that a config can hold.
    """

    def path(value: object) -> str:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise ValueError(f"{key}: expected a number, a text, a list or None, got one of type {type(value).__name__}")

    found = list[str]()
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += as_overrides({f"{key}.{inner}": of_inner for inner, of_inner in value.items()})
            continue
        found.append(f"{key}={json.dumps(value, default=path)}")
    return found
