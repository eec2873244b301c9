"""pseudo_label: features -> N partitions of the images, one per number of clusters K (k-means over all ranks).

Rows stay in the workers that read them. A pass over the rows can serve several K (kmeans/lloyd.py); which K are fitted
at the same time is a matter of memory and speed, never of the result. A K that was stopped continues from its
checkpoint, and statistics are written next to the labels, for console and report.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import (
    CENTROIDS_FILE,
    Artifact,
    RowArrays,
    Store,
    finished,
    numbered,
    own_shards,
    rows_file,
    wait_until_seen,
)
from grappa_dist.bucket import send
from grappa_dist.checksums import load_json
from grappa_dist.config import ClusteringConfig, Resources
from grappa_dist.console import format_bytes, format_number, pluralize
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Grid, wire_device
from grappa_dist.distributed.machine import this_machine
from grappa_dist.distributed.placement import has_gpus, known_workers
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.sharded_rows import GridRows, Rows, ShardedRows, join_rows
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import save_array, write_json
from grappa_dist.kmeans.methods import (
    CENTROID_BYTES,
    FLAT,
    Choice,
    Clustering,
    ClusteringCallbacks,
    ClusteringTask,
    RankMemory,
    centroid_shards,
    choose,
    cluster,
    cluster_together,
    may_shard_centroids,
    shares_passes,
)
from grappa_dist.kmeans.seeding import LARGER_ROUNDS_ABOVE
from grappa_dist.kmeans.yinyang import num_bounds
from grappa_dist.stages.exclude import excluding
from grappa_dist.stages.kmeans_checkpoints import CHECKPOINT_FILE, PREVIOUS_FILE, checkpoint_saver, newest_checkpoint
from grappa_dist.stages.run import Run

STATS_FILE = "stats.json"
LEAST_AGREEMENT = 0.95  # of labels found through lists with the exact ones; below, a warning
LADDER_SETS = 8
FINEST = 17  # power of two of the largest K for `auto`
COARSEST, STEPS_BELOW = 8, 3  # of its smallest K: the paper's, or as many steps below the largest


def ladder(num_rows: int) -> tuple[int, ...]:
    """K for `auto`: powers of two from 256 to about the number of images, at most 8 of them, evenly spread.

    None is above the finest of the paper: larger K cost so much memory and time that they must be set explicitly. Few
    images begin below 256, at an eighth of the largest K: a fusion needs sets that differ, and the paper's larger K
    span 8 images per label to about one.
    """
    top = min(int(np.log2(max(1.0, num_rows if num_rows < 3 else 0.99 * num_rows))), FINEST)
    low = max(min(1, top), min(COARSEST, top - STEPS_BELOW))
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
        raise ValueError(
            f"clustering.num_labels={max(config.num_labels)} is more than the {pluralize(num_rows, 'training image')}"
        )
    return config.num_labels


def check_good_rows(config: ClusteringConfig, nums: Iterable[int], num_rows: int, num_bad: int) -> None:
    """Raises ValueError where a K is larger than the number of images without the bad ones."""
    good = num_rows - num_bad
    if max(nums) > good:
        asked = "auto" if config.num_labels == "auto" else list(config.num_labels)
        right = f"give numbers up to {good}, such as {list(ladder(good))}" if good else "there is nothing to cluster"
        raise ValueError(
            f"clustering.num_labels={asked} has K={max(nums)}, but {num_bad} of the {num_rows} training images are "
            f"bad or excluded and {good} are left: {right}"
        )


def labels_of(
    store: Store,
    config: ClusteringConfig,
    seed: int,
    num: int,
    features: Sequence[Artifact],
    *,
    num_rows: int,
    excluded: Artifact | None = None,
) -> Artifact:
    """The artefact of one K: its settings are those that its method uses, with `auto` resolved."""
    choice = choose(config, num, num_rows)
    settings: dict[str, object] = {name: getattr(config, name) for name in ("iterations", "tolerance", "spherical")}
    if choice.name != "exact":  # defaults are left out of the fingerprint: flat k-means, one restart, no bound
        settings |= {"method": choice.name, "assignment": choice.assignment}
    if choice.name == "sampled":
        settings["sample_rows_per_cluster"] = config.sample_rows_per_cluster
    if "approximate" in (choice.name, choice.assignment):
        settings["probes"] = config.probes
    settings |= {"balance": config.balance} if config.balance is not None else {}
    settings |= {"restarts": config.restarts} if config.restarts > 1 else {}
    if choice.init == "k-means||":
        settings["init"] = choice.init
    elif choice.name in FLAT and num > LARGER_ROUNDS_ABOVE:
        settings["seeding"] = "larger rounds"  # which draw other first centroids than rounds of fixed size
    inputs = {**numbered("shard", features), **excluding(excluded)}
    return store.artifact(f"labels/k={num}", {**settings, "num_labels": num, "seed": seed}, inputs)


@dataclass(frozen=True)
class LabelJob:
    """The input of every rank of the clustering job."""

    features: RowArrays
    shard_names: tuple[str, ...]
    bad: np.ndarray
    labels: Mapping[int, Artifact]  # the K that are still missing
    clustering: ClusteringConfig
    seed: int
    centroid_shards: int | Literal["auto"] = 1  # resources.centroid_shards

    def choice(self, k: int) -> Choice:
        """The method of one K."""
        return choose(self.clustering, k, self.features.starts[-1])


def pseudo_label(
    run: Run, labels: Mapping[int, Artifact], features: RowArrays, images: ImageShards, bad: np.ndarray
) -> None:
    """Clusters the features into every K that has no labels yet."""
    missing = {k: artifact for k, artifact in labels.items() if not artifact.complete}
    if not missing:
        return
    check_good_rows(run.config.clustering, missing, len(images), len(bad))
    names = tuple(shard.name for shard in images.shards)
    asked = run.config.resources.centroid_shards
    job = LabelJob(features, names, bad, missing, run.config.clustering, run.config.seed, asked)
    ranks = ranks_for(asked, run.runner.num_workers, len(images.shards))
    what = f"K = {', '.join(map(str, missing))}, {pluralize(len(images), 'row')} in {pluralize(ranks, 'worker')}"
    with run.console.stage("pseudo_label", what):
        for line in describe_choices(run.config.clustering, list(missing), len(images)):
            run.console.log(f"pseudo_label: {line}")
        run.runner.run_jobs([Job("pseudo_label", label_ranks, job, ranks)])
        wait_until_seen(missing.values())
        for k, artifact in missing.items():
            for line in describe_shortcuts(load_json(artifact.path / STATS_FILE)):
                run.console.log(f"pseudo_label: k={k}: {line}")


def ranks_for(centroid_shards: int | Literal["auto"], workers: int, shards: int) -> int:
    """Ranks of the job: a worker each, and a multiple of the slices of the centroids that are asked for.

    Raises:
        ValueError: there are fewer ranks than slices.
    """
    ranks = min(workers, shards)
    if centroid_shards == "auto":
        return ranks
    _check_ranks(centroid_shards, workers, shards)
    return ranks - ranks % centroid_shards


def check_slices(where: Resources, labels: Iterable[Artifact] | None = None, shards: int | None = None) -> None:
    """Refuses slices of the centroids that the ranks cannot hold, as far as that is known before workers start.

    Args:
        labels: of the run; once all are there, nothing is refused. None: before they are known.
        shards: of the training images; None: likewise.

    Raises:
        ValueError: there will be fewer ranks than slices, or GPUs.
    """
    asked = where.centroid_shards
    if asked == "auto" or (labels is not None and all(finished(labels))):
        return
    _check_ranks(asked, known_workers(where), shards)
    if has_gpus(where):
        _check_on_gpus(asked)


def _check_ranks(centroid_shards: int, workers: int | None, shards: int | None) -> None:
    """Raises ValueError where there will be fewer ranks than slices. None: not known."""
    counts = {"worker": workers, "shard": shards}
    known = {name: count for name, count in counts.items() if count is not None}
    if known and centroid_shards > (ranks := min(known.values())):
        of = {"worker": "", "shard": " of images"}
        why = " and ".join(f"{pluralize(count, name)}{of[name]}" for name, count in known.items())
        raise ValueError(
            f"resources.centroid_shards={centroid_shards} is more than the {pluralize(ranks, 'rank')} of pseudo_label, "
            f"which has {why}: lower it"
        )


def _check_on_gpus(centroid_shards: int | Literal["auto"]) -> None:
    if centroid_shards not in (1, "auto"):
        raise ValueError(
            f"resources.centroid_shards={centroid_shards}: a GPU holds all centroids, no slice of "
            "them; expected 1 or auto, or resources.gpus_per_worker=0"
        )


def describe_choices(config: ClusteringConfig, nums: Sequence[int], num_rows: int) -> list[str]:
    """A line per method and initialisation: its K, and the reason for the largest of them."""
    ways: dict[tuple[str, str], list[int]] = {}
    for num in sorted(nums):
        choice = choose(config, num, num_rows)
        ways.setdefault((choice.name, choice.init), []).append(num)
    return [
        f"K = {', '.join(map(str, ks))}: {name} ({choose(config, ks[-1], num_rows).reason})"
        for (name, _), ks in ways.items()
    ]


def label_ranks(context: RankContext, job: LabelJob) -> None:
    """One rank: maps its shards' features and runs every k-means with the others; rank 0 commits."""
    comm = context.comm
    shards = own_shards(job.features.starts, comm.rank, comm.size)
    sharded = join_rows(comm, _rows(job, shards), device=context.device, stop_requested=context.stop_requested)
    if sharded.dense is not None:
        context.note(f"of rank {comm.rank}, {sharded.dense.describe()}")
    missing = [k for k, artifact in job.labels.items() if not context.of_rank_0(artifact.complete)]  # after a restart
    slices, grids = _slices(context, job, missing, sharded), dict[int, GridRows]()
    for group in _at_once(job, missing, sharded.dim, [k for k in missing if slices[k] > 1]):
        num = slices[group[0]]
        if num > 1 and num not in grids:
            grids[num] = _grid_rows(context, job, sharded, num)
        for k, found in _clusterings(context, job, sharded, group, grids.get(num)):
            _commit(context, job, k, dict(zip(shards, found.result.labels, strict=True)), found)


