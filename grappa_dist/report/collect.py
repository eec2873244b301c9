"""report: scores, figures, galleries and the logs of training jobs -> report/metrics.json and report/report.html."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from grappa_dist.artifacts import Artifact, Store, remove_artifact
from grappa_dist.checksums import load_json, verified
from grappa_dist.config import Config
from grappa_dist.console import METRICS_FILE, pluralize, read_events
from grappa_dist.data.index import count_missing, list_missing
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import read_json
from grappa_dist.make_shards.left_out import write_list
from grappa_dist.report.content import (
    BadRow,
    Clustering,
    ContactSheet,
    LabelFree,
    Nesting,
    ReportContent,
    ScoreRow,
)
from grappa_dist.report.examples import Pictures, changed_queries, cluster_samples, sample_galleries
from grappa_dist.report.facts import Steps, facts_of, graphs_of, suffixes
from grappa_dist.report.page import MOST_BAD_ROWS, kind_of, write_report
from grappa_dist.report.queries import class_gains, intervals_of
from grappa_dist.stages.bad_rows import bad_reasons
from grappa_dist.stages.damages import DAMAGES_FILE, Damage, damages_among
from grappa_dist.stages.evaluate import INSIGHT_FILE, SCORES_FILE, task_queries
from grappa_dist.stages.exclude import describe_excluded, weigh_note
from grappa_dist.stages.flow import Exclusion, Flow
from grappa_dist.stages.ground_truth import load_ground_truth
from grappa_dist.stages.insight import NEIGHBOURS
from grappa_dist.stages.partitions import PARTITIONS_FILE
from grappa_dist.stages.pseudo_label import STATS_FILE
from grappa_dist.stages.run import Run
from grappa_dist.stages.supervised import class_counts
from grappa_dist.verdict import Verdict

MOST_NAMED = 10_000  # bad images whose file's name is read, which takes a request on a store
KEEP_REPORTS = 10
MOST_DAMAGES = 20  # that the report names


def report_of(store: Store, config: Config, inputs: Mapping[str, Artifact], damages: Sequence[Damage] = ()) -> Artifact:
    shown: dict[str, Any] = {"name": config.name, "notes": list(config.notes), "config": _as_before(config.yaml())}
    shown |= {"damages": [vars(damage) for damage in damages]} if damages else {}
    return store.artifact("reports/report", shown, inputs)


def _as_before(settings: str) -> str:
    """The settings as earlier versions wrote them, with `mirror` and numbers in place of `auto`, so that reports keep
    their names."""
    settings = settings.replace("\nseed: ", "\nmirror: null\nseed: ", 1)
    settings = settings.replace("\n  centroid_shards: auto\n", "\n")  # a later one
    return settings.replace("\n  cpus_per_worker: auto\n", "\n  cpus_per_worker: 1\n").replace(
        "\n  decode_threads: auto\n", "\n  decode_threads: 2\n"
    )


def report(run: Run, flow: Flow, verdict: Verdict | None = None) -> tuple[Path, list[ScoreRow]]:
    """Writes the report if its inputs changed; its folder and the rows of the table."""
    rows = score_rows(flow)
    if not flow.report.complete:
        with run.console.stage("report", "writing"):
            write_report(_content(run, flow, rows, verdict), flow.report.begin())
            flow.report.commit()
    published = run.store.publish("report", flow.report)
    remove_old_reports(run.store.root, flow.report)
    return published, rows


def remove_old_reports(root: Path, newest: Artifact) -> None:
    """Keeps the newest KEEP_REPORTS reports of a run directory, among them the one that was just published."""
    made = sorted((when, folder) for when, folder in _reports(root) if folder != newest.path)
    for _, folder in made[: -(KEEP_REPORTS - 1)]:
        remove_artifact(folder)


def _reports(root: Path) -> Iterator[tuple[str, Path]]:
    """When the reports of a run directory were made, and their folders; damaged ones are left alone."""
    for path in (root / "reports").glob("report-*/manifest.json"):
        if not path.parent.suffix:  # of folders set aside
            with suppress(ValueError, KeyError, TypeError):
                yield str(read_json(path)["created"]), path.parent


def score_rows(flow: Flow) -> list[ScoreRow]:
    """All scores and, after the adaptor sets, the oracle's; [] without labels."""
    rows: list[ScoreRow] = []
    for model, artifact in flow.scores.items():
        rows += [_score_row(model, row) for row in load_json(artifact.path / SCORES_FILE)]
    sets = [row for row in rows if row["model"].startswith("k=")]
    frozen = [row for row in rows if row["model"] == "backbone"]
    return [*frozen, *sets, *best_sets(sets), *(row for row in rows if row not in (*frozen, *sets))]


