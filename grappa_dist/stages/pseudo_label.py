"""pseudo_label: features -> N partitions of the images, one per number of clusters K (k-means over all ranks)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grappa_dist.artifacts import Artifact, RowArrays, Store, replacing, write_json
from grappa_dist.config import ClusteringConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.dist.jobs import Job
from grappa_dist.dist.search import Rows, raise_together
from grappa_dist.dist.sharded_kmeans import KMeansResult, Progress, kmeans
from grappa_dist.dist.share import Share, join_rows
from grappa_dist.dist.workers import RankContext
from grappa_dist.report.content import size_histogram
from grappa_dist.stages.run import Run

STATS_FILE, CENTROIDS_FILE, PROGRESS_FILE = "stats.json", "centroids.npy", "progress.safetensors"
LADDER_SETS = 8


@dataclass(frozen=True)
class LabelJob:
    """What every rank of the clustering job is told."""

    features: RowArrays
    shard_names: tuple[str, ...]
    bad: np.ndarray
    labels: Mapping[int, Artifact]  # the K that are still missing
    clustering: ClusteringConfig
    seed: int


def ladder(num_rows: int) -> tuple[int, ...]:
    """K for `auto`: powers of two from 256 to about the number of images, at most 8 of them, evenly spread."""
    top = max(1, int(np.floor(np.log2(max(2.0, 0.99 * num_rows)))))
    low = min(8, top)
    exponents = np.linspace(low, top, min(LADDER_SETS, top - low + 1))
    return tuple(dict.fromkeys(int(2 ** round(e)) for e in exponents))


def num_labels(config: ClusteringConfig, num_rows: int) -> tuple[int, ...]:
    """K_1..K_N of a config.

    Raises:
        ValueError: a K is larger than the number of images.
    """
    if config.num_labels == "auto":
        return ladder(num_rows)
    if max(config.num_labels) > num_rows:
        raise ValueError(f"clustering.num_labels={max(config.num_labels)} is more than the {num_rows} training images")
    return config.num_labels


def labels_of(store: Store, config: ClusteringConfig, seed: int, num: int, features: Sequence[Artifact]) -> Artifact:
    settings = {**config.model_dump(exclude={"num_labels"}), "num_labels": num, "seed": seed}
    return store.artifact(f"labels/k={num}", settings, {f"shard {i}": a for i, a in enumerate(features)})


def pseudo_label(
    run: Run, labels: Mapping[int, Artifact], features: RowArrays, images: ImageShards, bad: np.ndarray
) -> None:
    """Clusters the features into every K that has no labels yet; rows stay in the workers that read them."""
    missing = {k: artifact for k, artifact in labels.items() if not artifact.complete}
    if not missing:
        return
    names = tuple(shard.name for shard in images.shards)
    job = LabelJob(features, names, bad, missing, run.config.clustering, run.config.seed)
    ranks = min(run.runner.num_workers, len(images.shards))
    what = f"K = {', '.join(map(str, missing))}, {len(images)} rows in {ranks} workers"
    with run.console.stage("pseudo_label", what):
        run.runner.run_jobs([Job("pseudo_label", label_ranks, job, ranks)])


def label_ranks(context: RankContext, job: LabelJob) -> None:
    """One rank: maps its shards' features and takes part in every k-means; rank 0 commits."""
    comm = context.comm
    shards = own_shards(job.features.starts, comm.rank, comm.size)
    rows = Rows(
        [job.features.shard(i) for i in shards],
        [_good(job, i) for i in shards],
        [job.shard_names[i] for i in shards],
    )
    share = join_rows(comm, rows, device=context.device)
    for number, (k, artifact) in enumerate(job.labels.items()):
        if artifact.complete:  # a restart finds the K that were done
            continue
        name = f"K={k} ({number + 1}/{len(job.labels)})"
        context.report({"phase": f"{name} initialisation"})
        result = _cluster(context, job, share, artifact, name)
        folder = artifact.begin()
        for shard, labels in zip(shards, result.labels, strict=True):
            np.save(folder / rows_file(shard), labels)
        comm.barrier()
        if comm.rank == 0:
            _save(folder, k, result)
            (folder / PROGRESS_FILE).unlink(missing_ok=True)
            artifact.commit()
        comm.barrier()


