"""How many workers the nodes of a cluster hold. Pure: nodes are given as Ray describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.distributed.placement import check_capacity


def room(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Workers of so many CPUs and GPUs that fit the nodes that are alive; none spans two nodes."""
    return sum(
        min(int(have.get(name, 0) / need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need)
        for have in (node["Resources"] for node in nodes if node["Alive"])
    )


def gpus_per_worker(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> float:
    """What resources.gpus_per_worker comes to on these nodes."""
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1.0 if any(node["Alive"] and node["Resources"].get("GPU", 0) for node in nodes) else 0.0


def fitting(nodes: Iterable[Mapping[str, Any]], resources: Resources, gpus: float) -> int:
    """Workers that there is room for, as many as are wanted at most."""
    fit = room(nodes, resources.cpus_per_worker, gpus)
    return fit if resources.workers == "auto" else min(fit, resources.workers)


def planned(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> int:
    """Workers to start on these nodes.

    Raises:
        ValueError: they do not fit, or are fewer than a job has ranks; not with resources.elastic, as long as one does.
    """
    nodes = [node for node in nodes if node["Alive"]]
    need = {"CPU": resources.cpus_per_worker, "GPU": gpus_per_worker(nodes, resources)}
    fit = room(nodes, need["CPU"], need["GPU"])
    count = max(1, fit) if resources.workers == "auto" else resources.workers
    if fit < count and not (resources.elastic and fit):
        raise ValueError(_lack(nodes, count, need, fit))
    count = min(count, fit)
    if not resources.elastic:
        check_capacity(count, resources.adapt_ranks)
    return count


def _lack(nodes: Iterable[Mapping[str, Any]], count: int, need: Mapping[str, float], fit: int) -> str:
    """What is missing: the sum of something, or room for whole workers on single nodes."""
    nodes = list(nodes)
    for name, each in need.items():
        have = sum(node["Resources"].get(name, 0) for node in nodes)
        if count * each > have:
            return (
                f"{count} workers need {count * each:g} {name}, the Ray cluster has {have:g}; "
                f"lower resources.workers or resources.{name.lower()}s_per_worker"
            )
    shares = ", ".join(
        f"{node['NodeManagerHostname']} {node['Resources'].get('CPU', 0):g} CPU {node['Resources'].get('GPU', 0):g} GPU"
        for node in nodes
    )
    return (
        f"{count} workers of {need['CPU']:g} CPU and {need['GPU']:g} GPU do not fit: there is room for {fit} "
        f"({shares}); lower resources.workers or resources.cpus_per_worker"
    )