def best_sets(sets: Sequence[ScoreRow]) -> Iterator[ScoreRow]:
    """Per task the scores of the set that is best by R-Precision, as the oracle: the choice uses labels."""
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


def _content(run: Run, flow: Flow, rows: list[ScoreRow], verdict: Verdict | None) -> ReportContent:
    insights = {m: load_json(a.path / INSIGHT_FILE) for m, a in flow.insights.items()}
    attended = {m: i for m, i in insights.items() if "attention" in i and flow.models[m].strength == 1}
    logs = {job_of(a): steps_of(a) for a in _trained(flow)}
    fused = {v: logs[job_of(a)] for v, a in flow.fusions.items()}
    decays = {v: by_step(steps, "decay_to_gradient") for v, steps in fused.items()}
    partitions = load_json(flow.partitions.path / PARTITIONS_FILE)
    tasks = task_queries(flow.ground_truth, flow.scores) if verdict else []
    compared = verdict.compared if verdict else None
    tested, trained = Pictures(flow.test), Pictures(flow.train)
    return ReportContent(
        title=run.config.name,
        rows=rows,
        intervals=intervals_of(tasks),
        classes=class_gains(tasks, compared) if compared else [],
        class_names=load_ground_truth(flow.ground_truth).label_names,
        changed=list(changed_queries(flow, tested, tasks, compared)) if compared else [],
        verdict=verdict,
        has_test=_has_test(flow),
        labels="" if rows else describe_labels(flow),
        label_free=[*_view_figures(insights), *neighbour_figures(flow.fusions, len(flow.train))],
        attention={m: i["attention"] for m, i in attended.items()},
        entropy={m: i["entropy"] for m, i in attended.items()},
        shares={v: by_step(steps, "attention") for v, steps in fused.items()},
        entropies={v: by_step(steps, "entropy") for v, steps in fused.items()},
        decay={v: [median(layer) for layer in zip(*d, strict=True)] for v, d in decays.items() if d},
        sets=[f"k={k}" for k in flow.adaptors],
        random_sets={m: spec.sets for m, spec in flow.models.items() if spec.random_sets},
        clusterings=[Clustering(**load_json(a.path / STATS_FILE)) for a in flow.labels.values()],
        nestings=[Nesting(**nesting) for nesting in partitions["nestings"]],
        sheets=[ContactSheet(k=s["k"], clusters=cluster_samples(trained, s["clusters"])) for s in partitions["sheets"]],
        curves={job: curve(steps) for job, steps in logs.items()},
        galleries=list(sample_galleries(flow, tested, insights, compared)),
        bad_rows=[*_bad(flow.train, flow.features), *_bad_test(flow)],
        facts=facts_of(run, flow, logs, tested=_has_test(flow)),
        config_yaml=(run.given or run.config).yaml(),
        notes=[*run.config.notes, *_supervision_note(flow), *_exclusion_notes(run, flow), *_damage_notes(run, flow)],
    )


def _trained(flow: Flow) -> list[Artifact]:
    labelled = flow.supervision.trained.values() if flow.supervision else []
    return list(dict.fromkeys([*flow.adaptors.values(), *flow.fusions.values(), *labelled]))


def _supervision_note(flow: Flow) -> Iterator[str]:
    if flow.supervision is not None:
        found = class_counts(flow.supervision.classes)
        yield (
            f"{' and '.join(flow.supervision.trained)}: trained with the labels of the training images "
            f"({pluralize(found['classes'], 'class', 'classes')} of {pluralize(found['labelled'], 'image')}, "
            f"of {found['images']:,}). "
            "No other row was trained with a label."
        )