def _rows(job: LabelJob, shards: Iterable[int]) -> Rows:
    """The features of some shards, mapped."""
    good = {i: _good(job, i) for i in shards}
    features = [job.features.unit_shard(i, of_shard) for i, of_shard in good.items()]
    return Rows(features, list(good.values()), [job.shard_names[i] for i in good])


def _slices(context: RankContext, job: LabelJob, nums: Sequence[int], sharded: ShardedRows) -> dict[int, int]:
    """For each K in how many slices the ranks hold its centroids; 1: all of them on every rank.

    Raises:
        ValueError: on GPUs several were asked for.
    """
    if sharded.dense is not None:
        _check_on_gpus(job.centroid_shards)
        return dict.fromkeys(nums, 1)
    comm, wire = context.comm, wire_device(context.comm)
    host = int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest(), "big")
    hosts = torch.cat(comm.gather(torch.tensor([host], device=wire))).tolist()
    own = this_machine().memory_bytes // hosts.count(host)
    memory = RankMemory(comm.size, min(torch.cat(comm.gather(torch.tensor([own], device=wire))).tolist()))
    found = {}
    for k in nums:
        may_shard = may_shard_centroids(job.clustering, job.choice(k))
        found[k] = centroid_shards(job.centroid_shards, k, sharded.dim, memory) if may_shard else 1
        size = format_bytes(CENTROID_BYTES * k * sharded.dim // found[k])
        if found[k] > 1:
            context.note(f"K = {k}: centroids in {found[k]} slices, about {size} a rank")
        elif job.centroid_shards not in (1, "auto"):
            context.note(f"K = {k}: only exact k-means shards centroids, all are on every rank: {size}")
    return found


def _grid_rows(context: RankContext, job: LabelJob, sharded: ShardedRows, slices: int) -> GridRows:
    """The rows of the ranks that hold the slices for this rank's rows."""
    comm = context.comm
    first = comm.rank // slices * slices
    shards = [i for rank in range(first, first + slices) for i in own_shards(job.features.starts, rank, comm.size)]
    return GridRows.of(sharded, Grid.of(comm, slices), _rows(job, shards))


def _at_once(job: LabelJob, nums: Sequence[int], dim: int, sliced: Sequence[int]) -> list[list[int]]:
    """The K in the order in which they are fitted, grouped where a pass over the rows serves several."""
    shared = [k for k in nums if shares_passes(job.clustering, job.choice(k)) and k not in sliced]
    return [*groups(shared, dim), *([k] for k in nums if k not in shared)]


def _clusterings(
    context: RankContext, job: LabelJob, sharded: ShardedRows, group: Sequence[int], grid: GridRows | None
) -> Iterator[tuple[int, Clustering]]:
    tasks = (_task(context, job, k, grid) for k in group)
    if len(group) == 1:
        yield group[0], cluster(sharded, next(tasks))
        return
    for place, found in cluster_together(sharded, tasks):
        yield group[place], found


def _commit(context: RankContext, job: LabelJob, k: int, labels: Mapping[int, np.ndarray], found: Clustering) -> None:
    """Every rank writes the labels of its shards, rank 0 the rest."""
    artifact, comm = job.labels[k], context.comm
    folder = artifact.begin()
    for shard, of_rows in labels.items():
        save_array(folder / rows_file(shard), of_rows, summed=True)
        send(folder / rows_file(shard))
    comm.barrier()
    if comm.rank == 0:
        save_array(folder / CENTROIDS_FILE, found.result.centroids)
        write_stats(folder, k, found, job.choice(k))
        for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
            (folder / name).unlink(missing_ok=True)
        artifact.commit(expected=[rows_file(shard) for shard in range(len(job.shard_names))])
    comm.barrier()


def _task(context: RankContext, job: LabelJob, k: int, grid: GridRows | None) -> ClusteringTask:
    """One clustering, which continues from its checkpoint if there is one."""
    artifact, name = job.labels[k], f"K={k} ({list(job.labels).index(k) + 1}/{len(job.labels)})"
    context.report({"phase": f"{name} initialisation"})
    path = artifact.begin() / CHECKPOINT_FILE
    checkpoint = newest_checkpoint(context, path)

    def report_seeding(part: str, found: int, wanted: int) -> None:
        context.report({"phase": f"{name} {part}seeding {found:,} of {wanted:,}"})

    def report_iteration(part: str, iteration: int, inertia: float) -> None:
        context.report({"phase": f"{name} {part}iteration {iteration}, inertia {inertia:.1f}"})

    callbacks = ClusteringCallbacks(
        on_iteration=report_iteration,
        on_seeding=report_seeding,
        on_checkpoint=checkpoint_saver(path, context.comm.rank),
    )
    return ClusteringTask(k, job.clustering, job.choice(k), job.seed, checkpoint, grid, callbacks)


def _good(job: LabelJob, shard: int) -> np.ndarray:
    first, after = job.features.starts[shard], job.features.starts[shard + 1]
    good = np.ones(after - first, dtype=bool)
    bad = job.bad[slice(*np.searchsorted(job.bad, [first, after]))]  # they are sorted
    good[bad - first] = False
    return good


def groups(nums: Sequence[int], dim: int) -> list[list[int]]:
    """The numbers of labels in groups that are fitted at the same time: from the largest on, each joins the first group
    whose memory budget allows it.

    A group has no more centroids than the largest K, so it needs no more memory; and its bounds take at most half as
    much scratch as the rows themselves, or what the largest K takes if that is more.
    """
    most_centroids = max(nums, default=0)
    most_scratch = max(2 * dim, *(scratch_bytes(num, dim) for num in nums)) if nums else 0
    found: list[list[int]] = []
    for num in sorted(nums, reverse=True):
        for group in found:
            together = [*group, num]
            if sum(together) <= most_centroids and sum(scratch_bytes(k, dim) for k in together) <= most_scratch:
                group.append(num)
                break
        else:
            found.append([num])
    return [sorted(group) for group in reversed(found)]


def scratch_bytes(num_labels: int, dim: int) -> int:
    """Bytes of scratch per row: its bounds, label and squared norm (kmeans/yinyang.py)."""
    return 4 * num_bounds(num_labels, dim) + 16


def write_stats(folder: Path, k: int, found: Clustering, choice: Choice) -> None:
    """Writes the statistics of a clustering, for console and report."""
    result, counts = found.result, found.result.counts
    agreement, balanced = found.agreement, found.balanced
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
        "method": choice.name,
        "reason": choice.reason,
        "updates": found.updates,
        "sampled_share": found.sampled_rows / int(counts.sum()),
        "agreement": agreement.share if agreement else None,
        "agreement_rows": agreement.rows if agreement else 0,
        "bound": balanced.largest if balanced else None,
        "moved": balanced.moved if balanced else 0,
        "unbalanced_inertia": found.unbalanced_inertia,
        "restarts": list(found.restarts),
    }
    write_json(folder / STATS_FILE, stats)


