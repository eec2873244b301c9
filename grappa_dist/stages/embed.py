"""embed: images -> row-aligned unit features of the frozen ViT, of the current model of an epoch, or of a final one.

Shapes: P rows of one shard, B the padded batch, S pixels a side, D channels.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, RowArrays, Store, wait_until_seen
from grappa_dist.checksums import MANIFEST, load_json
from grappa_dist.config import BACKBONE, EmbedConfig
from grappa_dist.console import pluralize
from grappa_dist.data.index import Shard, count_missing, describe_missing
from grappa_dist.data.loader import Images, load_or_skip, read_batches
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import pixels_class
from grappa_dist.distributed.worker import report_of_task
from grappa_dist.files import read_json, save_array, write_json
from grappa_dist.models.backbone import forward_precision
from grappa_dist.models.spec import ModelSpec, backbone_settings, cached_model, preprocess_of
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.stages.gallery_weights import by_gallery
from grappa_dist.stages.run import Run

ROWS_FILE, BAD_FILE = "rows.npy", "bad.json"
SUMS_FILE = "sums.npy"  # of features of the frozen backbone: (P,) uint64, xxh3 of every image that was embedded
CHECK_INTERVAL_S = 5.0  # between counts of the bad rows of finished shards
NAMED_BAD = 3  # bad rows that the error names
READ_AT_ONCE = 8  # lists of bad rows: many small files, which take long on a network file system
PLACES, COMPARED = 16, 16  # where features are looked at for all being alike, and rows there: few shards are read
ALIKE = 1e-6  # of a unit row: twice the rounding of float32


@dataclass(frozen=True)
class Embedding:
    """How rows are embedded: the padded batch size is part of the result."""

    batch_size: int
    decode_threads: int


@dataclass(frozen=True)
class EmbedTask:
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
) -> dict[int, str]:
    """Embeds the shards that have no features yet, one task per shard, on all workers.

    Args:
        gone: rows that do not matter, bad or not.

    Returns:
        The bad rows, and why each is bad.

    Raises:
        ValueError: more than data.max_bad_share of the images are bad or missing.
    """
    check_bad_share(images, {}, run.config.data.max_bad_share)  # missing images are known before any is embedded
    missing = list({a: i for i, a in enumerate(features) if not a.complete}.values())  # equal shards share one
    if missing:
        rows = sum(images.shards[i].rows for i in missing)
        reused = sum(artifact.complete for artifact in features)
        what = f"{spec.name}, {pluralize(rows, 'image')} in {pluralize(len(missing), 'shard')}"
        what += f", {reused} reused" if reused else ""
        with run.console.stage("embed", what):
            how = Embedding(run.config.embed.batch_size, run.config.resources.decode_threads)
            tasks = [EmbedTask(images.part(i), images.shard_rows(i).start, spec, features[i], how) for i in missing]
            counter = run.console.counter(f"embed {spec.name}", [images.shards[i].rows for i in missing])
            early = _EarlyCheck(images, features, run.config.data.max_bad_share, gone)

            def done(index: int) -> None:
                counter(index)
                early.check()

            run.runner.map(embed_shard, tasks, done, counter.running)
            wait_until_seen(features)
        if alike := _describe_alike(feature_rows(images, features)):
            run.console.log(f"warning: embed {spec.name}: {alike}")
    reasons = {row: why for row, why in bad_reasons(images, features).items() if row not in gone}
    check_bad_share(images, reasons, run.config.data.max_bad_share)
    return reasons


def embed_shard(device: torch.device, task: EmbedTask) -> None:
    """Embeds one shard and commits its artefact: rows.npy (P, D), and bad.json {position: reason}.

    What the frozen backbone reads, which is the first to read an image, is recorded in sums.npy; others are held
    against that.
    """
    artifact = task.artifact
    if artifact.complete:
        return
    model = cached_model(task.spec, device)
    rows = np.arange(len(task.images)) + task.first
    sums = np.zeros(len(rows), dtype=np.uint64) if task.spec.name == BACKBONE else None
    # what is recorded here is what others are held against
    images = task.images if sums is None else replace(task.images, record=sums, sums=())
    folder = artifact.begin()
    features = np.zeros((len(rows), int(model.embed_dim)), dtype=np.float32)  # type: ignore[arg-type]
    reasons: dict[int, str] = {}
    report, began, done = report_of_task(), time.monotonic(), 0
    for part in by_gallery(task.spec, model, rows):
        inside = part - task.first
        for place, unit, bad in embed_rows(model, images, inside, device=device, how=task.how):
            features[inside[place]] = unit
            reasons |= bad
            done += len(unit)
            report({"done": done, "seconds": time.monotonic() - began})
    save_array(folder / ROWS_FILE, features)
    if sums is not None:
        save_array(folder / SUMS_FILE, sums)
    write_json(folder / BAD_FILE, {str(row): why for row, why in reasons.items()})
    artifact.commit()


@torch.inference_mode()
def embed_rows(
    model: nn.Module, images: Images, rows: NDArray[np.int64], *, device: torch.device, how: Embedding
) -> Iterator[tuple[slice, NDArray[np.float32], dict[int, str]]]:
    """Yields by batch: the place in `rows`, unit features (b, D), and why rows do not decode; these have zeros."""
    preprocess = preprocess_of(model)
    shape = (preprocess.image_size, preprocess.image_size, 3)
    starts = range(0, len(rows), how.batch_size)

    def read(start: int) -> tuple[NDArray[np.uint8], dict[int, str]]:
        part = rows[start : start + how.batch_size]
        return load_or_skip(images, part, lambda image, _: preprocess.test(image), shape)

    batches = read_batches(starts, read, threads=how.decode_threads)
    for start, (pixels, reasons) in zip(starts, batches, strict=True):
        padded = np.zeros((how.batch_size, *shape), dtype=np.uint8)
        padded[: len(pixels)] = pixels
        with forward_precision(device):
            z = model(to_images(padded, device)).float()[: len(pixels)]
        part = rows[start : start + len(pixels)]
        _refuse_not_finite(z, images, part, reasons)
        unit = to_grid(F.normalize(z, dim=1))  # what is stored is what k-means and k-NN compare, bit for bit
        unit[[i for i, row in enumerate(part.tolist()) if row in reasons]] = 0
        yield slice(start, start + len(pixels)), unit.cpu().numpy(), reasons


def _refuse_not_finite(z: Tensor, images: Images, rows: NDArray[np.int64], reasons: Mapping[int, str]) -> None:
    """Raises ValueError for features that are not finite, of images that decode."""
    wrong = [int(row) for row in rows[~z.isfinite().all(1).cpu().numpy()] if row not in reasons]
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


def to_images(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, S, S, 3) bytes -> (B, 3, S, S) floats in [0, 1] on the device."""
    images = torch.from_numpy(pixels)
    if device.type == "cuda":  # from pinned memory the copy runs while the CPU goes on
        images = images.pin_memory()
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255


