"""The adapted model elsewhere: exported to a directory, loaded from it, and run over shards.

Shapes: B images, S pixels a side, L layers, N sets, P rows of one shard, D channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, Store, finished, wait_until_seen
from grappa_dist.config import Resources, read
from grappa_dist.console import pluralize
from grappa_dist.data.decoding import Picture, to_rgb, upright
from grappa_dist.data.index import Shard, describe_missing
from grappa_dist.data.labels import named
from grappa_dist.data.open_images import cache_of
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.files import Sum, read_json, recorded, save_tensors, write_json, write_json_list
from grappa_dist.inputs import living_shards_of
from grappa_dist.make_shards.left_out import BAD_LIST, write_list
from grappa_dist.models import Grappa
from grappa_dist.models.model_config import CONFIG_FILE, FORMAT, with_strength
from grappa_dist.models.precision import Precision
from grappa_dist.models.spec import (
    WEIGHTS_FILE,
    ModelSpec,
    build,
    exported_config,
    exported_spec,
    load_grappa,
)
from grappa_dist.models.weights import tensors_of
from grappa_dist.stages.bad_rows import BAD_FILE
from grappa_dist.stages.damages import Mending
from grappa_dist.stages.embed import ROWS_FILE, embed, features_of
from grappa_dist.stages.gallery_weights import load_galleries, set_weights, transitivity
from grappa_dist.stages.ground_truth import members_of
from grappa_dist.stages.run import Run, running

KEYS_FILE, NAMES_FILE, TASKS_FILE, LIST_FILE = "keys.json", "names.json", "tasks.json", "embeddings.json"
OPTIONAL = {"names": NAMES_FILE, "tasks": TASKS_FILE}  # of a shard: not there where no image has any
_OF_TRAINING = ("adapt_ranks", "compile", "collective_timeout_s", "trackers")
_EMBED_SETTINGS = (
    *("data.max_bad_share", "embed.batch_size", "backbone.precision"),
    *(f"resources.{field}" for field in Resources.model_fields if field not in _OF_TRAINING),
)


def load_model(
    run_or_model_dir: str | Path,
    *,
    trust_modules: bool | None = None,
    precision: Precision | None = None,
    strength: float | None = None,
) -> RetrievalModel:
    """The model of a run directory or of an exported model directory, on the CPU.

    Args:
        trust_modules: whether the module of a backbone called `module:function` may be imported, which runs it; it must
            be importable. None: only in a run directory where a run of the same user imported it.
        precision: "fp32" or "bf16", in which it computes; None: as its run did, on any device.
        strength: of adaptation, where 0 is the backbone and 1 as trained, 4 at most; None: as exported.

    Raises:
        ValueError: the directory holds no model, one of an unknown format, or one that names a module which is not
            trusted; or a file of it does not hold what was exported; or the strength is another number, or one of a
            model without adaptor sets.
    """
    path = Path(run_or_model_dir).expanduser()
    grappa, config = load_grappa(path, trust_modules=trust_modules, precision=precision, strength=strength)
    galleries = {task: torch.tensor(weights) for task, weights in config.get("galleries", {}).items()}
    return RetrievalModel(grappa, config["sets"], galleries)


@dataclass(frozen=True)
class Transform:
    """The test transform: a PIL image of any size and mode -> (3, S, S) in [0, 1]."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image | Picture) -> Tensor:
        upright_image = image if isinstance(image, Picture) else to_rgb(upright(image))
        return torch.from_numpy(self.preprocess.test(upright_image)).permute(2, 0, 1).float() / 255


