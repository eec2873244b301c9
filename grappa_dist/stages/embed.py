"""embed: images -> row-aligned unit features of the frozen ViT, of the current model of an epoch, or of a final one.

Several models of one backbone embed the same images in one pass: an image is read and decoded once, the part of the
backbone before the first adaptor is run once, and each model does the rest. Artefacts are those of each model alone.

Shapes: P rows of one shard, B the padded batch, S pixels a side, D channels, M models.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, RowArrays, Store, finished, wait_until_seen
from grappa_dist.checksums import MANIFEST
from grappa_dist.config import EmbedConfig
from grappa_dist.console import pluralize
from grappa_dist.data.device_batches import HostCopy, Memory, device_batches
from grappa_dist.data.index import Shard
from grappa_dist.data.loader import Images, load_or_skip
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess, pixels_class
from grappa_dist.distributed.sharded_rows import scratch
from grappa_dist.distributed.worker import report_of_task
from grappa_dist.files import read_json, save_array, write_json
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.models import Grappa
from grappa_dist.models.spec import (
    ModelSpec,
    backbone_settings,
    cached_model,
    cached_side_by_side,
    preprocess_of,
)
from grappa_dist.prefetch import Threads
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.stages.bad_rows import BAD_FILE, BadRows, EarlyCheck, bad_reasons, check_bad_share
from grappa_dist.stages.gallery_weights import rows_by_gallery
from grappa_dist.stages.run import Run
from grappa_dist.variants import BACKBONE

ROWS_FILE = "rows.npy"
SUMS_FILE = "sums.npy"  # of features of the frozen backbone: (P,) uint64, xxh3 of every image that was embedded
MOST_SHARDS = 16  # of a task: reading begins anew with each task
TASKS_PER_WORKER = 4  # that the shards which are left would make at least
PLACES, COMPARED = 16, 16  # where features are looked at for all being alike, and rows there: few shards are read
ALIKE = 1e-6  # of a unit row: twice the rounding of float32


@dataclass(frozen=True)
class Embedding:
    """How rows are embedded: the padded batch size is part of the result."""

    batch_size: int
    decode_threads: Threads
    setting: str = "embed.batch_size"  # or option that has the batch size


@dataclass(frozen=True)
class EmbedTask:
    """A shard to embed, by one model or by several of the same backbone."""

    images: ImageShards  # the shard alone
    first: int  # row id of its first image
    models: tuple[tuple[ModelSpec, Artifact], ...]  # with the artefact of each; the frozen backbone first
    how: Embedding

    @property
    def missing(self) -> dict[str, tuple[ModelSpec, Artifact]]:
        """By name, the models without a finished artefact."""
        return {spec.name: (spec, artifact) for spec, artifact in self.models if not artifact.complete}


def features_of(store: Store, spec: ModelSpec, embed: EmbedConfig, images: ImageShards) -> tuple[Artifact, ...]:
    """One artefact per shard, so that new shards alone are embedded.

    An artefact has the name of its shard, and a shard may be renamed: what is missing under the present name, and was
    made of the same bytes under another one, is taken from there.
    """
    settings = {"backbone": backbone_settings(spec.backbone), **embed.model_dump(), "pixels": pixels_class()}

    def of(shard: Shard) -> Artifact:
        kind = f"features/{spec.name}/{shard.name.removesuffix('.tar')}"
        return store.artifact(kind, settings, {"shard": shard.fingerprint, **spec.inputs})

    wanted = [of(shard) for shard in images.shards]
    folder = store.root / "features" / spec.name
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    names = [artifact.name.rpartition("/")[2] for artifact in wanted]  # a path of each would take longer than all else
    others, missing = there.difference(names), [name not in there for name in names]
    if not others or not any(missing):
        return tuple(wanted)
    kinds = _kinds_by_shard(folder / name for name in sorted(others))
    return tuple(
        _made_before(store, artifact, kinds) if is_missing else artifact
        for artifact, is_missing in zip(wanted, missing, strict=True)
    )


def _kinds_by_shard(folders: Iterable[Path]) -> dict[str, list[str]]:
    """The kinds of finished features by the fingerprint of their shard."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        with suppress(OSError, ValueError, KeyError, TypeError):  # unfinished, or not ours
            manifest = read_json(folder / MANIFEST)
            found.setdefault(manifest["inputs"]["shard"], []).append(manifest["kind"])
    return found