def _exclusion_notes(run: Run, flow: Flow) -> Iterator[str]:
    """What `data.exclude` has left out, and how near-duplicates were trained with."""
    lines = [*describe_excluded(flow.excluded), weigh_note(run.config.data, flow.excluded.train)]
    if flow.excluded != Exclusion():
        yield f"data.exclude ({', '.join(run.config.data.exclude)}): {'; '.join(filter(None, lines))}."


def _damage_notes(run: Run, flow: Flow) -> Iterator[str]:
    """What was damaged and made anew, the report itself included."""
    damages = [*flow.damages, *damages_among(run.store.root, [flow.report.name])]
    for damage in damages[:MOST_DAMAGES]:
        yield f"Damaged and made anew: {damage}."
    if len(damages) > MOST_DAMAGES:
        yield f"Damaged and made anew as well: {len(damages) - MOST_DAMAGES} more; {DAMAGES_FILE} lists them."


def _view_figures(insights: Mapping[str, Any]) -> Iterator[LabelFree]:
    for model, insight in insights.items():
        yield LabelFree(
            model=model,
            figure="augmented view finds its source",
            value=insight["view_finds_source"],
            queries=insight["view_queries"],
        )
        for what in ("task", "label"):  # only of test images, if they have labels
            if f"neighbours_share_{what}" in insight:
                yield LabelFree(
                    model=model,
                    figure=f"test images and their {NEIGHBOURS} nearest share the {what}",
                    value=insight[f"neighbours_share_{what}"],
                    queries=insight["neighbour_queries"],
                )


def neighbour_figures(fusions: Mapping[str, Artifact], num_rows: int) -> Iterator[LabelFree]:
    """How often neighbours in the last graph of a fusion share a pseudo-label, and how often they are duplicates."""
    for variant, artifact in fusions.items():
        graphs = graphs_of(artifact)
        if graphs:
            statistics = list(graphs.values())[-1]
            figure = f"images with a near-duplicate (cosine above {statistics['duplicate_cosine']}) among the nearest"
            share = statistics["rows_with_duplicates_share"]
            yield LabelFree(model=variant, figure=figure, value=share, queries=num_rows, of_graph=True)
            if statistics.get("graph") == "approximate" and statistics["recall_rows"]:
                recall, rows = statistics["recall"], statistics["recall_rows"]
                figure = "true neighbours in the approximate graph"
                yield LabelFree(model=variant, figure=figure, value=recall, queries=rows, of_graph=True)
            shares = statistics["neighbours_share_pseudo_label"]
            for name, value in shares.items():
                figure = f"neighbours share the {name} pseudo-label"
                yield LabelFree(model=variant, figure=figure, value=value, queries=num_rows, of_graph=True)


def describe_bad_images(flow: Flow) -> str:
    """How many training images could not be used, and where they are listed; "" if all could. Needs no report."""
    count = _count_bad(flow, reported=False)
    if not count:
        return ""
    those = "those that have a row," if count_missing(flow.train.shards) else "them"
    return f"left out: {count} could not be used; features/backbone/*/bad.json list {those} with reasons"


def _count_bad(flow: Flow, *, reported: bool) -> str:
    """How many images of which could not be used; "" if all could.

    Args:
        reported: whether there is a report; else only the training images have been read.
    """
    counts = list[str]()
    for name, (images, features) in _read(flow, reported=reported).items():
        missing = count_missing(images.shards)
        if bad := len(bad_reasons(images, features)) + missing:
            rowless = f" (about {missing:,} have no row)" if missing else ""
            counts.append(f"{bad:,} of {pluralize(len(images) + missing, f'{name} image')}{rowless}")
    return " and ".join(counts)


def _read(flow: Flow, *, reported: bool) -> dict[str, tuple[ImageShards, tuple[Artifact, ...]]]:
    """The images that were read, and their features by the backbone: training and, with a report, test images."""
    groups = {"training": (flow.train, flow.features)}
    if reported and _has_test(flow):
        groups["test"] = (flow.test, flow.test_features["backbone"])
    return groups


