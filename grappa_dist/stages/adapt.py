"""adapt: images + one partition P_i -> the adaptor set of P_i (step 2 of the paper).

A job trains one set or several in its own process group. Jobs run side by side as far as there are workers.
With `adapt.sets_per_job=auto` one worker is measured on a few images: how fast it decodes and trains, and what that
takes of its memory. These figures decide where sets are trained, never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, label_rows, wait_until_seen
from grappa_dist.config import AdaptConfig, BackboneConfig, Config, DataConfig
from grappa_dist.console import pluralize
from grappa_dist.data.loader import read_batches
from grappa_dist.data.rng import Purpose, torch_seed
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.placement import Rates, describe_placement, ranks_of, sets_per_job
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.worker import release_memory
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone, release_cached_model
from grappa_dist.prefetch import threads_here
from grappa_dist.search.backends import least_seconds
from grappa_dist.stages.adapt_job import AdaptJob, starting_centroids, train_adaptors
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.multi_set_jobs import AdaptSet, commit_leftovers, fresh_sets, jobs_of
from grappa_dist.stages.run import Run
from grappa_dist.training.batches import TrainingImages, Turns, augmented, describe_idle_ranks, trained_by
from grappa_dist.training.figures import Pace
from grappa_dist.training.memory import MemoryBudget, images_that_fit, memory_budget, micro_batch_size, usable_bytes
from grappa_dist.training.trackers import check_trackers

LEAST_IMAGES = 8  # at a time, for which a multi-set job must have memory
CPU_IMAGES, GPU_IMAGES, REPEATS = 8, 128, 3  # of a measurement


def adaptors_of(
    store: Store,
    backbone: BackboneConfig,
    adapt: AdaptConfig,
    data: DataConfig,
    seed: int,
    labels: Artifact,
    *,
    name: str = "",
) -> Artifact:
    """The artefact of the set of a partition, or one of another name."""
    settings = trained_by(backbone, data, seed, adapt=adapt.of_result())
    kind = f"adaptors/{name or labels.kind.removeprefix('labels/')}"
    return store.artifact(kind, settings, {"labels": labels})


def adapt(
    run: Run,
    adaptors: Mapping[int, Artifact],
    labels: Mapping[int, Artifact],
    images: ImageShards,
    bad: NDArray[np.int64],
    *,
    turns: Turns | None = None,
) -> None:
    """Trains every adaptor set that does not exist yet, several in a job and jobs side by side as asked for.

    Args:
        turns: images that are shown in place of others, with `data.duplicates=weigh`.
    """
    sets = [
        _set(run.config, k, labels[k], adaptors[k], images) for k in adaptors
    ]  # complete ones too: a multi-set job may lack only one
    train_sets(run, sets, images, bad, turns=turns)


def _set(config: Config, k: int, labels: Artifact, adaptors: Artifact, images: ImageShards) -> AdaptSet:
    return AdaptSet(k, label_rows(labels, images.starts, k), adaptors, starting_centroids(config.adapt, labels))


def train_sets(
    run: Run, sets: Sequence[AdaptSet], images: ImageShards, bad: NDArray[np.int64], *, turns: Turns | None = None
) -> None:
    """Trains those of the sets that are missing on all images but the rows `bad`."""
    config = run.config
    commit_leftovers(sets)
    missing = [one for one in sets if not one.artifact.complete]
    if not missing:
        return
    check_trackers(config.resources.trackers)
    training = TrainingImages.of(config, images, bad, config.adapt.global_batch, turns=turns)
    whole = AdaptJob(tuple(missing), training, config.backbone, config.adapt, config.resources.trackers)
    what = f"{pluralize(len(missing), 'adaptor set')} of {training.num_steps(config.adapt.epochs)} steps"
    with run.console.stage("adapt", what):
        pace = Pace.of(config.resources)
        whole = replace(whole, sharing=run.runner.sharing, compiled=config.resources.compile == "auto", pace=pace)
        jobs = [replace(whole, sets=members) for members in jobs_of(sets, _per_job(run, whole, fresh_sets(sets)))]
        workers = run.runner.num_workers
        ranks = ranks_of(config.resources, workers)
        run.console.log(f"adapt: {describe_placement(len(jobs), workers, ranks)}")
        if idle := describe_idle_ranks(config.data, ranks):
            run.console.log(f"adapt: {idle}")
        run.runner.run_jobs(
            [Job(job.name, train_adaptors, job, config.resources.adapt_ranks) for job in jobs],
            lambda name: run.console.log(f"adapt: {name} is trained"),
        )
        wait_until_seen(one.artifact for one in missing)
        commit_leftovers(sets)  # removes the folders of multi-set jobs whose sets went on in other jobs


def _per_job(run: Run, whole: AdaptJob, sets: Sequence[AdaptSet]) -> int:
    """How many of some fresh sets share a job: as asked for, or by what is measured on one worker."""
    asked, num_sets = whole.adapt.sets_per_job, len(sets)
    if asked != "auto":
        return asked
    if num_sets < 2:
        return 1
    whole = replace(whole, sets=tuple(sets))
    found: Measured = run.runner.map(measure_rates, [whole])[0]
    workers, rates = run.runner.num_workers, found.rates
    ranks = ranks_of(run.config.resources, workers)
    slots, most = max(1, workers // ranks), _most_sets(whole, found, ranks)
    chosen = sets_per_job(num_sets, slots, rates, most)
    run.console.event("sets_per_job", chosen=chosen, slots=slots, most=most, **vars(rates), **vars(found.budget))
    run.console.log(
        f"adapt: {pluralize(chosen, 'set')} to a job: an image takes {1e3 * rates.decode_s:.1f} ms to decode, "
        f"{1e3 * rates.shared_s:.1f} ms once and {1e3 * rates.set_s:.1f} ms a set to train, "
        f"{pluralize(slots, 'job')} at a time" + (f"; a worker's memory holds {most} sets" if most < num_sets else "")
    )
    return chosen


def _most_sets(whole: AdaptJob, found: Measured, ranks: int) -> int:
    """How many of the sets one worker's memory holds: activations, and its part of the classifiers with their Adam."""
    most, asked = whole.training.rank_share(ranks), whole.adapt.micro_batch
    asked = LEAST_IMAGES if asked == "auto" else asked

    def images(num_sets: int) -> int:
        return micro_batch_size(asked, most, num_sets, on_gpu=found.on_gpu)

    return found.budget.sets([12 * found.channels * one.num_labels // ranks for one in whole.sets], images)


@dataclass(frozen=True)
class Measured:
    """What was measured on one worker."""

    rates: Rates
    budget: MemoryBudget  # for images of one adaptor set
    channels: int  # D

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU trains: only then does decoding take no time from training."""
        return self.rates.overlap


def measure_rates(device: torch.device, job: AdaptJob) -> Measured:
    """Seconds and bytes an image on this worker, with images of the first step; a task of one worker."""
    release_cached_model()
    usable = usable_bytes(device, job.sharing)  # before anything is allocated
    gpu, asked = device.type == "cuda", job.adapt.micro_batch
    most = min(GPU_IMAGES if gpu else CPU_IMAGES, asked if isinstance(asked, int) else job.training.global_batch)
    model = _model(job, 2, device)
    rows = job.training.order(0).batch(0, job.training.global_batch, 0, 1)
    rows = rows[: images_that_fit(model, memory_budget(model, usable).images(min(most, len(rows))))]
    preprocess = model.backbone.preprocess
    decode_s = _seconds(lambda: _decode(job, preprocess, rows.tolist())) / len(rows)
    images = to_images(augmented(job.training, preprocess, rows, epoch=0, area=job.adapt.min_crop_area), device)
    two_s = _train_s(model, images) / len(rows)
    del model
    release_memory()  # for the next model
    model = _model(job, 1, device)
    one_s = _train_s(model, images) / len(rows)
    set_s = max(two_s - one_s, 0.05 * one_s)  # on a busy machine the difference may come out negative
    rates = Rates(decode_s, max(one_s - set_s, 0.0), set_s, overlap=gpu)
    return Measured(rates, memory_budget(model, usable), model.embed_dim)


def _model(job: AdaptJob, num_sets: int, device: torch.device) -> PackedGrappa:
    model = PackedGrappa(
        build_backbone(job.backbone), num_sets, job.adapt.bottleneck, recompute=job.adapt.activation_checkpointing
    ).to(device)
    for index in range(num_sets):
        model.initialise(index, torch.Generator(device).manual_seed(torch_seed(Purpose.MEASURED_ADAPTORS, index)))
        for parameter in model.parameters_of(index):
            parameter.requires_grad_(True)
    return model


def _decode(job: AdaptJob, preprocess: Preprocess, rows: list[int]) -> None:
    """All rows, by as many threads as a job has."""
    training, threads = job.training, threads_here(job.training.decode_threads)
    parts = [rows[start::threads] for start in range(threads)]

    def read(part: list[int]) -> int:
        return len(augmented(training, preprocess, part, epoch=0, area=job.adapt.min_crop_area))

    for _ in read_batches(parts, read, threads=threads):
        pass


def _train_s(model: PackedGrappa, images: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""

    def step() -> None:
        model(images).float().square().mean().backward()

    return _seconds(step)


def _seconds(work: Callable[[], None]) -> float:
    """The fastest of a few runs, after one that warms up."""
    work()
    return least_seconds(work, REPEATS)