def _made_before(store: Store, wanted: Artifact, kinds: Mapping[str, Sequence[str]]) -> Artifact:
    """The finished artefact of the same settings and inputs under another name of the shard, else the wanted one."""
    same = (store.artifact(kind, wanted.settings, wanted.inputs) for kind in kinds.get(wanted.inputs["shard"], ()))
    return next((artifact for artifact in same if artifact.complete), wanted)


def embed(
    run: Run, images: ImageShards, spec: ModelSpec, features: Sequence[Artifact], *, gone: frozenset[int] = frozenset()
) -> BadRows:
    """`embed_side_by_side` of one model: the bad rows, and why each is bad."""
    return embed_side_by_side(run, images, {spec.name: spec}, {spec.name: features}, gone=gone)


def embed_side_by_side(
    run: Run,
    images: ImageShards,
    models: Mapping[str, ModelSpec],
    features: Mapping[str, Sequence[Artifact]],
    *,
    gone: frozenset[int] = frozenset(),
) -> BadRows:
    """Embeds the shards that have no features yet, on all workers, each shard by all models that lack it.

    Args:
        models: by name, at least one: an exported model, or models of one backbone with the same galleries or none.
        features: by the same names.
        gone: rows that do not matter, bad or not.

    Returns:
        The bad rows, and why each is bad.

    Raises:
        ValueError: more than data.max_bad_share of the images are bad or missing.
    """
    limit = run.config.data.max_bad_share
    check_bad_share(images, {}, limit)  # missing images are known before any is embedded
    how = Embedding(run.config.embed.batch_size, run.config.resources.decode_threads)
    shards, reused = _shards_to_embed(images, models, features, how)
    lacking = {spec.name for shard in shards for spec, _ in shard.models}
    missing = [name for name in models if name in lacking]
    if shards:
        early = EarlyCheck(images, [*features.values()][-1], limit, gone)  # the last that is committed of a shard
        with run.console.stage("embed", _describe_work(shards, missing, reused)):
            _embed_on_workers(run, shards, missing, early)
        for name in missing:
            if alike := _describe_alike(feature_rows(images, features[name])):
                run.console.log(f"warning: embed {name}: {alike}")
    for of_model in features.values():
        reasons = bad_reasons(images, of_model).without(gone)
        check_bad_share(images, reasons, limit)
    return reasons


def _embed_on_workers(run: Run, shards: Sequence[EmbedTask], missing: Sequence[str], early: EarlyCheck) -> None:
    """Embeds the shards, and shows how far that is.

    Args:
        missing: the models.
    """
    tasks = tasks_of(shards, run.runner.num_workers)
    of = missing[0] if len(missing) == 1 else pluralize(len(missing), "model")
    counter = run.console.counter(f"embed {of}", [sum(len(s.images) for s in task) for task in tasks])

    def done(index: int) -> None:
        counter(index)
        early.check()

    run.runner.map(embed_shards, tasks, done, counter.running)
    wait_until_seen(artifact for shard in shards for _, artifact in shard.models)


def _shards_to_embed(
    images: ImageShards, models: Mapping[str, ModelSpec], features: Mapping[str, Sequence[Artifact]], how: Embedding
) -> tuple[list[EmbedTask], int]:
    """The shards that some models lack, each with these models; and how many shards no model lacks."""
    seen, shards, reused = set[Artifact](), list[EmbedTask](), 0
    there = {name: finished(features[name]) for name in models}
    for shard in range(len(images.shards)):
        lacking = [(spec, features[name][shard]) for name, spec in models.items() if not there[name][shard]]
        missing = tuple(each for each in lacking if each[1] not in seen)  # equal shards share one
        seen |= {artifact for _, artifact in missing}
        reused += not lacking
        if missing:
            shards.append(EmbedTask(images.part(shard), images.shard_rows(shard).start, missing, how))
    return shards, reused


