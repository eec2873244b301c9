"""How long a run will take, and how much memory and disk: arithmetic on sizes, settings and measured rates.

Shapes: n images, K clusters, D channels, W workers, R ranks of a job.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path

import torch

from grappa_dist.artifacts import finished
from grappa_dist.config import Config
from grappa_dist.console import format_bytes, pluralize
from grappa_dist.distributed import placement
from grappa_dist.distributed.machine import this_machine
from grappa_dist.distributed.placement import WorkerParts, known_workers, may_have_gpus, ranks_of, split_evenly
from grappa_dist.distributed.preflight import free_memory
from grappa_dist.kmeans.methods import CENTROID_BYTES, RankMemory, centroid_shards, fit_pairs, may_shard_centroids
from grappa_dist.kmeans.methods import choose as choose_method
from grappa_dist.layout import on_pairs
from grappa_dist.models.spec import build_backbone
from grappa_dist.progress import duration
from grappa_dist.rates import Rates, measure, some_images, store_rates, stored_rates
from grappa_dist.stages.adapt import LEAST_IMAGES
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.fuse import projector_bytes
from grappa_dist.stages.pseudo_label import num_labels
from grappa_dist.training.batches import rank_share, steps_per_epoch
from grappa_dist.training.memory import LAYERS_AT_WORK, micro_batch_size
from grappa_dist.variants import BACKBONE, VARIANTS, Variant

# Seconds that hardly depend on the sizes, on a CPU core: Ray and its workers until the first task; a job until its
# first step, with its checkpoints; an iteration of k-means beside its products; a model's scores; the report.
START_S, JOB_S, ITERATION_S, SCORE_S, REPORT_S = 14.0, 2.0, 0.02, 0.3, 1.0
PLAIN_FLOPS = 4e10  # of a CPU core for which that holds; slower or busy ones take longer for all of it
COMPUTED = 0.31  # of the pairs of a k-means; bounds spare the others (docs/scale.md)
SEEDED = 2.5  # pairs of first centroids, in n K
PASSES = 6  # products of a layer and an image in a step: forward, and two backward; two operations each
CLASSIFIER_PRODUCTS = 4  # of images and classes: scores, pull, scores again, gradient
DOMINATES, WORTH_S = 0.5, 300.0  # a setting is named from this share of this many seconds on
SHARDED_S = 1e-3  # to copy an image's file into a shard
FEW_SETS = 3
MEASURED_FROM = 100  # training images from which on a run measures the machine
# Bytes: a worker process with its libraries, the driver's; a report with its pictures.
WORKER_BYTES, DRIVER_BYTES, REPORT_BYTES = 700 * 2**20, 700 * 2**20, 16 * 2**20  # docs/scale.md
CHECKPOINTS = 2  # of a job on disk: the newest and the one before


@dataclass(frozen=True)
class Work:
    """What is still to be made."""

    rows: int  # all training images
    test_rows: int  # all images that are evaluated
    num_sets: int
    sharded: int  # images of which shards are to be made
    embedded: tuple[int, ...]  # training images of each shard that has no features
    labels: tuple[int, ...]  # the K without labels
    sets: tuple[int, ...]  # the K without an adaptor set
    fusions: tuple[str, ...]  # variants that are to be trained
    tested: Mapping[str, tuple[int, ...]]  # by model: images of each shard that has no features
    scored: int  # models without scores
    reports: bool

    @property
    def is_nothing(self) -> bool:
        done = not (self.embedded or self.labels or self.sets or self.fusions or self.scored)
        return done and not any(self.tested.values())


def work_of(flow: Flow) -> Work:
    """What a run would make of its artefacts."""
    train, test, known = flow.train.shards, flow.test.shards, set(flow.features)
    return Work(
        rows=len(flow.train),
        test_rows=len(flow.test),
        num_sets=len(flow.adaptors),
        sharded=0,
        embedded=tuple(s.rows for s, there in zip(train, finished(flow.features), strict=True) if not there),
        labels=tuple(k for k, artifact in flow.labels.items() if not artifact.complete),
        sets=tuple(k for k, artifact in flow.adaptors.items() if not artifact.complete),
        fusions=tuple(name for name, artifact in flow.fusions.items() if not artifact.complete),
        tested={
            model: tuple(
                s.rows
                for s, a, there in zip(test, features, finished(features), strict=True)
                if not there and a not in known
            )
            for model, features in flow.test_features.items()
        },
        scored=sum(not (flow.scores[m].complete and flow.insights[m].complete) for m in flow.models),
        reports=not flow.report.complete,
    )


def work_ahead(config: Config, sizes: Mapping[str, int], *, sharded: int, rows_per_shard: int) -> Work:
    """The same of a run of which nothing is there yet, not even its shards.

    Args:
        sizes: how many images there are, train and test.
    """
    rows = sizes["train"]
    test_rows = sizes["test"] if config.has_test else min(rows, config.evaluate.train_images)
    ks = num_labels(config.clustering, rows)
    models = [BACKBONE, *(f"k={k}" for k in ks), *config.fused]
    shards, tested = (tuple(map(len, split_evenly(range(n), rows_per_shard))) for n in (rows, test_rows))
    same = not config.has_test  # training images are looked at, and have their features
    return Work(
        rows=rows,
        test_rows=test_rows,
        num_sets=len(ks),
        sharded=sharded,
        embedded=shards,
        labels=ks,
        sets=ks,
        fusions=tuple(on_pairs(config, len(ks))),
        tested={model: () if same and model == BACKBONE else tested for model in models},
        scored=len(models),
        reports=True,
    )


@dataclass(frozen=True)
class Estimator:
    """Seconds of the stages of a run.

    Args:
        dim: D.
    """

    config: Config
    work: Work
    rates: Rates
    dim: int

    def stages(self) -> dict[str, float]:
        """By stage, those that have something to do; embedding for the evaluation counts as that."""
        parts = self.parts()
        if not parts:
            return {}
        tested_s = sum(parts.get("embed", [])[bool(self.work.embedded) :])
        found = {stage: sum(seconds) for stage, seconds in parts.items()}
        found |= {"embed": found.get("embed", 0.0) - tested_s, "evaluate": found.get("evaluate", 0.0) + tested_s}
        return {stage: seconds for stage, seconds in found.items() if seconds}

    def parts(self) -> dict[str, list[float]]:
        """By stage as a run names it, in the order in which its parts come; the start of the workers is one of them."""
        work = self.work
        if work.is_nothing:
            return {"report": [self._fixed(REPORT_S)]} if work.reports else {}
        passes = [{BACKBONE: work.embedded}, *self._passes()]
        found = {
            "start": [self._fixed(START_S)],
            "shards": [SHARDED_S * work.sharded],
            "embed": [self._embed(models) for models in passes if any(models.values())],
            "pseudo_label": [sum(map(self._cluster, work.labels))],
            "adapt": [self._adapt()],
            "fuse": list(map(self._fuse, work.fusions)),
            "evaluate": [self._evaluate()],
            "report": [self._fixed(REPORT_S)],
        }
        return {stage: seconds for stage, seconds in found.items() if any(seconds)}

    @property
    def workers(self) -> int:
        """W; where only a cluster knows it, those of this machine."""
        found = known_workers(self.config.resources)
        return found or max(1, torch.cuda.device_count() if may_have_gpus(self.config.resources) else 1)

    def _fixed(self, seconds: float) -> float:
        """What takes so long on a plain core, here."""
        return seconds * max(1.0, PLAIN_FLOPS / self.rates.flops)

    def _passes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Of the passes over the images that are evaluated: by model, images of each shard that it lacks."""
        for per_gallery in (False, True):  # these read the others' features first
            models = [m for m in self.work.tested if (m in VARIANTS and VARIANTS[m].per_gallery) == per_gallery]
            yield {model: self.work.tested[model] for model in models}

    def _embed(self, models: Mapping[str, Sequence[int]]) -> float:
        """A pass that reads each image once."""
        names, of_shards = list(models), zip_longest(*models.values(), fillvalue=0)
        return makespan((self._shard_s(dict(zip(names, rows, strict=True))) for rows in of_shards), self.workers)

    def _shard_s(self, rows: Mapping[str, int]) -> float:
        """Of a shard with so many images, by model."""
        size = self.config.embed.batch_size  # batches are padded to it
        compute_s = sum(-(-n // size) * size * self._forward_s(model) for model, n in rows.items())
        return self.rates.image_s(max(rows.values()) * self.rates.decode_s, compute_s)

    def _cluster(self, k: int) -> float:
        settings, ranks = self.config.clustering, min(self.workers, max(1, len(self.work.embedded) or self.workers))
        name = choose_method(settings, k, self.work.rows).name
        pairs = COMPUTED * fit_pairs(name, settings, k, self.work.rows) + SEEDED * self.work.rows * k
        products_s = 2 * self.dim * pairs / (self.rates.flops * ranks)
        return settings.restarts * (products_s + settings.iterations * self._fixed(ITERATION_S))

    def _adapt(self) -> float:
        adapt, ranks = self.config.adapt, ranks_of(self.config.resources, self.workers)
        slots = max(1, self.workers // ranks)
        per_job = adapt.sets_per_job
        if per_job == "auto":
            read = placement.Rates(self.rates.augment_s, self.rates.shared_s, self.rates.set_s, self.rates.on_gpu)
            per_job = placement.sets_per_job(max(1, len(self.work.sets)), slots, read)
        return makespan((self._job_s(job, ranks) for job in split_evenly(self.work.sets, per_job)), slots)

    def _job_s(self, sets: Sequence[int], ranks: int) -> float:
        adapt, rows = self.config.adapt, self.work.rows
        shared_s = self.rates.shared_s + len(sets) * self.rates.set_s
        forward_s = self.rates.forward_s if adapt.activation_checkpointing else 0.0
        image_s = self.rates.image_s(self.rates.augment_s, shared_s + forward_s)
        classes = adapt.sampled_classes * sum(sets)
        class_s = 2 * CLASSIFIER_PRODUCTS * rows * classes * self.dim / self.rates.flops
        step_s = self.rates.weight_s * 3 * self.dim * classes * steps_per_epoch(rows, adapt.global_batch)
        return self._fixed(JOB_S) + adapt.epochs * (rows * image_s + class_s + step_s) / ranks

    def _fuse(self, name: str) -> float:
        fuse, variant, rows = self.config.fuse, Variant.parse(name), self.work.rows
        share = -(-fuse.global_batch // self.workers)
        views = 1 if variant.labels else 2
        whole = fuse.micro_batch == "auto" or views * share <= fuse.micro_batch
        again_s = 0.0 if whole else self.rates.adapted_s  # features first, then gradients
        image_s = self.rates.image_s(self.rates.augment_s, self.rates.fused_s + again_s)
        steps = fuse.epochs * steps_per_epoch(rows, fuse.global_batch)
        seconds = fuse.epochs * rows * views * image_s / self.workers
        seconds += 0 if variant.labels else steps * self.projector_s()
        if variant.pairs == "neighbours":
            features_s = rows * self.rates.image_s(self.rates.decode_s, self.rates.adapted_s)
            graph_s = features_s + 2 * self.dim * rows**2 / self.rates.flops
            seconds += (fuse.epochs if fuse.refresh else 1) * graph_s / self.workers
        return self._fixed(JOB_S) + seconds

    def projector_s(self) -> float:
        """Of a step: products with its weights and of the correlation matrix, and the update of the weights."""
        fuse = self.config.fuse
        share, width = fuse.global_batch / self.workers, fuse.projector[-1]
        weights = self.projector_weights
        products = 2 * PASSES * share * weights + PASSES * share * width**2
        return products / self.rates.flops + self.rates.weight_s * (weights + width**2 / self.workers)

    @property
    def projector_weights(self) -> int:
        return sum(a * b for a, b in pairwise([self.dim, *self.config.fuse.projector]))

    def _forward_s(self, model: str) -> float:
        """Of an image, by a model of the table."""
        extra_s = max(0.0, self.rates.adapted_s - self.rates.forward_s)  # of all adaptor sets
        if model == BACKBONE:
            return self.rates.forward_s
        return self.rates.forward_s + (extra_s / max(1, self.work.num_sets) if model.startswith("k=") else extra_s)

    def _evaluate(self) -> float:
        """One job on all workers: views are decoded once, and each model embeds them and scores the queries."""
        rows, rates, models = self.work.test_rows, self.rates, self.work.scored
        views = min(self.config.evaluate.view_queries, rows)
        model_s = views * rates.adapted_s + 2 * self.dim * rows**2 / rates.flops
        decode_s = views * rates.augment_s if models else 0.0
        return models * self._fixed(SCORE_S) + (decode_s + models * model_s) / self.workers


def makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of some tasks ends, each taken in order by whoever is free first."""
    free = [0.0] * slots
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def expected(
    config: Config, root: Path, flow: Flow, measuring: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Estimator | None:
    """What a run expects, by rates that it has stored, or measures and stores; None where neither is worth it.

    Nothing is measured for few images, for a cluster, whose machines may be others, or where there is a GPU, whose
    memory is the workers'.

    Args:
        measuring: entered while the machine is measured, which takes some ten seconds.
    """
    work, ks = work_of(flow), tuple(flow.labels)
    rates = stored_rates(root, config, len(ks))
    if rates is None:
        if work.is_nothing or len(flow.train) < MEASURED_FROM or may_have_gpus(config.resources):
            return None
        backbone = build_backbone(config.backbone, pretrained=False)
        files = some_images(flow.train)
        with measuring():
            rates = measure(config, len(ks), backbone, files, fuses=bool(on_pairs(config, len(ks))))
        store_rates(root, rates)
    return Estimator(config, work, rates, rates.sizes.channels)


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes, and that are free."""

    worker: int  # memory of a worker in the stage that takes most
    stage: str  # which one that is
    workers: int  # on this machine
    memory_free: int
    disk: int
    disk_free: int

    def lines(self) -> Iterator[str]:
        """For the plan, with a warning where something does not fit."""
        needed = self.workers * self.worker + DRIVER_BYTES
        yield (
            f"memory         about {format_bytes(self.worker)} a worker ({self.stage}), {format_bytes(needed)} for "
            f"{pluralize(self.workers, 'worker')} and the driver; {format_bytes(self.memory_free)} are free here"
        )
        if needed > self.memory_free:
            yield (
                "warning: memory may not do for that: lower resources.workers, or embed.batch_size, adapt.micro_batch, "
                "fuse.micro_batch or fuse.projector"
            )
        yield f"disk           about {format_bytes(self.disk)}; {format_bytes(self.disk_free)} are free there"
        if self.disk > self.disk_free:
            yield "warning: the disk is too small for that: choose another run directory (--out)"


def needs(estimator: Estimator, root: Path, *, sharded_bytes: int = 0) -> Needs:
    """Memory and disk of a run on this machine.

    Args:
        sharded_bytes: of images that become shards in the run directory.
    """
    found = _memory(estimator)
    stage = max(found, key=lambda name: found[name])
    on_gpu, cores = may_have_gpus(estimator.config.resources), len(os.sched_getaffinity(0))
    here = min(estimator.workers, max(1, torch.cuda.device_count() if on_gpu else cores))
    place = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    return Needs(found[stage], stage, here, free_memory(), _disk(estimator) + sharded_bytes, free)


def _memory(estimator: Estimator) -> dict[str, int]:
    """Bytes of a worker by stage; on a GPU only what is in the memory of the machine."""
    config, dim, work = estimator.config, estimator.dim, estimator.work
    adapt, fuse, ranks = config.adapt, config.fuse, ranks_of(config.resources, estimator.workers)
    sizes = estimator.rates.sizes
    readers = WorkerParts.here(config.resources).decode_threads
    batches = 5 * 3 * sizes.image_size**2 * readers  # pixels read ahead, as bytes and once as floats
    base, ks = WORKER_BYTES + 4 * sizes.weights, sorted(work.labels or work.sets, reverse=True)
    found = {
        "embed": base + config.embed.batch_size * batches,
        "pseudo_label": base + (centroid_bytes(config, ks[0], work.rows, dim) if ks else 0),
    }
    if may_have_gpus(config.resources):
        return found
    image = sizes.image_bytes(recompute=adapt.activation_checkpointing)
    of_layer = sizes.image_bytes(recompute=False) // (sizes.layers + LAYERS_AT_WORK - 1)
    found["embed"] += config.embed.batch_size * 2 * of_layer
    per_job = 1 if adapt.sets_per_job == "auto" else min(adapt.sets_per_job, max(1, len(ks)))
    share = rank_share(adapt.global_batch, ranks, config.data.streams)
    asked = LEAST_IMAGES if adapt.micro_batch == "auto" else adapt.micro_batch
    at_once = micro_batch_size(asked, share, per_job, on_gpu=False)
    if work.sets:
        classifier = 12 * sum(ks[:per_job]) * dim // ranks
        found["adapt"] = base + per_job * at_once * image + classifier + share * batches
    if work.fusions:
        at_once = LEAST_IMAGES if fuse.micro_batch == "auto" else fuse.micro_batch
        pairs = min(at_once, 2 * fuse.global_batch) * image
        found["fuse"] = base + pairs + projector_bytes(estimator.projector_weights) + 4 * fuse.projector[-1] ** 2
    return found


def centroid_bytes(config: Config, num_labels: int, num_rows: int, dim: int) -> int:
    """What a rank of k-means holds for its slice of the centroids of a K."""
    return CENTROID_BYTES * num_labels * dim // centroid_slices(config, num_labels, num_rows, dim)


def centroid_slices(config: Config, num_labels: int, num_rows: int, dim: int) -> int:
    """How many slices the centroids of a K will have; 1 also where only a cluster knows its memory."""
    asked, workers = config.resources.centroid_shards, known_workers(config.resources)
    may_shard = may_shard_centroids(config.clustering, choose_method(config.clustering, num_labels, num_rows))
    if not may_shard or may_have_gpus(config.resources):
        return 1
    if asked != "auto" or workers is None:
        return 1 if asked == "auto" else asked
    return centroid_shards(asked, num_labels, dim, RankMemory(workers, this_machine().memory_bytes // workers))


def _disk(estimator: Estimator) -> int:
    """Bytes in the run directory: features, labels, graphs, checkpoints of the largest job."""
    config, work, dim = estimator.config, estimator.work, estimator.dim
    rows = sum(work.embedded) + sum(map(sum, work.tested.values()))
    weights = estimator.projector_weights if work.fusions else 0
    graphs = sum(Variant.parse(name).pairs == "neighbours" for name in work.fusions)
    per_row = 4 * dim * rows + 4 * len(work.labels) * work.rows + 8 * config.fuse.neighbours * graphs * work.rows
    return per_row + CHECKPOINTS * 8 * weights + CHECKPOINTS * 12 * dim * sum(work.sets) + REPORT_BYTES


def dominating(estimator: Estimator) -> str:
    """A warning where one setting takes most of a long run; else ""."""
    total = sum(estimator.stages().values())
    if total < WORTH_S:
        return ""
    for each in _cheaper(estimator):
        seconds = sum(each.of(estimator).stages().values())
        if 1 - seconds / total >= DOMINATES:
            return (
                f"warning: {each.setting}={each.now} takes {1 - seconds / total:.0%} of the time; with "
                f"{each.setting}={each.value} the run takes about {duration(seconds)}"
            )
    return ""


@dataclass(frozen=True)
class Cheaper:
    """A setting that may take most of the time, and a value that takes less."""

    setting: str
    now: str
    value: str
    config: Config
    work: Work

    def of(self, estimator: Estimator) -> Estimator:
        return replace(estimator, config=self.config, work=self.work)


def _cheaper(estimator: Estimator) -> Iterator[Cheaper]:
    """What is looked at, first what changes the method least."""
    config, work = estimator.config, estimator.work
    fuse, trained = config.fuse, set(work.fusions)
    narrow, kept = tuple(min(w, 1024) for w in fuse.projector), [v for v in fuse.variants if v not in trained]
    if trained and narrow != fuse.projector:
        changed = _changed(config, "fuse", projector=narrow)
        yield Cheaper("fuse.projector", _list(fuse.projector), _list(narrow), changed, work)
    if len(work.sets) > FEW_SETS:
        ks = sorted(work.sets)
        few = (ks[0], ks[len(ks) // 2], ks[-1])
        left = {m: shards for m, shards in work.tested.items() if m not in {f"k={k}" for k in set(ks) - set(few)}}
        less = replace(work, labels=few, sets=few, tested=left, scored=work.scored - len(ks) + len(few))
        changed = _changed(config, "clustering", num_labels=few)
        yield Cheaper("clustering.num_labels", _list(ks), _list(few), changed, less)
    if trained and kept:
        left = {model: shards for model, shards in work.tested.items() if model not in trained}
        less = replace(work, fusions=(), tested=left, scored=max(0, work.scored - len(trained)))
        changed = _changed(config, "fuse", variants=tuple(kept))
        yield Cheaper("fuse.variants", _list(fuse.variants), _list(kept), changed, less)
    if (epochs := config.adapt.epochs) > 1 and work.sets:
        fewer = max(1, epochs // 3)
        yield Cheaper("adapt.epochs", str(epochs), str(fewer), _changed(config, "adapt", epochs=fewer), work)


def _changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _list(values: Sequence[object]) -> str:
    """As a setting is written."""
    return f"[{', '.join(map(str, values))}]"


def describe_seconds(estimator: Estimator) -> tuple[str, str]:
    """How long the run will take, and its stages."""
    stages = estimator.stages()
    if not stages:
        return "nothing is left to be made", ""
    total = f"about {duration(sum(stages.values()))} on {pluralize(estimator.workers, 'worker')}"
    return total, ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages.items())