class RetrievalModel(nn.Module):
    """Images to unit embeddings; frozen.

    `transform` is the exact test transform (PIL image -> (3, S, S) in [0, 1]); normalisation happens inside the model.
    Weights are folded for speed, which changes results by rounding alone; `grappa` holds them as they were trained.
    For the variant `gallery`, `galleries` has the weights (N,) of the sets for each task of the run: such a model is
    the average of its sets until `weigh(galleries[task])` or `condition` sets the gallery that is searched.
    """

    def __init__(self, grappa: Grappa, sets: list[str], galleries: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.grappa, self.sets = grappa.requires_grad_(False).eval(), sets
        self.galleries = dict(galleries or {})
        self.grappa.fold()
        self.transform = Transform(grappa.backbone.preprocess)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust_modules: bool | None = None) -> RetrievalModel:
        """`load_model`, by the name that the Hub's libraries use; reads local folders alone, and downloads nothing."""
        return load_model(folder, trust_modules=trust_modules)

    @property
    def embed_dim(self) -> int:
        return self.grappa.embed_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, S, S) -> (B, D) unit rows."""
        return F.normalize(self.grappa(images).float(), dim=1)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """The weights of the adaptor sets in each layer for each image, (B, L, N), in the order of `sets`.

        A model that is the backbone alone has N = L = 0.
        """
        self.grappa(images)
        return self.grappa.last_attention() if self.sets else images.new_zeros(len(images), 0, 0)

    @torch.no_grad()
    def condition(self, gallery: Iterable[Tensor]) -> Tensor:
        """Sets the weights of the adaptor sets by the images that will be searched; returns them, (N,), as `sets`.

        Every image is embedded by each set alone, and sets in whose features neighbours of neighbours are neighbours
        gain weight (stages/gallery_weights.py). A learned attention is multiplied by the weights. Embed queries and
        gallery after each call.

        Args:
            gallery: batches of images, RGB in [0, 1], (b, 3, S, S) each; a sample of some thousands is enough.

        Raises:
            ValueError: the gallery has fewer than three images, or the model has no sets.
        """
        if not self.sets:
            raise ValueError("condition: the model is the backbone alone and has no adaptor sets to weigh")
        features: list[list[Tensor]] = [[] for _ in self.sets]
        try:
            for images in gallery:
                for found, alone in zip(features, torch.eye(len(self.sets)), strict=True):
                    self.weigh(alone)
                    found.append(self(images))
        finally:
            self.weigh(None)
        count = sum(map(len, features[0]))
        if count < 3:
            raise ValueError(f"condition: the gallery has {pluralize(count, 'image')}, it needs three at least")
        weights = set_weights(torch.stack([transitivity(torch.cat(z)).cpu() for z in features]))
        self.weigh(weights)
        return weights

    def weigh(self, weights: Tensor | None) -> None:
        """Sets the weights of the adaptor sets, (N,), the same for all images; None: as exported."""
        self.grappa.weigh(weights)
        self.grappa.fold()


def export_model(spec: ModelSpec, artifact: Artifact, why: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Makes an artefact of the model; arguments as of `write_model`."""
    write_model(spec, artifact.begin(), why)
    artifact.commit()


