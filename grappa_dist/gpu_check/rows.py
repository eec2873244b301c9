"""k-means and the k-NN graph: bit for bit what a CPU gave.

`digests.json` has the digests of results on a CPU, with the sizes and with what made them. The rows are drawn by
integer arithmetic (`inputs.unit_rows`), so they are the same on every machine; their own digest is compared first.

Shapes: P rows, D dimensions, K centroids, k neighbours.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, ShardedRows, join_rows
from grappa_dist.files import read_json, write_json
from grappa_dist.gpu_check.checks import Found, Machine
from grappa_dist.gpu_check.inputs import digest, unit_rows
from grappa_dist.kmeans.methods import ClusteringCallbacks, ClusteringTask, choose, cluster
from grappa_dist.knn.exact import sharded_knn

DIGESTS = Path(__file__).with_name("digests.json")
SHARD_ROWS = 1000
SEED = 22

KMEANS: dict[str, dict[str, Any]] = {  # both sides of 512 centroids, where the groups of bounds begin
    "tiny": {"rows": 3000, "dim": 24, "groups": 60, "labels": [40, 600], "iterations": 3},
    "full": {"rows": 100_000, "dim": 384, "groups": 3000, "labels": [256, 2048], "iterations": 4},
}
KNN: dict[str, dict[str, int]] = {
    "tiny": {"rows": 1500, "dim": 24, "groups": 40, "neighbours": 5},
    "full": {"rows": 40_000, "dim": 384, "groups": 2000, "neighbours": 10},
}
Log = Callable[[str], None]


def _rows_of(sizes: Mapping[str, Any]) -> NDArray[np.float32]:
    return unit_rows(sizes["rows"], sizes["dim"], sizes["groups"], SEED)


def sharded(x: NDArray[np.float32], device: torch.device, shard_rows: int = SHARD_ROWS) -> ShardedRows:
    """Rows (P, D) as those of the only rank, on a device."""
    shards = [x[start : start + shard_rows] for start in range(0, len(x), shard_rows)]
    return join_rows(Comm(), Rows(shards, [np.ones(len(s), dtype=bool) for s in shards]), device=device)


def kmeans_digests(sizes: Mapping[str, Any], device: torch.device, log: Log) -> dict[str, str]:
    """Digests of the rows, and of labels and centroids for each K."""
    x = _rows_of(sizes)
    found, joined = {"rows": digest(x)}, sharded(x, device)
    config = ClusteringConfig(num_labels=tuple(sizes["labels"]), iterations=sizes["iterations"])
    for k in sizes["labels"]:
        task = ClusteringTask(k, config, choose(config, k, len(x)), SEED, callbacks=_telling(k, log))
        result = cluster(joined, task).result
        found[f"K={k}"] = digest(np.concatenate(result.labels).astype(np.int32), result.centroids.astype(np.float32))
    return found


def _telling(k: int, log: Log) -> ClusteringCallbacks:
    return ClusteringCallbacks(on_iteration=lambda part, i, inertia: log(f"K={k} {part}iteration {i}"))


def knn_digests(sizes: Mapping[str, int], device: torch.device, log: Log) -> dict[str, str]:
    """Digests of the rows, and of ids and scores of the exact graph."""
    x, k = _rows_of(sizes), sizes["neighbours"]
    ids, scores = sharded_knn(Comm(), x, np.arange(len(x), dtype=np.int64), k, device=device)
    return {"rows": digest(x), f"k={k}": digest(ids, scores)}


def kmeans(machine: Machine) -> Found:
    return _compared(machine, "kmeans", KMEANS, kmeans_digests)


def knn(machine: Machine) -> Found:
    return _compared(machine, "knn", KNN, knn_digests)


def _compared(machine: Machine, name: str, sizes: Mapping[str, Any], digests: Callable[..., dict[str, str]]) -> Found:
    """Digests of this machine against the stored ones of the same sizes."""
    size = machine.sized("full", "tiny")
    stored = read_json(DIGESTS)[name][size]
    if stored["sizes"] != sizes[size]:
        raise ValueError(f"{DIGESTS.name} was made for {stored['sizes']}; make it anew with --write-digests")
    found = digests(sizes[size], machine.device, machine.log)
    wrong = [part for part, value in stored["digests"].items() if found[part] != value]
    what = f"{sizes[size]['rows']:,} x {sizes[size]['dim']}, {', '.join(part for part in found if part != 'rows')}"
    if "rows" in wrong:
        return Found(what, wrong="the rows themselves are not those of the CPU: no result can be compared")
    return Found(
        f"{what}: the bits of {stored['made_by']}", wrong=f"other bits for {', '.join(wrong)}" if wrong else ""
    )


def write_digests(log: Log) -> None:
    """Writes what this CPU gives; tests compare the tiny ones on every push, so a change of a result shows."""
    cpu, found = torch.device("cpu"), dict[str, Any]()
    made_by = f"{platform.machine()} with torch {torch.__version__}"
    for name, sizes, digests in (("kmeans", KMEANS, kmeans_digests), ("knn", KNN, knn_digests)):
        found[name] = {}
        for size, of_size in sizes.items():
            log(f"{name}, {size}: {of_size}")
            found[name][size] = {"sizes": of_size, "digests": digests(of_size, cpu, log), "made_by": made_by}
    command = "python launch/gpu_check.py --write-digests"
    write_json(DIGESTS, {"command": command, "seed": SEED, "rows_by": "inputs.unit_rows", **found})
