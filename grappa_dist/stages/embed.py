"""embed: images -> row-aligned unit features of the frozen ViT, of the current model of an epoch, or of a final one.

Shapes: P rows of one shard, B the padded batch, S pixels a side, D channels.
"""

from __future__ import annotations

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
from grappa_dist.config import BACKBONE, EmbedConfig
from grappa_dist.console import pluralize
from grappa_dist.data.device_batches import HostCopy, Memory, device_batches
from grappa_dist.data.index import Shard
from grappa_dist.data.loader import Images, load_or_skip
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import pixels_class
from grappa_dist.distributed.worker import report_of_task
from grappa_dist.files import read_json, save_array, write_json
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ModelSpec, backbone_settings, cached_model, preprocess_of
from grappa_dist.prefetch import Threads
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.stages.bad_rows import BAD_FILE, BadRows, EarlyCheck, bad_reasons, check_bad_share
from grappa_dist.stages.gallery_weights import rows_by_gallery
from grappa_dist.stages.run import Run

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
    """A shard to embed."""

    images: ImageShards  # the shard alone
    first: int  # row id of its first image
    spec: ModelSpec
    artifact: Artifact
    how: Embedding


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
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = there - {artifact.path.name for artifact in wanted}
    missing = [artifact.path.name not in there for artifact in wanted]
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
    """Embeds the shards that have no features yet, on all workers.

    Args:
        gone: rows that do not matter, bad or not.

    Returns:
        The bad rows, and why each is bad.

    Raises:
        ValueError: more than data.max_bad_share of the images are bad or missing.
    """
    check_bad_share(images, {}, run.config.data.max_bad_share)  # missing images are known before any is embedded
    there = finished(features)
    missing = list({a: i for i, a in enumerate(features) if not there[i]}.values())  # equal shards share one
    if missing:
        rows = sum(images.shards[i].rows for i in missing)
        reused = sum(there)
        what = f"{spec.name}, {pluralize(rows, 'image')} in {pluralize(len(missing), 'shard')}"
        what += f", {reused} reused" if reused else ""
        with run.console.stage("embed", what):
            how = Embedding(run.config.embed.batch_size, run.config.resources.decode_threads)
            shards = [EmbedTask(images.part(i), images.shard_rows(i).start, spec, features[i], how) for i in missing]
            tasks = tasks_of(shards, run.runner.num_workers)
            counter = run.console.counter(f"embed {spec.name}", [sum(len(s.images) for s in task) for task in tasks])
            early = EarlyCheck(images, features, run.config.data.max_bad_share, gone)

            def done(index: int) -> None:
                counter(index)
                early.check()

            run.runner.map(embed_shards, tasks, done, counter.running)
            wait_until_seen(features)
        if alike := _describe_alike(feature_rows(images, features)):
            run.console.log(f"warning: embed {spec.name}: {alike}")
    reasons = bad_reasons(images, features).without(gone)
    check_bad_share(images, reasons, run.config.data.max_bad_share)
    return reasons


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
    """Embeds some shards by one model and commits the artefact of each: see `_embed_shard`."""
    left = [_OpenShard.of(shard) for shard in shards if not shard.artifact.complete]
    if not left:
        return
    model, how = cached_model(left[0].task.spec, device), left[0].task.how
    parts = [part for shard in left for part in shard.parts()]
    report, began, done = report_of_task(), time.monotonic(), 0

    def embedded(rows: int) -> None:
        nonlocal done
        done += rows
        report({"done": done, "seconds": time.monotonic() - began})

    with closing(embed_row_sets(model, parts, device=device, how=how)) as batches:
        for shard in left:
            _embed_shard(shard, int(model.embed_dim), batches, embedded)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is being read."""

    task: EmbedTask
    images: ImageShards
    sums: NDArray[np.uint64] | None  # (P,) of what the frozen backbone reads, which is the first to read an image

    @staticmethod
    def of(task: EmbedTask) -> _OpenShard:
        if task.spec.name != BACKBONE:
            return _OpenShard(task, task.images, None)
        sums = np.zeros(len(task.images), dtype=np.uint64)
        # what is recorded here is what others are held against
        return _OpenShard(task, replace(task.images, record=sums, sums=()), sums)

    def parts(self) -> list[RowSet]:
        rows = np.arange(len(self.images)) + self.task.first
        galleries = rows_by_gallery(self.task.spec, rows)
        return [RowSet(self.images, some - self.task.first, weights) for some, weights in galleries]


def _embed_shard(shard: _OpenShard, dim: int, batches: Iterator[Batch], embedded: Callable[[int], None]) -> None:
    """Commits the artefact of a shard: rows.npy (P, D), and bad.json {position: reason}.

    What the frozen backbone reads is recorded in sums.npy; others are held against that.

    Args:
        batches: of this shard, and then of others.
    """
    artifact = shard.task.artifact
    folder = artifact.begin()
    features, reasons, done = np.zeros((len(shard.images), dim), dtype=np.float32), dict[int, str](), 0
    while done < len(features):
        batch = next(batches)
        features[batch.rows] = batch.unit
        reasons |= batch.reasons
        done += len(batch.rows)
        embedded(len(batch.rows))
    save_array(folder / ROWS_FILE, features)
    if shard.sums is not None:
        save_array(folder / SUMS_FILE, shard.sums)
    write_json(folder / BAD_FILE, {str(row): why for row, why in reasons.items()})
    artifact.commit()


@dataclass(frozen=True)
class RowSet:
    """Rows of some images; no batch has rows of two parts."""

    images: Images
    rows: NDArray[np.int64]  # (n,) row ids
    weights: Tensor | None = None  # (N,) of the adaptor sets, that the model gets for these rows


@dataclass(frozen=True)
class Batch:
    """Features of some rows, b."""

    images: Images
    rows: NDArray[np.int64]  # (b,)
    unit: NDArray[np.float32]  # (b, D), zeros for those that do not decode
    reasons: dict[int, str]  # why these do not, by row


def embed_rows(
    model: nn.Module, images: Images, rows: NDArray[np.int64], *, device: torch.device, how: Embedding
) -> Iterator[tuple[slice, NDArray[np.float32], dict[int, str]]]:
    """Yields by batch: the place in `rows`, unit features (b, D), and why rows do not decode; these have zeros."""
    done = 0
    with closing(embed_row_sets(model, [RowSet(images, rows)], device=device, how=how)) as batches:
        for batch in batches:
            yield slice(done, done + len(batch.rows)), batch.unit, batch.reasons
            done += len(batch.rows)


@torch.inference_mode()
def embed_row_sets(
    model: nn.Module, parts: Sequence[RowSet], *, device: torch.device, how: Embedding
) -> Generator[Batch, None, None]:
    """The rows of all parts, batch by batch; images are read ahead, from one part to the next as well.

    On a GPU the features of a batch are waited for when the next one is being computed.
    """
    preprocess = preprocess_of(model)
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
    computed, behind, weighed = deque[_Computed](), int(device.type == "cuda"), None
    reading = device_batches(jobs, read, device, threads=how.decode_threads)
    what = f"embed: a batch of {pluralize(how.batch_size, 'image')} of {side} pixels"
    with closing(reading) as batches, naming_lack_of_memory(what, f"lower {how.setting}={how.batch_size}"):
        for pixels, (part, rows, reasons) in batches:
            if part.weights is not None and part is not weighed:
                assert isinstance(model, Grappa)
                model.weigh(part.weights)
                weighed = part
            computed.append(_compute(model, pixels, part.images, rows, reasons))
            if len(computed) > behind:
                yield computed.popleft().batch()
    for one in computed:
        yield one.batch()


@dataclass(frozen=True)
class _Computed:
    """A batch whose features may still be computed by the device."""

    images: Images
    rows: NDArray[np.int64]
    reasons: dict[int, str]
    features: HostCopy  # unit rows; NaN where features are not finite

    def batch(self) -> Batch:
        """Waits for the features; a ValueError says which are not finite."""
        unit = self.features.array()
        _refuse_not_finite(np.isfinite(unit).all(1), self.images, self.rows, self.reasons)
        unit[[i for i, row in enumerate(self.rows.tolist()) if row in self.reasons]] = 0
        # what is stored is what k-means and k-NN compare, bit for bit
        return Batch(self.images, self.rows, to_grid(torch.from_numpy(unit)).numpy(), self.reasons)


def _compute(
    model: nn.Module, pixels: Tensor, images: Images, rows: NDArray[np.int64], reasons: dict[int, str]
) -> _Computed:
    z = model(to_images(pixels, pixels.device)).float()[: len(rows)]
    return _Computed(images, rows, reasons, HostCopy(F.normalize(z, dim=1)))


def _refuse_not_finite(
    finite: NDArray[np.bool_], images: Images, rows: NDArray[np.int64], reasons: Mapping[int, str]
) -> None:
    """Raises ValueError for features that are not finite, of images that decode.

    Args:
        finite: (b,) which are.
    """
    wrong = [int(row) for row in rows[~finite] if row not in reasons]
    if wrong:
        raise ValueError(
            f"embed: the model's features are not finite (NaN or infinite) for {pluralize(len(wrong), 'image')} of a "
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