def write_model(spec: ModelSpec, folder: Path, why: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Writes the model's weights, backbone included, and the settings that build it again, into a folder.

    Args:
        why: how this model came to be the one, for a reader of config.json.
    """
    in_fp32 = spec.backbone.model_copy(update={"precision": "fp32"})  # weights are stored as they were given
    model = build(replace(spec, backbone=in_fp32), torch.device("cpu"))
    grappa = model if isinstance(model, Grappa) else Grappa.of_backbone(model)
    save_tensors(folder / WEIGHTS_FILE, tensors_of(grappa), summed=True)
    config = {
        "format": FORMAT,
        "variant": spec.name,
        "sets": spec.sets,
        "backbone": {
            **{"name": spec.backbone.name, "kwargs": spec.backbone.kwargs},
            **({"pool": spec.backbone.pool} if spec.backbone.pool else {}),
        },
        "pixels": asdict(grappa.backbone.preprocess),
        "bottleneck": spec.bottleneck,
        "attention": spec.has_attention,
        "why": dict(why),
        "files": {
            WEIGHTS_FILE: vars(recorded(folder / WEIGHTS_FILE) or Sum.of(folder / WEIGHTS_FILE))
        },  # for copies without the manifest
    }
    if spec.backbone.computes_in != "fp32":
        config["precision"] = spec.backbone.computes_in
    if spec.galleries is not None:
        config["galleries"] = {task: gallery["weights"] for task, gallery in load_galleries(spec.galleries).items()}
    write_json(folder / CONFIG_FILE, with_strength(config, spec.strength))


def embed_images(
    model: Path,
    paths: Sequence[str],
    out: Path,
    overrides: Iterable[str] = (),
    *,
    gallery: str | None = None,
    trust_modules: bool | None = None,
) -> Path:
    """Embeds the images of some shards, as an input of a search index; returns the path of `embeddings.json` in `out`.

    That file lists per shard: `rows`, unit rows (P, D) float32; `keys`, the images' keys in the same order; `names`,
    their file names before they were put into the shard, and `tasks`, null for an image, or a shard, without any; and
    `bad`, the positions whose image does not decode, with the reason: their rows are zero. `xxh3` has the checksum
    (xxh3 of 128 bits) of each of these files, null of those that were made before there were any. `source` is the
    shard's path. `gone`, where there is any, has the positions of images that are no longer there: their rows count for
    nothing. `bad_images.csv` names all bad images with the reason.

    Args:
        model: a run directory, or that of an exported model.
        paths: shards; of what else `data.train` may name, such as folders, shards are made once, below `out`.
        overrides: `key=value` of data.max_bad_share, embed.batch_size, backbone.precision (by default the model's) and
            most of resources.
        gallery: the task whose set weights are used, for a model of the variant `gallery`.
        trust_modules: as for `load_model`.

    Raises:
        ValueError: there is no such model, or a path or setting is wrong.
    """
    data, overrides = {"train": tuple(paths)}, list(overrides)
    name = exported_config(model.expanduser())[1]["backbone"]["name"]
    config = read({"name": "embeddings", "data": data, "backbone": {"name": name}}, overrides)
    _check_settings(overrides)
    asked = None if config.backbone.precision == "auto" else config.backbone.precision
    spec = exported_spec(model.expanduser(), gallery, trust_modules=trust_modules, precision=asked)
    with running(config, out) as run:
        if spec.name == "gallery" and gallery is None:
            run.console.log("warning: the model weighs its sets by galleries and none was named: this is their average")
        mending = Mending(run)
        return mending.mended(lambda: _embed(run, spec, gallery, mending))


def _check_settings(overrides: Iterable[str]) -> None:
    """Raises ValueError for a setting that would change nothing."""
    for key in (override.partition("=")[0] for override in overrides):
        if key not in _EMBED_SETTINGS:
            raise ValueError(
                f"{key}: is no setting of embedding, for which the model brings its own settings; "
                f"expected one of {', '.join(_EMBED_SETTINGS)}"
            )


def _embed(run: Run, spec: ModelSpec, gallery: str | None, mending: Mending) -> Path:
    given = run.config.data.train
    paths, gone_in = living_shards_of(given, run.store.root, log=run.console.log, console=run.console)
    images = ImageShards.open(
        paths,
        run.store.root / "index",
        cache_of(run.config.resources),
        log=lambda line: run.console.log(f"warning: {line}"),
    )
    if not len(images):
        raise ValueError(f"--images {' '.join(given)}: the shards hold no images (jpg, jpeg, png, webp)")
    for line in describe_missing(images.shards):
        run.console.log(f"warning: {line}")
    features = features_of(run.store, spec, run.config.embed, images)
    keys = [_keys_of(run.store, shard) for shard in images.shards]
    mending.check([*features, *keys])
    if all(finished(features)):
        before = "the shard was" if len(features) == 1 else f"all {len(features)} shards were"
        run.console.log(f"embed: {before} embedded before")
    gone = [gone_in.get(shard.path, []) for shard in images.shards]
    starts = (images.shard_rows(i).start for i in range(len(gone)))
    rows = frozenset(start + place for start, places in zip(starts, gone, strict=True) for place in places)
    reasons = embed(run, images, spec, features, gone=rows)
    files = _write_keys(run, images, keys)
    shards = [
        _entry(shard, of_rows, of_keys, found) | ({"gone": places} if places else {})
        for shard, of_rows, of_keys, found, places in zip(images.shards, features, keys, files, gone, strict=True)
    ]
    path, bad = run.store.root / LIST_FILE, sorted(reasons.items())
    write_list(path.with_name(BAD_LIST), [(images.name(row) or images.where(row), why) for row, why in bad])
    about = {"model": spec.name, "model_sha256": spec.weights_sha256, "gallery": gallery}
    write_json(path, {**about, "images": len(images) - len(rows), "bad": len(bad), "shards": shards})
    return path


def describe_embeddings(path: Path) -> str:
    """What is printed at the end: where the embeddings are and, where images have none, how many and where they are
    named.

    Args:
        path: that `embed_images` returned.
    """
    found = read_json(path)
    lines = [f"embeddings  {path}"]
    if found["bad"]:
        of = pluralize(found["images"], "image")
        lines.append(
            f"left out    {found['bad']:,} of {of} could not be read; their rows are zeros: "
            f"named, with reasons, in {path.with_name(BAD_LIST)}"
        )
    return "\n".join(lines)


def _entry(shard: Shard, of_rows: Artifact, of_keys: Artifact, files: KeyFiles) -> dict[str, Any]:
    """The files of one shard as `embeddings.json` lists them: paths below it, and the xxh3 of each."""
    paths = {
        "rows": f"{of_rows.name}/{ROWS_FILE}",
        **vars(files),
        "bad": f"{of_rows.name}/{BAD_FILE}",
    }
    listed = {f"{a.name}/{name}": found.xxh3 for a in (of_rows, of_keys) for name, found in a.files.items()}
    xxh3 = {what: listed[path] if path is not None else None for what, path in paths.items()}
    return {"shard": shard.name, "source": shard.path, "images": shard.rows, **paths, "xxh3": xxh3}


@dataclass(frozen=True)
class KeysTask:
    images: ImageShards  # the shard alone
    artifact: Artifact


@dataclass(frozen=True)
class KeyFiles:
    """Paths in the folder of embeddings, for the images of one shard."""

    keys: str
    names: str | None  # None where no image of the shard has the name of its file
    tasks: str | None  # None where none has a task


def _write_keys(run: Run, images: ImageShards, artifacts: Sequence[Artifact]) -> list[KeyFiles]:
    """Keys, names and tasks of every shard; the workers write those that are missing."""
    there = finished(artifacts)
    missing = {artifact: number for number, artifact in enumerate(artifacts) if not there[number]}
    known = _listed(run.store.root / LIST_FILE)
    if missing:
        with run.console.stage("keys", f"and names of {pluralize(len(missing), 'shard')}"):
            found = run.runner.map(write_keys, [KeysTask(images.part(i), artifact) for artifact, i in missing.items()])
            wait_until_seen(missing)
        known |= {f"{artifact.name}/{KEYS_FILE}": there for artifact, there in zip(missing, found, strict=True)}
    return [_key_files(artifact, known) for artifact in artifacts]


def _keys_of(store: Store, shard: Shard) -> Artifact:
    kind = f"keys/{shard.name.removesuffix('.tar')}"
    return store.artifact(kind, {"names": True, "tasks": True}, {"shard": shard.fingerprint})


def _listed(path: Path) -> dict[str, list[str]]:
    """Which of OPTIONAL the shards have, by the path of their keys, from the list of an earlier call."""
    if not path.exists():
        return {}
    with suppress(ValueError, KeyError, TypeError):  # a damaged list is written anew
        listed = read_json(path)["shards"]
        return {shard["keys"]: [what for what in OPTIONAL if shard[what] is not None] for shard in listed}
    return {}


def _key_files(artifact: Artifact, known: Mapping[str, Collection[str]]) -> KeyFiles:
    """The paths of one shard; looks for files only where the shard is not `known`."""
    keys = f"{artifact.name}/{KEYS_FILE}"
    there = known[keys] if keys in known else _there(artifact)
    return KeyFiles(keys, *(f"{artifact.name}/{file}" if what in there else None for what, file in OPTIONAL.items()))


def _there(artifact: Artifact) -> list[str]:
    return [what for what, file in OPTIONAL.items() if (artifact.path / file).exists()]


def write_keys(device: torch.device, task: KeysTask) -> list[str]:
    """Writes the keys of one shard's images, the names of their files and their tasks, in row order; which of OPTIONAL
    there are."""
    images, artifact = task.images, task.artifact
    if artifact.complete:
        return _there(artifact)
    folder, seen = artifact.begin(), set[str]()

    def noted(what: str, values: Iterable[str | None]) -> Iterator[str | None]:
        for value in values:
            if value:
                seen.add(what)
            yield value or None

    rows = range(len(images))
    write_json_list(folder / KEYS_FILE, lambda: map(images.key, rows))
    write_json_list(folder / NAMES_FILE, lambda: noted("names", map(images.name, rows)))

    def tasks() -> Iterator[str | None]:
        return (named(member.get("task")).name for member in members_of(images, None, None, []))

    write_json_list(folder / TASKS_FILE, lambda: noted("tasks", tasks()))
    artifact.commit(discard=[file for what, file in OPTIONAL.items() if what not in seen])
    return [what for what in OPTIONAL if what in seen]
