"""What the report says of a run itself: when, where, by which code and command, and what came of each stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grappa_dist.artifacts import Artifact
from grappa_dist.checksums import load_json
from grappa_dist.console import EVENTS_FILE, pluralize, read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.progress import duration
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.run import Run

Steps = Sequence[Mapping[str, Any]]
MOST_SUFFIXES = 8
MOST_DIFFERENT = 4  # commands, machines, ... of attempts that differ in them


def facts_of(run: Run, flow: Flow, logs: Mapping[str, Steps], *, tested: bool) -> dict[str, str]:
    """Name and value of each fact, in the order of the page.

    Args:
        logs: the steps of every trained job, by its name.
        tested: whether there is a test set; else training images were looked at.
    """
    test = f"{len(flow.test):,} test" if tested else f"no test set: {len(flow.test):,} of them looked at"
    sets = {"training": flow.train, **({"test": flow.test} if tested else {})}
    ignored = [f"{_ignored(images)} {name} {suffixes(images)}".strip() for name, images in sets.items()]
    facts = origin_facts(read_events(run.store.root / EVENTS_FILE), time.time())
    facts |= {"images": f"{len(flow.train):,} training, {test}"}
    facts |= {"members of the tars that are no images": ", ".join(ignored)} if any(map(_ignored, sets.values())) else {}
    facts |= {"backbone": run.config.backbone.name, "seed": str(run.config.seed)}
    made = {"labels": flow.labels.values(), "adaptors": flow.adaptors.values(), "fusions": flow.fusions.values()}
    facts |= {name: ", ".join(a.name for a in group) for name, group in made.items()}
    labelled = flow.supervision.trained.items() if flow.supervision else ()
    facts |= {f"with labels: {name}": artifact.name for name, artifact in labelled}
    facts |= waiting_facts(logs)
    return facts | dict(graph_facts(flow.fusions)) | {"model": flow.model.name}


def origin_facts(events: Iterable[Mapping[str, Any]], now: float) -> dict[str, str]:
    """Dates, command, machine, workers, versions, code and time by stage, as the events of all attempts tell them.

    Args:
        now: when the report is written, in seconds since 1970.
    """
    begun, origins, nodes = list[float](), list[Mapping[str, Any]](), list[Any]()
    seconds = Counter[str]()
    for event in events:
        match event.get("name"):
            case "run_begins":
                begun.append(float(event["t"]))
            case "origin":
                origins.append(event)
            case "workers":
                nodes.append(describe_nodes(event["nodes"]))
            case "stage_ends":
                seconds[str(event["stage"])] += event["seconds"]
    attempts = f", the first of {len(begun)} starts" if len(begun) > 1 else ""
    found = {
        "report written": _date(now),
        "run began": f"{_date(begun[0])}{attempts}" if begun else "",
        "command": _different(o["command"] or "called from Python" for o in origins),
        "machine of the driver": _different(o["machine"] for o in origins),
        "workers": _different(nodes),
        "code": _different(o["code"] for o in origins),
        "versions": _different(", ".join(f"{name} {v}" for name, v in o["versions"].items()) for o in origins),
        "time by stage (all attempts)": ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items()),
    }
    return {name: value for name, value in found.items() if value}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _different(values: Iterable[str]) -> str:
    """The latest value, and before it what attempts had in its place."""
    found = list(dict.fromkeys(reversed(list(values))))
    if len(found) < 2:
        return "".join(found)
    more = f" (and {len(found) - MOST_DIFFERENT} more)" if len(found) > MOST_DIFFERENT else ""
    return f"{found[0]}; earlier attempts: {'; '.join(found[1:MOST_DIFFERENT])}{more}"


def describe_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    """For example "4 workers on 2 nodes, each AMD EPYC, 16 cores, 128 GiB of memory, no GPU"."""
    parts = []
    for alike in nodes[:MOST_DIFFERENT]:
        each = f", {'each ' if alike['nodes'] > 1 else ''}{alike['machine']}" if alike["machine"] else ""
        parts.append(f"{pluralize(alike['workers'], 'worker')} on {pluralize(alike['nodes'], 'node')}{each}")
    rest = sum(alike["nodes"] for alike in nodes[MOST_DIFFERENT:])
    return " and ".join(parts) + (f" and {pluralize(rest, 'other node')}" if rest else "")


def graph_facts(fusions: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
    """How neighbours were found by fusions whose graph is approximate."""
    for variant, artifact in fusions.items():
        graphs = graphs_of(artifact)
        searches = {e: _describe_search(found) for e, found in graphs.items() if found.get("graph") == "approximate"}
        if searches:
            by_epoch = [f"epoch {epoch + 1} {how}" for epoch, how in searches.items()]
            yield (
                f"neighbours of {variant} were searched",
                "; ".join(by_epoch if len(by_epoch) > 1 else searches.values()),
            )


def graphs_of(artifact: Artifact) -> dict[int, dict[str, Any]]:
    """The statistics of each graph by epoch, ascending; empty if there are no graphs."""
    found = {int(path.parent.name[6:]): path for path in artifact.path.glob("knn/epoch-*/statistics.json")}
    return {epoch: load_json(found[epoch]) for epoch in sorted(found)}


def _describe_search(statistics: Mapping[str, Any]) -> str:
    if not statistics["recall_rows"]:
        return "exactly: lists did not reach fuse.recall_floor"
    error = f" ± {statistics['recall_error']:.4f}" if "recall_error" in statistics else ""
    return f"through {statistics['probes']} of {statistics['lists']} lists, recall {statistics['recall']:.4f}{error}"


def waiting_facts(logs: Mapping[str, Steps]) -> dict[str, str]:
    """The share of their time that the jobs waited for data, as a mean over steps."""
    waits = []
    for job, steps in logs.items():
        shares = [step["data_wait_share"] for step in steps if "data_wait_share" in step]
        waits += [f"{job} {np.mean(shares):.1%}"] if shares else []
    return {"waiting for data": ", ".join(waits)} if waits else {}


def _ignored(images: ImageShards) -> int:
    return sum(shard.ignored for shard in images.shards)


def suffixes(images: ImageShards) -> str:
    """The most frequent suffixes of members that are not read, with their numbers."""
    found = Counter[str]()
    for shard in images.shards:
        found.update(dict(shard.others))
    return ", ".join(f".{suffix} ({number})" for suffix, number in found.most_common(MOST_SUFFIXES))
