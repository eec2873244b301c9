from __future__ import annotations

from typing import Any

import pytest

from grappa_dist.config import Resources
from grappa_dist.distributed.preflight import Facts
from grappa_dist.distributed.ray_cluster import (
    Cluster,
    gpus_per_worker,
    usable_workers,
    worker_capacity,
    workers_to_start,
)
from grappa_dist.distributed.runner import Runner


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    have = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    return {"Alive": alive, "Resources": have, "NodeManagerHostname": f"host{cpus:g}"}


def test_no_worker_spans_two_nodes_and_dead_nodes_hold_none() -> None:
    assert worker_capacity([node(4), node(5), node(2), node(8, alive=False)], 3, 0) == 2
    assert worker_capacity([node(16, 2), node(2, 8), node(64)], 1, 1) == 4
    assert worker_capacity([], 1, 0) == 0


def test_auto_takes_gpus_where_any_node_has_one() -> None:
    assert gpus_per_worker([node(4), node(4, 1)], Resources()) == 1
    assert gpus_per_worker([node(4), node(4, 1, alive=False)], Resources()) == 0
    assert gpus_per_worker([node(4, 1)], Resources(gpus_per_worker=0)) == 0


def test_as_many_workers_start_as_fit_the_nodes_but_no_more_than_asked() -> None:
    nodes = [node(8, 4), node(8, 4)]
    assert workers_to_start(nodes, Resources()) == 8
    assert workers_to_start(nodes, Resources(workers=3)) == 3
    assert usable_workers(nodes, Resources(workers=3), 1) == 3
    assert usable_workers(nodes[:1], Resources(workers=6), 1) == 4


def test_every_gpu_has_a_worker_whatever_its_part_of_the_cpus() -> None:
    nodes = [node(128, 8), node(96, 8), node(64)]
    assert workers_to_start(nodes, Resources()) == 16
    assert usable_workers(nodes, Resources(), 1) == 16
    assert workers_to_start(nodes, Resources(cpus_per_worker=64)) == 3  # as asked
    assert workers_to_start(nodes, Resources(gpus_per_worker=0)) == 288


def test_nodes_that_are_alike_are_described_once_with_their_workers_and_each_change_is_an_event() -> None:
    machines = {"a": "16 cores", "b": "8 cores", "c": "16 cores"}
    cluster = Cluster(Resources(), facts={name: Facts(name, machine=what) for name, what in machines.items()})
    cluster._node_of = {1: "a", 2: "a", 3: "b", 4: "c", 5: "unknown"}
    alike = [
        {"machine": "", "nodes": 1, "workers": 1},
        {"machine": "16 cores", "nodes": 2, "workers": 3},
        {"machine": "8 cores", "nodes": 1, "workers": 1},
    ]
    assert cluster.describe_nodes() == alike
    events = list[Any]()
    runner = Runner(cluster, Resources(), on_event=lambda name, **figures: events.append((name, figures)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "gather", lambda self: list(self._node_of))
        assert [len(runner._gather()) for _ in range(2)] == [5, 5]
        del cluster._node_of[5]
        runner._gather()
    assert events == [("workers", {"nodes": alike}), ("workers", {"nodes": alike[1:]})]


@pytest.mark.parametrize(
    ("nodes", "settings", "message"),
    [
        ([node(4)], {"workers": 5}, r"5 workers need 5 CPU, the Ray cluster has 4; lower resources\.workers"),
        ([node(4, 1), node(4)], {"workers": 2}, "2 workers need 2 GPU, the Ray cluster has 1"),
        ([], {}, "1 worker needs 1 CPU, the Ray cluster has 0"),
        (
            [node(3), node(3)],
            {"workers": 3, "cpus_per_worker": 2},
            r"3 workers of 2 CPU and 0 GPU do not fit: the nodes can hold 2 \(host3 3 CPU 0 GPU, host3 3 CPU 0 GPU\)",
        ),
        ([node(2)], {"adapt_ranks": 3}, r"resources\.adapt_ranks=3 is more than the 2 workers: 1 missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    nodes: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        workers_to_start(nodes, Resources(**settings))


def test_with_elastic_what_fits_is_taken_as_long_as_that_is_one() -> None:
    elastic = {"elastic": True, "workers": 5, "adapt_ranks": 4}
    assert workers_to_start([node(2)], Resources(**elastic)) == 2
    with pytest.raises(ValueError, match="5 workers need 5 CPU, the Ray cluster has 0"):
        workers_to_start([node(0)], Resources(**elastic))
