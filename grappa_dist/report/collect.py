"""report: scores, figures and galleries -> report/metrics.json and report/report.html."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import Config
from grappa_dist.console import EVENTS_FILE, duration, read_events
from grappa_dist.data.decoding import decode
from grappa_dist.data.losses import losses_of, lost_images
from grappa_dist.data.shards import ImageShards
from grappa_dist.report import (
    Clustering,
    ClusterSample,
    ContactSheet,
    Gallery,
    Hit,
    Nesting,
    ReportContent,
    write_report,
)
from grappa_dist.report.content import BadRow, LabelFree, ScoreRow
from grappa_dist.report.sections import MOST_BAD_ROWS
from grappa_dist.stages.embed import bad_reasons
from grappa_dist.stages.evaluate import INSIGHT_FILE, NEIGHBOURS, SCORES_FILE
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.graph_figures import graph_facts, neighbour_figures
from grappa_dist.stages.ground_truth import Truth, load_truth
from grappa_dist.stages.label_stats import STATS_FILE
from grappa_dist.stages.partitions import PARTITIONS_FILE
from grappa_dist.stages.run import Run
from grappa_dist.stages.training_figures import Steps, by_step, curve, job_of, median, steps_of, waiting_facts
from grappa_dist.stages.true_labels import class_counts

THUMBNAIL_PX = 112
TRACKED = ("torch", "timm", "deepspeed", "ray", "webdataset", "grappa_dist")


def report_of(store: Store, config: Config, inputs: Mapping[str, Artifact]) -> Artifact:
    shown = {"name": config.name, "notes": list(config.notes), "config": config.yaml()}
    return store.artifact("reports/report", shown, inputs)


def report(run: Run, flow: Flow) -> tuple[Path, list[ScoreRow]]:
    """Writes the report if its inputs changed; its folder and the rows of the table."""
    rows = score_rows(flow)
    if not flow.report.complete:
        with run.console.stage("report", "writing"):
            write_report(_content(run, flow, rows), flow.report.begin())
            flow.report.commit()
    return run.store.publish("report", flow.report), rows


def score_rows(flow: Flow) -> list[ScoreRow]:
    """All scores and, after the adaptor sets, the oracle's; [] without labels."""
    rows: list[ScoreRow] = []
    for model, artifact in flow.scores.items():
        rows += [_score_row(model, row) for row in json.loads((artifact.path / SCORES_FILE).read_text())]
    sets = [row for row in rows if row["model"].startswith("k=")]
    frozen = [row for row in rows if row["model"] == "backbone"]
    return [*frozen, *sets, *best_sets(sets), *(row for row in rows if row not in (*frozen, *sets))]


def best_sets(sets: Sequence[ScoreRow]) -> Iterator[ScoreRow]:
    """Per task the scores of the set that is best by R-Precision: it uses labels, so no method may."""
    for task in dict.fromkeys(row["task"] for row in sets):
        best = max((row for row in sets if row["task"] == task), key=lambda row: row["r_precision"])
        yield _score_row("oracle", best)


def _score_row(model: str, row: Mapping[str, Any]) -> ScoreRow:
    return {
        "model": model,
        "task": row["task"],
        "queries": row["queries"],
        "r_precision": row["r_precision"],
        "map_at_r": row["map_at_r"],
        "recall_at_1": row["recall_at_1"],
    }


