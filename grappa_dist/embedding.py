"""Embeds any shards with an exported model: what a search index is filled with.

Shapes: P rows of one shard, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grappa_dist.artifacts import Artifact, Store, wait_until_seen
from grappa_dist.config_file import read
from grappa_dist.data.index import Shard
from grappa_dist.data.losses import losses_in_words
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_json
from grappa_dist.stages.collect import cache_of
from grappa_dist.stages.embed import BAD_FILE, ROWS_FILE, embed, features_of
from grappa_dist.stages.modelling import ModelSpec, exported_spec
from grappa_dist.stages.run import Run, running

KEYS_FILE, LIST_FILE = "keys.json", "embeddings.json"


@dataclass(frozen=True)
class KeysTask:
    images: ImageShards  # the shard alone
    artifact: Artifact


def embed_images(
    model: Path, paths: Sequence[str], out: Path, overrides: Iterable[str] = (), *, gallery: str | None = None
) -> Path:
    """Embeds the images of some shards; the list of what there is then, `embeddings.json` in `out`.

    Per shard it names `rows`, unit rows (P, D) float32, and `keys`, the images' keys in the same order; and `bad`, the
    positions whose image does not decode, with the reason: their rows are zero.

    Args:
        model: a run directory, or that of an exported model.
        overrides: `key=value` of the sections embed, resources and data.
        gallery: which task's weights of the sets are taken, of a model that weighs them by galleries.

    Raises:
        ValueError: there is no such model, or a path or setting is wrong, saying which.
    """
    spec = exported_spec(model, gallery)
    data = {"train": tuple(paths)}
    config = read({"name": "embeddings", "data": data, "backbone": {"name": spec.backbone.name}}, overrides)
    with running(config, out) as run:
        if spec.name == "gallery" and gallery is None:
            run.console.say("warning: the model weighs its sets by galleries and none was named: this is their average")
        return _embed(run, spec)


def _embed(run: Run, spec: ModelSpec) -> Path:
    paths = run.config.data.train
    images = ImageShards.open(paths, run.store.root / "index", cache_of(run.config.resources))
    if not len(images):
        raise ValueError(f"--images {' '.join(paths)}: the shards hold no images (jpg, jpeg, png, webp)")
    for line in losses_in_words(images.shards):
        run.console.say(f"warning: {line}")
    features = features_of(run.store, spec, run.config.embed, images)
    embed(run, images, spec, features)
    keys = [_keys_of(run.store, shard) for shard in images.shards]
    missing = {artifact: i for i, artifact in enumerate(keys) if not artifact.complete}
    if missing:
        with run.console.stage("keys", f"of {len(missing)} shards"):
            run.runner.map(write_keys, [KeysTask(images.part(i), artifact) for artifact, i in missing.items()])
            wait_until_seen(missing)
    shards = [
        {
            "shard": shard.name,
            "images": shard.rows,
            "rows": f"{of_rows.name}/{ROWS_FILE}",
            "keys": f"{of_keys.name}/{KEYS_FILE}",
            "bad": f"{of_rows.name}/{BAD_FILE}",
        }
        for shard, of_rows, of_keys in zip(images.shards, features, keys, strict=True)
    ]
    found = run.store.root / LIST_FILE
    write_json(found, {"model": spec.name, "model_sha256": spec.weights, "images": len(images), "shards": shards})
    return found


def _keys_of(store: Store, shard: Shard) -> Artifact:
    return store.artifact(f"keys/{shard.name.removesuffix('.tar')}", {}, {"shard": shard.fingerprint})


def write_keys(device: torch.device, task: KeysTask) -> None:
    """The keys of one shard's images, in the order of its rows."""
    if not task.artifact.complete:
        folder = task.artifact.begin()
        write_json(folder / KEYS_FILE, [task.images.key(row) for row in range(len(task.images))])
        task.artifact.commit()