def held_against(images: ImageShards, features: Sequence[Artifact]) -> ImageShards:
    """The images, each compared when it is read with what the frozen backbone has read, once its features are there."""
    return replace(images, sums=tuple(str(artifact.path / SUMS_FILE) for artifact in features))


def feature_rows(images: ImageShards, features: Sequence[Artifact]) -> RowArrays:
    """The features of all rows, memory-mapped."""
    return RowArrays.of((artifact.path / ROWS_FILE for artifact in features), images.starts)


def bad_reasons(images: ImageShards, features: Sequence[Artifact]) -> dict[int, str]:
    """Why rows are bad, by row id, over all shards."""
    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for of_shard in pool.map(partial(_bad_of, images), range(len(features)), features):
            reasons |= of_shard
    return reasons


def _bad_of(images: ImageShards, shard: int, artifact: Artifact) -> dict[int, str]:
    first = images.shard_rows(shard).start
    found = load_json(artifact.path / BAD_FILE)
    return {first + int(position): why for position, why in found.items()}


def bad_rows(images: ImageShards, features: Sequence[Artifact]) -> NDArray[np.int64]:
    """Sorted ids of the rows that are bad."""
    return np.array(sorted(bad_reasons(images, features)), dtype=np.int64)


class _EarlyCheck:
    """Stops a run as soon as it is certain that too many rows are bad, not only when all are embedded."""

    def __init__(
        self, images: ImageShards, features: Sequence[Artifact], limit: float, gone: frozenset[int] = frozenset()
    ) -> None:
        self._images, self._limit, self._gone = images, limit, gone
        self._left = dict(enumerate(features))
        self._bad: dict[int, str] = {}
        self._rows = 0  # of the shards that were counted
        self._checked = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._checked < CHECK_INTERVAL_S:
            return
        self._checked = time.monotonic()
        for shard in [shard for shard, artifact in self._left.items() if artifact.complete]:
            bad = _bad_of(self._images, shard, self._left.pop(shard))
            self._bad |= {row: why for row, why in bad.items() if row not in self._gone}
            self._rows += self._images.shards[shard].rows
        check_bad_share(self._images, self._bad, self._limit, rows=self._rows)


def check_bad_share(images: ImageShards, bad: Mapping[int, str], limit: float, rows: int | None = None) -> None:
    """Compares the bad rows, and the missing images that have no row, with the share that is allowed.

    Args:
        rows: how many rows were checked, if not all; the share that the error names assumes that the others are alike.

    Raises:
        ValueError: they are more.
    """
    missing = count_missing(images.shards)
    count, total = len(bad) + missing, len(images) + missing
    if count <= limit * total:
        return
    kinds = Counter(why.partition(":")[0].partition(" (")[0] for why in bad.values()).most_common(3)
    first = "; ".join(f"{images.where(row)}: {bad[row]}" for row in sorted(bad)[:NAMED_BAD])
    counts = [f"{n} x {why}" for why, n in kinds] + [f"about {missing} have no row"] * (missing > 0)
    so_far = f", of {rows} looked at so far" if rows is not None and rows < len(images) else ""
    checked = rows if so_far and rows else len(images)
    expected = len(bad) * len(images) + missing * checked  # bad and missing images of all, times `checked`
    enough = min(1.0, (100 * expected // (checked * total) + 1) / 100 if checked else 1.0)
    unless = ", unless more of the others are bad," if so_far else ""
    kept = f". What is embedded is kept, and{unless} reused with data.max_bad_share={enough}"
    raise ValueError(
        f"embed: {count} of {pluralize(total, 'image')} are bad{so_far} ({', '.join(counts)}), "
        f"data.max_bad_share={limit} allows {limit * total:.0f}. "
        f"The first: {'; '.join([first] * bool(bad) + list(describe_missing(images.shards)))}. "
        "Mend or leave out these shards, or raise data.max_bad_share: bad images take no part in anything"
        f"{kept if bad else ''}"
    )