def _content(run: Run, flow: Flow, rows: list[ScoreRow]) -> ReportContent:
    insights = {m: json.loads((a.path / INSIGHT_FILE).read_text()) for m, a in flow.insights.items()}
    logs = {job_of(a): steps_of(a) for a in _trained(flow)}
    fused = {v: logs[job_of(a)] for v, a in flow.fusions.items()}
    decays = {v: by_step(steps, "decay_to_gradient") for v, steps in fused.items()}
    partitions = json.loads((flow.partitions.path / PARTITIONS_FILE).read_text())
    return ReportContent(
        title=run.config.name,
        rows=rows,
        has_test=_has_test(flow),
        label_free=[*_view_figures(insights), *neighbour_figures(flow.fusions, len(flow.train))],
        attention={m: i["attention"] for m, i in insights.items() if "attention" in i},
        entropy={m: i["entropy"] for m, i in insights.items() if "entropy" in i},
        shares={v: by_step(steps, "attention") for v, steps in fused.items()},
        entropies={v: by_step(steps, "entropy") for v, steps in fused.items()},
        decay={v: [median(layer) for layer in zip(*d, strict=True)] for v, d in decays.items() if d},
        sets=[f"k={k}" for k in flow.adaptors],
        own_sets={m: spec.sets for m, spec in flow.models.items() if spec.own_sets},
        clusterings=[Clustering(**json.loads((a.path / STATS_FILE).read_text())) for a in flow.labels.values()],
        nestings=[Nesting(**nesting) for nesting in partitions["nestings"]],
        sheets=[ContactSheet(k=s["k"], clusters=_samples(flow.train, s["clusters"])) for s in partitions["sheets"]],
        curves={job: curve(steps) for job, steps in logs.items()},
        galleries=list(_galleries(flow, insights)),
        bad_rows=[*_bad(flow.train, flow.features), *_bad_test(flow)],
        facts=_facts(run, flow, logs),
        config_yaml=run.config.yaml(),
        notes=[*run.config.notes, *_who_saw_labels(flow)],
    )


def _trained(flow: Flow) -> list[Artifact]:
    labelled = flow.supervision.trained.values() if flow.supervision else []
    return list(dict.fromkeys([*flow.adaptors.values(), *flow.fusions.values(), *labelled]))


def _who_saw_labels(flow: Flow) -> Iterator[str]:
    if flow.supervision is not None:
        found = class_counts(flow.supervision.classes)
        yield (
            f"{' and '.join(flow.supervision.trained)}: trained with the labels of the training images "
            f"({found['classes']:,} classes of {found['labelled']:,} images, of {found['images']:,}). "
            "No other row was trained with a label."
        )


def _view_figures(insights: Mapping[str, Any]) -> Iterator[LabelFree]:
    for model, insight in insights.items():
        yield LabelFree(
            model=model,
            figure="augmented view finds its source",
            value=insight["view_finds_source"],
            queries=insight["view_queries"],
        )
        for what in ("task", "label"):  # only where there are labels: these figures are none of training
            if f"neighbours_share_{what}" in insight:
                yield LabelFree(
                    model=model,
                    figure=f"test images and their {NEIGHBOURS} nearest share the {what}",
                    value=insight[f"neighbours_share_{what}"],
                    queries=insight["neighbour_queries"],
                )


def _galleries(flow: Flow, insights: Mapping[str, Any]) -> Iterator[Gallery]:
    truth = load_truth(flow.truth)
    shown = [m for m in ("backbone", *flow.models) if m == "backbone" or not m.startswith("k=")]
    for number, first in enumerate(insights["backbone"]["galleries"]):
        query = first["query"]
        hits = {m: insights[m]["galleries"][number]["hits"] for m in dict.fromkeys(shown)}
        label = int(truth.labels[query])
        yield Gallery(
            task=truth.task_names[first["task"]],
            query=_thumbnail(flow.test, query),
            label=truth.label_names[label] if label >= 0 else None,
            results={m: [_hit(flow.test, truth, label, hit) for hit in found] for m, found in hits.items()},
        )


def _hit(images: ImageShards, truth: Truth, label: int, hit: Mapping[str, Any]) -> Hit:
    correct = None if label < 0 else bool(truth.labels[hit["row"]] == label)
    return Hit(image=_thumbnail(images, hit["row"]), score=hit["score"], correct=correct)