def _cluster(context: RankContext, job: LabelJob, share: Share, artifact: Artifact, name: str) -> KMeansResult:
    """One k-means, from its last saved update if there is one; rank 0 saves every update."""
    path = artifact.begin() / PROGRESS_FILE
    progress, problem = _load_progress(path)
    raise_together(context.comm, problem)
    seen = {int(n) for n in share.gather(torch.tensor([_digest(progress)]))}
    if len(seen) > 1:
        raise RuntimeError(f"{path}: ranks read different contents")

    def show(iteration: int, inertia: float) -> None:
        context.report({"phase": f"{name} iteration {iteration}, inertia {inertia:.1f}"})
        context.raise_if_stopping()

    def save(progress: Progress) -> None:
        if context.comm.rank == 0:
            _save_progress(path, progress)

    how = job.clustering
    return kmeans(
        share,
        artifact.settings["num_labels"],
        iterations=how.iterations,
        seed=job.seed,
        spherical=how.spherical,
        tolerance=how.tolerance,
        on_iteration=show,
        resume=progress,
        on_update=save,
    )


def _save_progress(path: Path, progress: Progress) -> None:
    figures = {"inertia": json.dumps(progress.inertia), "repaired": str(progress.repaired)}
    with replacing(path) as temporary:
        save_file({"centroids": progress.centroids}, temporary, figures)


def _load_progress(path: Path) -> tuple[Progress | None, str]:
    """What was saved, if anything, and what is wrong with it."""
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, "np") as file:
            figures = file.metadata()
            inertia, repaired = tuple(json.loads(figures["inertia"])), int(figures["repaired"])
            return Progress(file.get_tensor("centroids"), inertia, repaired), ""
    except SafetensorError as error:
        return None, f"{path} is damaged ({error}); delete it to begin this K again"


def _digest(progress: Progress | None) -> int:
    """63 bits that tell one state from another."""
    if progress is None:
        return 0
    known = json.dumps([progress.inertia, progress.repaired]).encode() + progress.centroids.tobytes()
    return int.from_bytes(hashlib.blake2b(known, digest_size=8).digest(), "big") >> 1


def own_shards(starts: Sequence[int], rank: int, size: int) -> range:
    """Consecutive shards for each rank, about equal in rows: shard i goes to the rank that its middle row falls to."""
    middles = (np.asarray(starts[:-1]) + np.asarray(starts[1:])) / 2
    owners = np.minimum((middles * size / max(1, starts[-1])).astype(int), size - 1)
    return range(int(np.searchsorted(owners, rank)), int(np.searchsorted(owners, rank, side="right")))


def rows_file(shard: int) -> str:
    return f"rows-{shard:06d}.npy"


def label_rows(artifact: Artifact, images: ImageShards) -> RowArrays:
    """The labels of all rows, memory-mapped; -1 for rows that do not decode."""
    paths = tuple(str(artifact.path / rows_file(i)) for i in range(len(images.shards)))
    return RowArrays(paths, tuple(images.starts.tolist()))


def _good(job: LabelJob, shard: int) -> np.ndarray:
    first, after = job.features.starts[shard], job.features.starts[shard + 1]
    good = np.ones(after - first, dtype=bool)
    good[job.bad[(job.bad >= first) & (job.bad < after)] - first] = False
    return good


def _save(folder: Path, k: int, result: KMeansResult) -> None:
    counts = result.counts
    np.save(folder / CENTROIDS_FILE, result.centroids)
    stats = {
        "k": k,
        "inertia": result.inertia,
        "sizes": size_histogram(counts),
        "largest": int(counts.max()),
        "median": float(np.median(counts)),
        "imbalance": float(k * np.square(counts.astype(float)).sum() / counts.sum() ** 2),
        "empty_repaired": result.empty_repaired,
        "empty_left": result.empty_left,
        "singletons_share": float((counts == 1).mean()),
        "exact_share": result.exact_share,
        "searched_share": result.searched_share,
    }
    write_json(folder / STATS_FILE, stats)