def _describe_work(shards: Sequence[EmbedTask], missing: Sequence[str], reused: int) -> str:
    """What the stage does: models, images and shards, and how many shards are reused."""
    rows = sum(len(shard.images) for shard in shards)
    what = f"{', '.join(missing)}, {pluralize(rows, 'image')} in {pluralize(len(shards), 'shard')}"
    what += f", {reused} reused" if reused else ""
    return what + (", each image read once for all models" if len(missing) > 1 else "")


def tasks_of(shards: Sequence[EmbedTask], workers: int) -> list[tuple[EmbedTask, ...]]:
    """The shards of each task, in order: several at first, single ones at the end, so that no worker ends much later.

    A worker reads on from a shard of its task to the next.
    """
    tasks, first = list[tuple[EmbedTask, ...]](), 0
    while first < len(shards):
        count = (len(shards) - first) // (TASKS_PER_WORKER * workers)
        after = first + max(1, min(MOST_SHARDS, count))
        tasks.append(tuple(shards[first:after]))
        first = after
    return tasks


def embed_shards(device: torch.device, shards: Sequence[EmbedTask]) -> None:
    """Embeds some shards by the models that lack them, and commits the artefacts of each: see `_embed_shard`."""
    left = [_OpenShard.of(shard) for shard in shards if shard.missing]
    if not left:
        return
    model, how = _model_of(left, device), left[0].task.how
    parts = [part for shard in left for part in shard.parts()]
    report, began, done = report_of_task(), time.monotonic(), 0

    def embedded(rows: int) -> None:
        nonlocal done
        done += rows
        report({"done": done, "seconds": time.monotonic() - began})

    with closing(_batches(model, parts, device=device, how=how)) as batches:
        for shard in left:
            _embed_shard(shard, model.dim, batches, embedded)


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is being read."""

    task: EmbedTask
    images: ImageShards
    models: Mapping[str, tuple[ModelSpec, Artifact]]  # that lack it
    sums: NDArray[np.uint64] | None  # (P,) of what the frozen backbone reads, which is the first to read an image

    @staticmethod
    def of(task: EmbedTask) -> _OpenShard:
        missing = task.missing
        if all(spec.name != BACKBONE for spec, _ in missing.values()):
            return _OpenShard(task, task.images, missing, None)
        sums = np.zeros(len(task.images), dtype=np.uint64)
        # what is recorded here is what others are held against
        return _OpenShard(task, replace(task.images, record=sums, sums=()), missing, sums)

    def parts(self) -> list[RowSet]:
        rows = np.arange(len(self.images)) + self.task.first
        galleries = rows_by_gallery(next(spec for spec, _ in self.models.values()), rows)
        return [RowSet(self.images, some - self.task.first, weights, (*self.models,)) for some, weights in galleries]


def _embed_shard(shard: _OpenShard, dim: int, batches: Iterator[_Batch], embedded: Callable[[int], None]) -> None:
    """Commits the artefact of each model: rows.npy (P, D), and bad.json {position: reason}.

    What the frozen backbone reads is recorded in sums.npy; others are held against that. Until the shard is whole its
    rows are in scratch, so memory does not grow with P M D.

    Args:
        batches: of this shard, and then of others.
    """
    shape = (len(shard.models), len(shard.images), dim)
    features, reasons, done = scratch(shape, torch.float32).numpy(), dict[int, str](), 0
    while done < len(shard.images):
        batch = next(batches)
        features[:, batch.rows] = batch.units
        reasons |= batch.reasons
        done += len(batch.rows)
        embedded(len(batch.rows))
    for (spec, artifact), of_model in zip(shard.models.values(), features, strict=True):
        folder = artifact.begin()
        save_array(folder / ROWS_FILE, of_model)
        if spec.name == BACKBONE:
            assert shard.sums is not None
            save_array(folder / SUMS_FILE, shard.sums)
        write_json(folder / BAD_FILE, {str(row): why for row, why in reasons.items()})
        artifact.commit()


@dataclass(frozen=True)
class RowSet:
    """Rows of some images; no batch has rows of two parts."""

    images: Images
    rows: NDArray[np.int64]  # (n,) row ids
    weights: Tensor | None = None  # (N,) of the adaptor sets, that the models get for these rows
    models: tuple[str, ...] = ("",)  # names of the models that embed them


@dataclass(frozen=True)
class Batch:
    """Features of some rows, b."""

    images: Images
    rows: NDArray[np.int64]  # (b,)
    unit: NDArray[np.float32]  # (b, D), zeros for those that do not decode
    reasons: dict[int, str]  # why these do not, by row


@dataclass(frozen=True)
class _Batch:
    """The same by several models."""

    images: Images
    rows: NDArray[np.int64]  # (b,)
    units: NDArray[np.float32]  # (M, b, D)
    reasons: dict[int, str]


@dataclass
class _Model:
    """One model, or several of a backbone that run side by side."""

    models: Mapping[str, nn.Module]  # by name
    run: Callable[[Sequence[nn.Module], Tensor], list[Tensor]]
    _weighed: RowSet | None = None

    @property
    def dim(self) -> int:
        return int(self._first.embed_dim)  # type: ignore[arg-type]

    @property
    def preprocess(self) -> Preprocess:
        return preprocess_of(self._first)

    @property
    def _first(self) -> nn.Module:
        return next(iter(self.models.values()))

    def __call__(self, part: RowSet, images: Tensor) -> list[Tensor]:
        """z (B, D) of each model of the part, of images (B, 3, S, S)."""
        models = [self.models[name] for name in part.models]
        if part.weights is not None and part is not self._weighed:
            for model in models:
                assert isinstance(model, Grappa)
                model.weigh(part.weights)
            self._weighed = part
        return self.run(models, images)


def _alone(models: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    return [model(images) for model in models]


def _model_of(shards: Sequence[_OpenShard], device: torch.device) -> _Model:
    """What embeds some shards, from the models that the worker keeps."""
    specs = {name: spec for shard in shards for name, (spec, _) in shard.models.items()}
    if len(specs) == 1:
        return _Model({name: cached_model(spec, device) for name, spec in specs.items()}, _alone)
    return _Model(*cached_side_by_side([*specs.values()], device))


def embed_rows(
    model: nn.Module, images: Images, rows: NDArray[np.int64], *, device: torch.device, how: Embedding
) -> Iterator[tuple[slice, NDArray[np.float32], dict[int, str]]]:
    """Yields by batch: the place in `rows`, unit features (b, D), and why rows do not decode; these have zeros."""
    done = 0
    with closing(embed_row_sets(model, [RowSet(images, rows)], device=device, how=how)) as batches:
        for batch in batches:
            yield slice(done, done + len(batch.rows)), batch.unit, batch.reasons
            done += len(batch.rows)


def embed_row_sets(
    model: nn.Module, parts: Sequence[RowSet], *, device: torch.device, how: Embedding
) -> Generator[Batch, None, None]:
    """The rows of all parts, batch by batch; images are read ahead, from one part to the next as well.

    On a GPU the features of a batch are waited for when the next one is being computed.
    """
    with closing(_batches(_Model({"": model}, _alone), parts, device=device, how=how)) as batches:
        for batch in batches:
            yield Batch(batch.images, batch.rows, batch.units[0], batch.reasons)


@torch.inference_mode()
def _batches(
    model: _Model, parts: Sequence[RowSet], *, device: torch.device, how: Embedding
) -> Generator[_Batch, None, None]:
    """The same by several models. A batch holds its pixels as bytes and once as floats, what one model computes, two
    sets of tokens that are kept for the next model, and the features of all."""
    preprocess = model.preprocess
    side = preprocess.image_size

    def read(job: tuple[RowSet, int], memory: Memory) -> tuple[RowSet, NDArray[np.int64], dict[int, str]]:
        part, start = job
        rows = part.rows[start : start + how.batch_size]
        pixels = memory((how.batch_size, side, side, 3))
        pixels[len(rows) :] = 0
        into = pixels[: len(rows)]
        _, why = load_or_skip(part.images, rows, lambda image, _: preprocess.test(image), into.shape[1:], into=into)
        return part, rows, why

    jobs = ((part, start) for part in parts for start in range(0, len(part.rows), how.batch_size))
    computed, behind = deque[_Computed](), int(device.type == "cuda")
    reading = device_batches(jobs, read, device, threads=how.decode_threads)
    what = f"embed: a batch of {pluralize(how.batch_size, 'image')} of {side} pixels"
    with closing(reading) as batches, naming_lack_of_memory(what, f"lower {how.setting}={how.batch_size}"):
        for pixels, (part, rows, reasons) in batches:
            computed.append(_compute(model, part, pixels, rows, reasons))
            if len(computed) > behind:
                yield computed.popleft().batch()
    for one in computed:
        yield one.batch()


@dataclass(frozen=True)
class _Computed:
    """A batch whose features may still be computed by the device."""

    part: RowSet
    rows: NDArray[np.int64]
    reasons: dict[int, str]
    features: HostCopy  # unit rows of every model; NaN where features are not finite

    def batch(self) -> _Batch:
        """Waits for the features; a ValueError says which are not finite."""
        units = self.features.array()
        for name, unit in zip(self.part.models, units, strict=True):
            _refuse_not_finite(name, np.isfinite(unit).all(1), self.part.images, self.rows, self.reasons)
        units[:, [i for i, row in enumerate(self.rows.tolist()) if row in self.reasons]] = 0
        # what is stored is what k-means and k-NN compare, bit for bit
        return _Batch(self.part.images, self.rows, to_grid(torch.from_numpy(units)).numpy(), self.reasons)


def _compute(
    model: _Model, part: RowSet, pixels: Tensor, rows: NDArray[np.int64], reasons: dict[int, str]
) -> _Computed:
    found = model(part, to_images(pixels, pixels.device))
    units = torch.stack([F.normalize(z.float()[: len(rows)], dim=1) for z in found])  # one copy to the host
    return _Computed(part, rows, reasons, HostCopy(units))


def _refuse_not_finite(
    name: str, finite: NDArray[np.bool_], images: Images, rows: NDArray[np.int64], reasons: Mapping[int, str]
) -> None:
    """Raises ValueError for features that are not finite, of images that decode.

    Args:
        name: of the model, or "".
        finite: (b,) which are.
    """
    wrong = [int(row) for row in rows[~finite] if row not in reasons]
    if wrong:
        what = f"embed {name}" if name else "embed"
        raise ValueError(
            f"{what}: the model's features are not finite (NaN or infinite) for {pluralize(len(wrong), 'image')} of a "
            f"batch of {len(rows)}, the first is {images.where(wrong[0])}: is a weight of the backbone or an adaptor "
            "not finite, or a value too large for the precision?"
        )


def _describe_alike(features: RowArrays) -> str:
    """A warning if images all have the same feature, by some of them; else ""."""
    count = features.starts[-1]
    places = np.linspace(0, max(0, count - COMPARED), PLACES).astype(np.int64)
    some = np.unique((places[:, None] + np.arange(COMPARED)).clip(max=count - 1))
    rows = features.take(some)
    units = rows[rows.any(1)]  # those of bad images are zero
    if len(units) < 2 or float(np.abs(units - units[0]).max()) > ALIKE:
        return ""
    return (
        f"the features of {len(units)} images that were compared are all alike, so nothing can be told apart: is the "
        "backbone trained, and are mean and std those that it was trained with?"
    )


def to_images(pixels: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """(B, S, S, 3) bytes, on the device or not, -> (B, 3, S, S) floats in [0, 1] on the device."""
    images = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
    return images.to(device).permute(0, 3, 1, 2).float() / 255


def held_against(images: ImageShards, features: Sequence[Artifact]) -> ImageShards:
    """The images, each compared when it is read with what the frozen backbone has read, once its features are there."""
    return replace(images, sums=tuple(str(artifact.path / SUMS_FILE) for artifact in features))


def feature_rows(images: ImageShards, features: Sequence[Artifact]) -> RowArrays:
    """The features of all rows, memory-mapped."""
    return RowArrays.of((artifact.path / ROWS_FILE for artifact in features), images.starts)