def _samples(images: ImageShards, clusters: Sequence[Mapping[str, Any]]) -> list[ClusterSample]:
    return [
        ClusterSample(
            pick=c["pick"], label=c["label"], size=c["size"], images=[_thumbnail(images, row) for row in c["rows"]]
        )
        for c in clusters
    ]


def _thumbnail(images: ImageShards, row: int) -> bytes:
    image = decode(images.image_bytes(row))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def bad_in_words(flow: Flow, *, reported: bool) -> str:
    """How many images could not be used, and where one reads which and why; "" where all could.

    Args:
        reported: whether there is a report; else the training images alone have been looked at.
    """
    groups = {"training": (flow.train, flow.features)}
    if reported and _has_test(flow):
        groups["test"] = (flow.test, flow.test_features["backbone"])
    unread = {name: len(bad_reasons(*group)) for name, group in groups.items()}
    lost = {name: lost_images(images.shards) for name, (images, _) in groups.items()}
    said = [
        f"{unread[name] + lost[name]} of {len(images) + lost[name]} {name} images"
        + (f" (about {lost[name]} have no row)" if lost[name] else "")
        for name, (images, _) in groups.items()
        if unread[name] + lost[name]
    ]
    if not said:
        return ""
    if reported:
        lines = sum(unread.values()) + sum(1 for images, _ in groups.values() for _ in losses_of(images.shards))
        where = f"the report lists {'them' if lines <= MOST_BAD_ROWS else f'the first {MOST_BAD_ROWS}'} with reasons"
    else:
        those = "those that have a row," if any(lost.values()) else "them"
        where = f"features/backbone/*/bad.json list {those} with reasons"
    return f"bad images, which take part in nothing: {' and '.join(said)}; {where}"


def _bad(images: ImageShards, features: Sequence[Artifact]) -> Iterator[BadRow]:
    for number, (row, reason) in enumerate(sorted(bad_reasons(images, features).items())):
        shard, _ = images.locate(row)
        file = images.name(row) if number < MOST_BAD_ROWS else ""  # of those that are listed
        yield BadRow(shard=images.shards[shard].name, key=images.key(row), reason=reason, file=file)
    for loss in losses_of(images.shards):
        yield BadRow(shard=loss.shard.name, key=loss.key, reason=loss.reason, images=loss.images)


def _bad_test(flow: Flow) -> Iterator[BadRow]:
    if _has_test(flow):  # else they are training images
        yield from _bad(flow.test, flow.test_features["backbone"])


def _has_test(flow: Flow) -> bool:
    return bool(flow.truth.settings["labelled"])


def _facts(run: Run, flow: Flow, logs: Mapping[str, Steps]) -> dict[str, str]:
    seconds: dict[str, float] = {}
    for event in read_events(run.store.root / EVENTS_FILE):
        if event["name"] == "stage_ends":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    tested = f"{len(flow.test)} test" if _has_test(flow) else ""
    ignored = [f"{_ignored(flow.train)} training", *([f"{_ignored(flow.test)} test"] if tested else [])]
    facts = {
        "images": f"{len(flow.train)} training, {tested or f'no test set: {len(flow.test)} of these were looked at'}",
        "members of the tars that are no images": ", ".join(ignored),
        "backbone": run.config.backbone.name,
        "seed": str(run.config.seed),
        "time by stage (all attempts)": ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items()),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in TRACKED if _installed(name)),
    }
    made = {"labels": flow.labels.values(), "adaptors": flow.adaptors.values(), "fusions": flow.fusions.values()}
    facts |= {name: ", ".join(a.name for a in group) for name, group in made.items()}
    labelled = flow.supervision.trained.items() if flow.supervision else ()
    facts |= {f"with labels: {name}": artifact.name for name, artifact in labelled}
    facts |= waiting_facts(logs)
    return facts | dict(graph_facts(flow.fusions)) | {"model": flow.model.name}


def _ignored(images: ImageShards) -> int:
    return sum(shard.ignored for shard in images.shards)


def _installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True