def list_bad_images(flow: Flow, path: Path) -> str:
    """Lists the images that could not be used in a CSV, by the names of their files; a line that says so, or ""."""
    listed = list[tuple[str, str]]()
    for images, features in _read(flow, reported=True).values():
        for number, (row, why) in enumerate(bad_reasons(images, features).items()):
            name = images.name(row) if number < MOST_NAMED else ""
            listed.append((name or f"{images.shards[images.locate(row)[0]].path}: {images.key(row)}", why))
        listed += [
            (f"{some.shard.path}: {some.key}", f"{pluralize(some.images, 'image')}: {some.reason}")
            for some in list_missing(images.shards)
        ]
    if not write_list(path, listed):
        return ""
    return f"left out  {_count_bad(flow, reported=True)} could not be used: named, with reasons, in {path}"


def describe_labels(flow: Flow) -> str:
    """Why the test images give no scores, and what to do about it; "" where nothing is evaluated by labels.

    Expects the ground truth, and that there are no scores.
    """
    if not _has_test(flow):
        return ""
    found = load_ground_truth(flow.ground_truth)
    images, labelled = len(found.labels), int((np.asarray(found.labels) >= 0).sum())
    if labelled:
        return (
            f"{labelled} of {images} test images {'has' if labelled == 1 else 'have'} a label, "
            f"but no two good ones of a task have the same: each "
            "query needs another image of its class"
        )
    members = suffixes(flow.test)
    keys = ", ".join(f"{key!r:.40}" for key in found.other_keys)
    return (
        f"None of {images} test images has a label. Labels are read from the JSON member beside an image, "
        '<key>.json with {"label": ..., "task": ...}'
        + (f"; there the JSON members have {keys}" if keys else "")
        + (f"; other members of the tars are not read: {members}" if members else "")
    )


def _bad(images: ImageShards, features: Sequence[Artifact]) -> Iterator[BadRow]:
    """The first rows by shard and key; of the others, whose keys would be read one by one, how many for each reason."""
    others = Counter[str]()
    for number, (row, reason) in enumerate(bad_reasons(images, features).items()):
        if number >= MOST_BAD_ROWS:
            others[kind_of(reason)] += 1
            continue
        shard, _ = images.locate(row)
        yield BadRow(shard=images.shards[shard].name, key=images.key(row), reason=reason, file=images.name(row))
    for reason, count in others.items():
        yield BadRow(shard="", key="", reason=reason, images=count)
    for some in list_missing(images.shards):
        yield BadRow(shard=some.shard.name, key=some.key, reason=some.reason, images=some.images)


def _bad_test(flow: Flow) -> Iterator[BadRow]:
    if _has_test(flow):  # else training images were evaluated
        yield from _bad(flow.test, flow.test_features["backbone"])


def _has_test(flow: Flow) -> bool:
    return bool(flow.ground_truth.settings["labelled"])


def steps_of(artifact: Artifact) -> Steps:
    """The steps in the log of the job."""
    return [event for event in read_events(verified(artifact.path / METRICS_FILE)) if event["name"] == "step"]


def curve(steps: Steps) -> list[dict[str, float]]:
    """Steps with loss, accuracy, rates and, for fusions, entropy and decay over gradient as means over layers."""
    points = []
    for event in steps:
        point = {k: v for k, v in event.items() if k in ("step", "loss", "accuracy", "lr", "images_per_s")}
        for figure in ("entropy", "decay_to_gradient"):
            layers = [v for k, v in event.items() if re.fullmatch(rf"{figure}\.\d+", k) and math.isfinite(v)]
            if layers:
                point[figure] = sum(layers) / len(layers)
        points.append(point)
    return points


def median(values: Sequence[float]) -> float:
    """The median of the finite values; NaN if there are none."""
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan


def by_step(steps: Steps, figure: str) -> list[list[float]]:
    """The numbered values of a figure in order, a list for every step that has them."""
    found = []
    for event in steps:
        numbered = {int(k.rpartition(".")[2]): v for k, v in event.items() if re.fullmatch(rf"{figure}\.\d+", k)}
        found += [[numbered[i] for i in sorted(numbered)]] if numbered else []
    return found


def job_of(artifact: Artifact) -> str:
    """The name of the job that trained it, such as k=64 or neighbours."""
    return artifact.kind.split("/")[1]
