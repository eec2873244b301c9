"""adapt: images + one partition P_i -> the adaptor set of P_i (step 2 of the paper).

Each job is a world of its own, jobs run side by side as far as the workers go, and a job trains one set or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, wait_until_seen
from grappa_dist.config import AdaptConfig, BackboneConfig, Config, DataConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.dist.jobs import Job
from grappa_dist.dist.trackers import check_trackers
from grappa_dist.observe import counted
from grappa_dist.ops.placement import in_words, sets_per_job
from grappa_dist.stages.adapt_plan import ranks_of
from grappa_dist.stages.adapting import AdaptJob, train_adaptors
from grappa_dist.stages.modelling import backbone_settings
from grappa_dist.stages.packs import AdaptSet, commit_saved, group, not_begun
from grappa_dist.stages.pseudo_label import CENTROIDS_FILE, label_rows
from grappa_dist.stages.rates import Measured, measure_rates
from grappa_dist.stages.run import Run
from grappa_dist.stages.training import TrainingImages, data_settings, idle_in_words

FEW = 8  # images at a time, which a pack must have room for at the least


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
    settings = {
        "backbone": backbone_settings(backbone),
        "adapt": adapt.of_result(),
        "data": data_settings(data),
        "seed": seed,
    }
    kind = f"adaptors/{name or labels.kind.removeprefix('labels/')}"
    return store.artifact(kind, settings, {"labels": labels})


def adapt(
    run: Run,
    adaptors: Mapping[int, Artifact],
    labels: Mapping[int, Artifact],
    images: ImageShards,
    bad: NDArray[np.int64],
) -> None:
    """Trains every adaptor set that does not exist yet, several in a job and jobs side by side as asked for."""
    sets = [_set(run.config, k, labels[k], adaptors[k], images) for k in adaptors]  # all: a pack may lack one only
    train_sets(run, sets, images, bad)


def train_sets(run: Run, sets: Sequence[AdaptSet], images: ImageShards, bad: NDArray[np.int64]) -> None:
    """Trains those of the sets that are missing on all images but the rows `bad`."""
    config = run.config
    commit_saved(sets)
    missing = [one for one in sets if not one.artifact.complete]
    if not missing:
        return
    check_trackers(config.resources.trackers)
    training = TrainingImages(
        images, bad, config.data, config.adapt.global_batch, config.seed, config.resources.decode_threads
    )
    whole = AdaptJob(tuple(missing), training, config.backbone, config.adapt, config.resources.trackers)
    what = f"{counted(len(missing), 'adaptor set')} of {training.num_steps(config.adapt.epochs)} steps"
    with run.console.stage("adapt", what):
        whole = replace(whole, sharing=run.runner.sharing, compiled=config.resources.compile == "auto")
        jobs = [replace(whole, sets=members) for members in group(sets, _per_job(run, whole, not_begun(sets)))]
        workers = run.runner.num_workers
        ranks = ranks_of(config.resources, workers)
        run.console.say(f"adapt: {in_words(len(jobs), workers, ranks)}")
        if idle := idle_in_words(config.data, ranks):
            run.console.say(f"adapt: {idle}")
        run.runner.run_jobs(
            [Job(job.name, train_adaptors, job, config.resources.adapt_ranks) for job in jobs],
            lambda name: run.console.say(f"adapt: {name} is trained"),
        )
        wait_until_seen(one.artifact for one in missing)
        commit_saved(sets)  # removes what is left of packs whose sets went on in other jobs


def _set(config: Config, k: int, labels: Artifact, adaptors: Artifact, images: ImageShards) -> AdaptSet:
    centroids = labels.path / CENTROIDS_FILE if config.adapt.classifier == "centroids" else None
    return AdaptSet(k, label_rows(labels, images), adaptors, centroids)


def _per_job(run: Run, whole: AdaptJob, fresh: Sequence[AdaptSet]) -> int:
    """How many of the sets that have not begun a job trains: as asked for, or by what is measured on one worker."""
    asked, num_sets = whole.adapt.sets_per_job, len(fresh)
    if asked != "auto":
        return asked
    if num_sets < 2:
        return 1
    whole = replace(whole, sets=tuple(fresh))
    found: Measured = run.runner.map(measure_rates, [whole])[0]
    workers, rates = run.runner.num_workers, found.rates
    ranks = ranks_of(run.config.resources, workers)
    slots, most = max(1, workers // ranks), _most_sets(whole, found, ranks)
    chosen = sets_per_job(num_sets, slots, rates, most)
    run.console.event("sets_per_job", chosen=chosen, slots=slots, most=most, **vars(rates), **vars(found.room))
    run.console.say(
        f"adapt: {chosen} sets to a job: an image takes {1e3 * rates.decode_s:.1f} ms to decode, "
        f"{1e3 * rates.shared_s:.1f} ms once and {1e3 * rates.set_s:.1f} ms a set to train, {slots} jobs at a time"
        + (f"; a worker's memory holds {most} sets" if most < num_sets else "")
    )
    return chosen


def _most_sets(whole: AdaptJob, found: Measured, ranks: int) -> int:
    """How many of the sets one worker's memory holds: activations, and its part of the classifiers with their Adam."""
    share, asked = whole.training.rank_share(ranks), whole.adapt.micro_batch
    images = min(share, FEW if asked == "auto" else asked or share)
    return found.room.sets([12 * found.channels * one.num_labels // ranks for one in whole.sets], images)
