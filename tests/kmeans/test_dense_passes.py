from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed import device_rows
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, ShardedRows, join_rows
from grappa_dist.kmeans.lloyd import KMeansResult, KMeansTask, sharded_kmeans
from grappa_dist.kmeans.methods import ClusteringTask, choose, cluster, cluster_together
from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.fixed_point import to_grid
from tests.kmeans.test_lloyd import CASES, clustered, cuts, good_rows, part_of, unchecked
from tests.processes import run_ranks
from tests.search.test_dense import kernel_by_table

NAMES = ("clusters", "exact ties", "equal starts", "duplicates", "each its own", "one label", "all equal", "groups")
FITTING, NONE, SOME = 2**40, 0, 6000  # bytes for rows: all stay, none, some of them


def figures(found: KMeansResult) -> list[Any]:
    labels = np.concatenate(found.labels).tolist() if found.labels else []
    return [found.centroids.tobytes(), labels, found.counts.tolist(), found.inertia, found.empty_repaired]


def run_cases(comm: Comm, num_bytes: int | None, block_rows: int | None) -> dict[str, list[Any]]:
    found = {}
    for name in NAMES if comm.size == 1 else NAMES[:3]:
        x, given = CASES[name]
        edges, settings = cuts(len(x), comm.size), dict(given)
        rows = part_of(x, edges[comm.rank], edges[comm.rank + 1])
        num_labels, initial = settings.pop("num_labels"), settings.pop("initial", None)
        task = KMeansTask(unchecked(**settings), initial=initial)
        found[name] = figures(
            sharded_kmeans(comm, rows, num_labels, task, block_rows=block_rows, dense_bytes=num_bytes)
        )
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Any]]:
    return run_cases(Comm(), None, None)


@pytest.mark.parametrize(("num_bytes", "block_rows"), [(FITTING, None), (FITTING, 64), (SOME, 50), (NONE, 90)])
def test_passes_of_a_device_give_the_bits_of_the_others(
    plain: dict[str, list[Any]], num_bytes: int, block_rows: int | None
) -> None:
    assert run_cases(Comm(), num_bytes, block_rows) == plain


def test_ranks_without_rows_or_with_one_change_no_bit(plain: dict[str, list[Any]]) -> None:
    found = run_ranks(run_cases, 3, SOME, 50)
    for name in NAMES[:3]:
        expected = plain[name]
        assert [label for of_rank in found for label in of_rank[name][1]] == expected[1], name
        assert all([of_rank[name][0], *of_rank[name][2:]] == [expected[0], *expected[2:]] for of_rank in found), name


def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through the fused kernel's generator, with its products from a plain table."""
    place = device_rows.Placement.place

    def place_by_kernel(self: device_rows.Placement, *args: Any, **more: Any) -> device_rows.DeviceRows:
        return place(device_rows.Placement(self.num_bytes, self.block_rows, kernel=True), *args, **more)

    monkeypatch.setattr(device_rows.Placement, "place", place_by_kernel)


@pytest.mark.parametrize("num_bytes", [FITTING, SOME])
def test_the_kernel_leaves_the_same_bits(
    plain: dict[str, list[Any]], num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_by_table(monkeypatch)
    by_kernel(monkeypatch)
    sharded = on_device(clustered(90, 8, 5), num_bytes, 30)
    assert sharded.dense is not None
    assert isinstance(sharded.dense.generator, TritonGenerator)
    assert run_cases(Comm(), num_bytes, 50) == plain


def on_device(x: np.ndarray, num_bytes: int | None, block_rows: int | None = None) -> ShardedRows:
    cpu = torch.device("cpu")
    return join_rows(Comm(), part_of(x, 0, len(x)), block_rows=block_rows, device=cpu, dense_bytes=num_bytes)


SHORTCUTS: dict[str, dict[str, Any]] = {
    "sampled": {"method": "sampled", "sample_rows_per_cluster": 4},
    "hierarchical": {"method": "hierarchical"},
    "approximate": {"method": "approximate", "assignment": "approximate", "probes": 2},
    "balanced": {"method": "exact", "balance": 1.2},
    "oversampled": {"method": "exact", "init": "k-means||"},
    "restarts": {"method": "exact", "restarts": 2},
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_every_method_gives_the_same_bits_on_a_device(name: str) -> None:
    x = clustered(600, 10, 30)
    config = ClusteringConfig(iterations=3, **SHORTCUTS[name])
    task = ClusteringTask(25, config, choose(config, 25, len(x)), seed=3)
    one, other = (figures(cluster(on_device(x, dense, 100), task).result) for dense in (None, SOME))
    assert one == other


def test_several_k_share_the_passes_of_a_device() -> None:
    x, config = clustered(300, 12, 20), ClusteringConfig(iterations=4)
    tasks = [ClusteringTask(k, config, choose(config, k, len(x)), seed=1) for k in (1, 9, 40)]
    found = {place: figures(one.result) for place, one in cluster_together(on_device(x, SOME, 64), tasks)}
    alone = [figures(cluster(on_device(x, None), task).result) for task in tasks]
    assert [found[place] for place in range(3)] == alone


def test_more_labels_than_rows_are_refused_on_a_device() -> None:
    with pytest.raises(ValueError, match="from 1 to the number of good rows, 9"):
        sharded_kmeans(Comm(), Rows([clustered(9, 4, 2)], [np.ones(9, dtype=bool)]), 10, KMeansTask(), dense_bytes=NONE)


@pytest.mark.parametrize(("num_bytes", "kept"), [(FITTING, 190), (NONE, 0), (4 * 8 * 100, 95)])
def test_whole_blocks_stay_as_far_as_memory_goes(num_bytes: int, kept: int) -> None:
    x = to_grid(torch.from_numpy(clustered(202, 8, 5))).numpy()
    sharded = on_device(x, num_bytes, 95)
    dense = sharded.dense
    assert dense is not None
    assert (dense.num_kept, sharded.rows.num_good) == (kept, 190)
    assert f"{kept} of 190 rows stay on cpu" in dense.describe()
    blocks = list(dense.blocks())
    assert torch.equal(torch.cat([block.rows.x for block in blocks]), torch.from_numpy(x[good_rows(x)]))
    for positions in (torch.tensor([0, 4, 6]), torch.tensor([0, 201]), torch.arange(23, 39)):
        assert torch.equal(sharded.read(positions), torch.from_numpy(x)[positions])