def describe_shortcuts(stats: Mapping[str, Any]) -> list[str]:
    """Lines on the effect of the shortcuts of one clustering; none for plain exact k-means."""
    lines = []
    if stats["sampled_share"] < 1:
        lines.append(
            f"centroids were fitted to a sample of {format_number(100 * stats['sampled_share'])} % of the rows"
        )
    agreement = stats["agreement"]
    if agreement is not None:
        rows = stats["agreement_rows"]
        lines.append(f"labels agree with the exact ones on {100 * agreement:.2f} % of {pluralize(rows, 'row')} drawn")
        if agreement < LEAST_AGREEMENT:
            lines[-1] += f", WARNING: less than {100 * LEAST_AGREEMENT:.0f} %, raise clustering.probes"
    if stats["bound"] is not None:
        more = stats["inertia"][-1] - stats["unbalanced_inertia"]
        lines.append(
            f"{pluralize(stats['moved'], 'row')} moved, no cluster has more than {stats['bound']}; "
            f"inertia {format_number(stats['inertia'][-1], 6)}, of which {format_number(more)} for that"
        )
    return lines


def size_histogram(counts: Sequence[int] | NDArray[np.integer]) -> list[int]:
    """Clusters by size, for `Clustering.sizes`: entry 0 counts empty ones, b those of 2^(b-1) to 2^b - 1 images."""
    _, bits = np.frexp(np.asarray(counts, dtype=np.float64))  # frexp's exponent of n is its bit length, 0 for 0
    return [int(n) for n in np.bincount(bits)] if len(bits) else []
