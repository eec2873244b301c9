"""Nodes that go and come while work is done: several raylets on this machine, removed and added."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.distributed.preflight import Checks, versions
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from grappa_dist.distributed.worker import RankContext

RESOURCES = Resources(cpus_per_worker=1, placement_timeout_s=200, collective_timeout_s=120)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head without CPUs; the tests add nodes of one CPU."""
    from ray import cluster_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        machines = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 2**27},
        )
        patch.setenv("RAY_ADDRESS", machines.address)
        try:
            yield machines
        finally:
            machines.shutdown()


def add(machines: Any) -> Any:
    return machines.add_node(num_cpus=1, object_store_memory=2**27)


def read_unless(flag: str) -> None:
    if Path(flag).exists():
        raise FileNotFoundError(f"{flag} is in the way")


def sum_until_alone(context: RankContext, folder: str) -> tuple[int, int]:
    """Sums over ranks, for ever where there are two of them: only the loss of one ends that."""
    (Path(folder) / f"begun-{context.comm.size}-{context.comm.rank}").touch()
    while True:
        enough = torch.tensor([int(context.comm.size == 1)])
        if int(context.comm.sum_(enough)):
            return context.comm.size, os.getpid()
        time.sleep(0.05)


def remove_once(machines: Any, node: Any, marker: Path) -> threading.Thread:
    def remove() -> None:
        end = time.monotonic() + 300
        while not marker.exists() and time.monotonic() < end:
            time.sleep(0.05)
        machines.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    return thread


@pytest.mark.long
def test_a_job_goes_on_with_fewer_ranks_and_nodes_that_join_are_used_by_the_next_stage(
    machines: Any, tmp_path: Path
) -> None:
    nodes = [add(machines), add(machines)]
    machines.wait_for_nodes()
    log: list[str] = []
    flag = tmp_path / "flag"
    checks = Checks(tmp_path / "run", partial(read_unless, str(flag)))
    elastic = RESOURCES.model_copy(update={"elastic": True})
    cluster = Cluster(elastic, checks, log.append)
    runner = Runner(cluster, elastic)
    try:
        assert runner.num_workers == 2
        assert [facts.versions for facts in cluster.facts.values()] == [versions()] * 2  # each node answered
        assert not (tmp_path / "run").exists()

        removal = remove_once(machines, nodes[0], tmp_path / "begun-2-1")
        results = runner.run_jobs([Job("sums", sum_until_alone, str(tmp_path), 2)])["sums"]
        removal.join()
        assert [size for size, _ in results] == [1]
        assert any("2 become 1" in text or "no longer fit" in text for text in log), log

        flag.touch()
        refused = add(machines)
        machines.wait_for_nodes()
        assert runner.num_workers == 1
        assert any("preflight: " in text and "is in the way" in text for text in log), log

        flag.unlink()
        machines.remove_node(refused)
        nodes += [add(machines)]
        machines.wait_for_nodes()
        assert runner.num_workers == 2
        assert log[-1] == "workers: 1 become 2"
    finally:
        cluster.close()
        for node in nodes[1:]:
            machines.remove_node(node)


@pytest.mark.long
def test_without_elastic_a_lost_node_is_an_error_within_a_bounded_time(machines: Any, tmp_path: Path) -> None:
    nodes = [add(machines), add(machines)]
    machines.wait_for_nodes()
    cluster = Cluster(RESOURCES)
    runner = Runner(cluster, RESOURCES)
    try:
        assert runner.num_workers == 2
        cluster.resources = RESOURCES.model_copy(update={"placement_timeout_s": 8.0})  # too little for starting above
        removal = remove_once(machines, nodes[0], tmp_path / "begun-2-1")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[12] of 2 workers did not start within 8 s; .*is a node gone\?"):
            runner.run_jobs([Job("sums", sum_until_alone, str(tmp_path), 2)])
        removal.join()
        assert time.monotonic() - began < 8 + 60  # noticed in a few seconds, then the time that placing may take
    finally:
        cluster.close()
        machines.remove_node(nodes[1])
