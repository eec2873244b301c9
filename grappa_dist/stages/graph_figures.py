"""What is said in the report of the k-NN graphs that fusions were trained with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from grappa_dist.artifacts import Artifact
from grappa_dist.report.content import LabelFree


def neighbour_figures(fusions: Mapping[str, Artifact], num_rows: int) -> Iterator[LabelFree]:
    """How often neighbours in the fused model's last graph share a pseudo-label, and how often they are copies."""
    for variant, artifact in fusions.items():
        graphs = graphs_of(artifact)
        if graphs:
            statistics = list(graphs.values())[-1]
            figure = f"images with a near-duplicate (cosine above {statistics['duplicate_cosine']}) among the nearest"
            copies = statistics["rows_with_duplicates_share"]
            yield LabelFree(model=variant, figure=figure, value=copies, queries=num_rows, of_graph=True)
            if statistics.get("graph") == "approximate" and statistics["recall_rows"]:
                recall, rows = statistics["recall"], statistics["recall_rows"]
                figure = "true neighbours in the approximate graph"
                yield LabelFree(model=variant, figure=figure, value=recall, queries=rows, of_graph=True)
            shares = statistics["neighbours_share_pseudo_label"]
            for name, value in shares.items():
                figure = f"neighbours share the {name} pseudo-label"
                yield LabelFree(model=variant, figure=figure, value=value, queries=num_rows, of_graph=True)


def graphs_of(artifact: Artifact) -> dict[int, dict[str, Any]]:
    """What is said of each graph, by its epoch, ascending; nothing where there is none."""
    found = {int(path.parent.name[6:]): path for path in artifact.path.glob("knn/epoch-*/statistics.json")}
    return {epoch: json.loads(found[epoch].read_text()) for epoch in sorted(found)}


def graph_facts(fusions: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
    """How neighbours were found where that was to be through lists, and in which features where not in fresh ones."""
    for variant, artifact in fusions.items():
        graphs = graphs_of(artifact)
        if any(told.get("features") == "reused" for told in graphs.values()):
            how = "reused from the training pass of the epoch before, of augmented images"
            yield f"features for the neighbours of {variant}", how
        said = {epoch: _searched(told) for epoch, told in graphs.items() if told.get("graph") == "approximate"}
        if said:
            several = [f"epoch {epoch + 1} {how}" for epoch, how in said.items()]
            yield f"neighbours of {variant} were searched", "; ".join(several if len(said) > 1 else said.values())


def _searched(told: Mapping[str, Any]) -> str:
    if not told["recall_rows"]:
        return "exactly: lists did not reach fuse.recall_floor"
    error = f" ± {told['recall_error']:.4f}" if "recall_error" in told else ""
    return f"through {told['probes']} of {told['lists']} lists, recall {told['recall']:.4f}{error}"
