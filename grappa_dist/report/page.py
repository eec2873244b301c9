"""Writes the report: the scores as JSON, and one self-contained HTML page.

The page opens with the headline: tiles, the score table, a reading of it, and which granularity suits which task. Each
of the sections is a function of the content that returns markup; "" leaves the section out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from grappa_dist.console import pluralize
from grappa_dist.files import write_bytes, write_utf8
from grappa_dist.report.attention import attention_section
from grappa_dist.report.classes import classes_section
from grappa_dist.report.clusters import contact_sheets, method_table, nesting_table
from grappa_dist.report.content import Clustering, LabelFree, ReportContent, ScoreRow
from grappa_dist.report.gallery import Images, changed_section, galleries
from grappa_dist.report.html import MARK, STYLE, absent, number, page_head, percent, points, sentences, table, text
from grappa_dist.report.plots import COLOURS, Axes, Series, bar_chart, grid, line_chart
from grappa_dist.report.queries import ORACLE
from grappa_dist.report.scores import (
    AVERAGE,
    SAW_LABELS,
    Scores,
    is_learned,
    kind,
    ordered,
    recall_table,
    score_table,
)
from grappa_dist.report.sentences import describe_gain, read_scores
from grappa_dist.report.verdict import as_json, verdict_section
from grappa_dist.variants import BACKBONE

MOST_BAD_ROWS = 100
MOST_CLUSTERINGS = 24  # histograms
MOST_METRICS = 8  # charts for one kind of job
MOST_PROFILES = 24
MOST_CONFIG = 100_000  # characters
_TIMES = {"step", "epoch", "time_s", "seconds"}  # keys of a curve that are no metric
_NAMES = {
    "loss": "Loss",
    "accuracy": "Accuracy on training images",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "entropy": "Entropy of attention / log N, mean of layers",
    "decay_to_gradient": "Weight decay / gradient of Q and K, mean of layers",
}
_WORDS = (
    (
        "R-Precision",
        "the share of the query's class among its R nearest images, R being the number of other images of the class.",
    ),
    ("MAP@R", "like R-Precision, but it also rewards having the right images first. Never above R-Precision."),
    ("recall@1", "how often the nearest image is of the query's class."),
    ("backbone", "the pretrained model as it came, frozen."),
    (
        "k=K",
        "the backbone with one adaptor set, trained to classify unlabelled images into K clusters. Larger K is finer.",
    ),
    (
        "oracle",
        "the best of the k=K rows for each task, chosen with its labels: what picking one set could reach at most.",
    ),
    ("average", "all adaptor sets in one model, each with the same weight. Nothing is learned."),
    (
        "gallery",
        "all sets, weighted alike for all images of a task, by how often neighbours of neighbours are neighbours "
        "there. Nothing is learned and no label is read, but it sees the test images that are searched, and which task "
        "each belongs to; no other row but the oracle does.",
    ),
    ("transforms", "all sets, weighted for each image by attention that was trained on two views of one image."),
    (
        "neighbours",
        "all sets, weighted by attention that was trained on pairs of an image and one of its nearest neighbours.",
    ),
    (
        "random-one, random-all",
        "to compare with: one randomly initialised adaptor set, or one for each partition with attention over them, "
        "trained on pairs of neighbours alone, without clusters. M+A_1 and M* of the paper.",
    ),
    (
        "supervised-set, supervised",
        "to compare with: one set trained on the labels of the training images in place of clusters, and attention "
        "over the k=K sets trained with these labels. No other row was trained with a label.",
    ),
)


def write_report(content: ReportContent, out_dir: str | Path) -> None:
    """Writes metrics.json and report.html into a directory that exists."""
    out = Path(out_dir)
    rows = [_json_row(row) for row in content.rows]
    metrics = json.dumps({"rows": rows, "verdict": as_json(content.verdict)}, indent=1, allow_nan=False)
    write_utf8(out / "metrics.json", metrics + "\n")
    write_bytes(out / "report.html", page(content).encode("utf-8", "replace"))


def _json_row(row: ScoreRow) -> dict[str, str | int | float | None]:
    """The row with plain numbers; JSON has no NaN, so a score that is not finite becomes null."""

    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {
        "model": row["model"],
        "task": row["task"],
        "queries": int(row["queries"]),
        "r_precision": plain(row["r_precision"]),
        "map_at_r": plain(row["map_at_r"]),
        "recall_at_1": plain(row["recall_at_1"]),
    }


ABOUT = "One image-search model for many tasks, adapted without labels."


def page(content: ReportContent) -> str:
    """The whole page as HTML."""
    images = Images()  # of all sections, so that each image is stored once
    sections = [
        ("verdict", "The verdict", _verdict(content)),
        ("scores", "Retrieval scores", headline_section(content)),
        ("classes", "By class", classes_section(content.classes, content.class_names, _compared(content))),
        ("queries", "Queries that changed most", changed_section(content.changed, _compared(content), images)),
        ("galleries", "Galleries", gallery_section(content, images)),
        ("attention", "Attention", attention_section(content)),
        ("clusterings", "Clusterings", clustering_section(content, images)),
        ("training", "Training", curve_section(content)),
        ("label-free", "Without labels", label_free_section(content)),
        ("bad-images", "Bad images", bad_section(content)),
        ("run", "The run", run_section(content)),
    ]
    if not content.rows:  # then figures without labels come first
        sections.insert(2, sections.pop(next(i for i, (anchor, _, _) in enumerate(sections) if anchor == "label-free")))
    notes = "".join(f"<li>{text(note, 1000)}</li>" for note in content.notes)
    aside = f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else ""
    return document(content.title, sections, before=aside, after=images.definitions())


def document(
    name: str, sections: Sequence[tuple[str, str, str]], *, before: str = "", after: str = "", about: str = ABOUT
) -> str:
    """A page with a title, of sections that are given as anchor, heading and markup; those without markup are left out.

    Args:
        before: markup ahead of the sections; `after` behind them.
        about: the line below the title.
    """
    present = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in present)
    body = "".join(f'<section id="{at}"><h2>{heading}</h2>{markup}</section>' for at, heading, markup in present)
    title = text(name, 200)
    return (
        f"{page_head(title, style=STYLE)}<header>{MARK}<div><h1>{title}</h1>"
        f"<p>{text(about, 500)}</p></div></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{before}{body}{after}</main></body></html>\n'
    )


def _compared(content: ReportContent) -> str:
    """The model that is compared with the backbone."""
    return content.verdict.compared if content.verdict else "the model"


def _verdict(content: ReportContent) -> str:
    if content.rows and content.verdict is None:
        return ""
    return verdict_section(content.verdict, has_test=content.has_test)


def headline_section(content: ReportContent) -> str:
    if not content.rows:
        lacks = content.labels or "The test images carry no labels"
        if not content.has_test:
            lacks = "There is no test set (data.test), so the models were looked at on training images"
        why = "The label-free figures and the galleries need no labels."
        return absent(f"There are no retrieval scores. {lacks}. {why}")
    scores = Scores.of(content.rows)
    interval = (
        "<b>Below:</b> its 95% bootstrap interval over queries. All models have the same queries, so a gain may be "
        "sure though intervals overlap: the verdict tells. "
        if content.intervals
        else ""
    )
    key = (
        f'<p class="note"><b>Large:</b> R-Precision in percent. {interval}<b>Small:</b> MAP@R. <b>Signed:</b> '
        "points of R-Precision above (+) or below (−) the backbone, drawn to one scale. ★ is the best of its column "
        "at the precision shown; the oracle and rows trained with labels do not compete.</p>"
    )
    recall = f'<details class="fold"><summary>Recall@1</summary>{recall_table(scores)}</details>'
    reading = f"<h3>In sentences</h3>{sentences(read_scores(scores))}"
    return (
        _tiles(scores)
        + score_table(scores, content.intervals)
        + key
        + recall
        + reading
        + _profiles(scores)
        + _glossary()
    )


def _tiles(scores: Scores) -> str:
    """Up to four figures that sum the run up."""
    lead = scores.leader("fusion") or scores.leader("set")
    tiles = []
    if lead is not None:
        over = scores.gain(lead, None)
        sub = f"{lead}, {describe_gain(over)}" if math.isfinite(over) else lead
        mean = "mean R-Precision, percent" if len(scores.tasks) > 1 else "R-Precision, percent"
        tiles.append((mean, percent(scores.value(lead, None)), sub))
        gains = [scores.gain(lead, task) for task in scores.tasks]
        measured = [g for g in gains if math.isfinite(g)]
        if measured:
            won = sum(round(100 * g, 1) > 0 for g in measured)
            tiles.append(("tasks above the backbone", f"{won} of {len(measured)}", f"with {lead}"))
        difference = scores.gain(lead, None, over=ORACLE)
        if math.isfinite(difference) and kind(lead) == "fusion":
            tiles.append(("against the oracle", points(difference), "points; the oracle uses labels"))
    queries = sum(max((scores.queries(m, t) for m in scores.models), default=0) for t in scores.tasks)
    tiles.append(("test queries", f"{queries:,}", f"in {pluralize(len(scores.tasks), 'task')}, leave one out"))
    cells = "".join(
        f"<div><span>{text(a, 60)}</span><b>{text(b, 30)}</b><span>{text(c)}</span></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _profiles(scores: Scores) -> str:
    """R-Precision against K for each task, with backbone, average and best learned fusion as levels."""
    sets = [m for m in scores.models if kind(m) == "set"]
    if len(sets) < 2:
        return ""
    learned = [m for m in scores.models if is_learned(m) and math.isfinite(scores.value(m, None))]
    top = max(learned, key=lambda m: scores.value(m, None), default=None)
    levels = [(m, c) for m, c in ((BACKBONE, 7), (AVERAGE, 1), (top, 2)) if m is not None and m in scores.models]
    charts = []
    for task in scores.tasks[:MOST_PROFILES]:
        lines = [Series("one set", range(len(sets)), [100 * scores.value(m, task) for m in sets], 0)]
        edge = (-0.3, len(sets) - 0.7)
        lines += [
            Series(m, edge, [100 * scores.value(m, task)] * 2, colour, dashed=colour == 7) for m, colour in levels
        ]
        axes = Axes(title=task, x_label="K", y_label="R-Precision, %", x_names=[m.removeprefix("k=") for m in sets])
        charts.append(line_chart(lines, axes))
    lead = (
        '<h3>Which granularity suits which task</h3><p class="lead">One adaptor set at a time, from coarse to fine. '
        "A task that peaks on the right needs fine clusters; levels are the models without a choice of K.</p>"
    )
    return lead + grid(charts)


def _glossary() -> str:
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS)
    return f'<details class="fold"><summary>What the words mean</summary><dl class="facts">{words}</dl></details>'


def gallery_section(content: ReportContent, images: Images) -> str:
    if not content.galleries:
        return ""
    labelled = any(hit.correct is not None for g in content.galleries for hits in g.results.values() for hit in hits)
    marks = (
        "✓ is an image of the query's class, ✗ one of another class."
        if labelled
        else "The images have no labels, so nothing is marked as right or wrong."
    )
    lead = f"Each model's nearest images, best first, with their cosine similarity to the query. {marks}"
    return f'<p class="lead">{lead}</p>' + galleries(content.galleries, images)


def clustering_section(content: ReportContent, images: Images) -> str:
    partitions = nesting_table(content) + contact_sheets(content, images)
    if not content.clusterings:
        return partitions
    items = sorted(content.clusterings, key=lambda c: c.k)
    lead = (
        '<p class="lead">k-means groups the frozen backbone\'s features into K clusters; the cluster of an image is '
        "its pseudo-label. A small K is a coarse view of the images, a large one separates near-duplicates.</p>"
    )
    charts = grid([_inertia(items), _size_lines(items)])
    return lead + charts + _cluster_table(items) + method_table(items) + _size_charts(items) + partitions


def _inertia(items: list[Clustering]) -> str:
    lines = []
    for c in items:
        first = next((v for v in c.inertia if math.isfinite(v) and v > 0), 1.0)
        lines.append(Series(f"k={c.k}", range(1, len(c.inertia) + 1), [100 * v / first for v in c.inertia]))
    note = "Sum of squared distances to the nearest centroid, as a share of the first iteration's."
    return line_chart(lines, Axes(title="Inertia", x_label="iteration", y_label="% of the first", note=note))


def _size_lines(items: list[Clustering]) -> str:
    names = _size_names(max((len(c.sizes) for c in items), default=0))
    lines = [Series(f"k={c.k}", range(len(c.sizes)), [100 * n / max(1, sum(c.sizes)) for n in c.sizes]) for c in items]
    note = "A point counts the clusters with at least this many images and fewer than at the next point."
    axes = Axes(
        title="Cluster sizes",
        x_label="images in a cluster, at least",
        y_label="% of clusters",
        x_names=names,
        note=note,
    )
    return line_chart(lines, axes)


def _size_names(buckets: int) -> list[str]:
    """The smallest size of each bucket of `size_histogram`."""
    sizes = [0, *(2**b for b in range(buckets - 1))] if buckets else []
    return [f"{n}" if n < 1024 else f"{n // 1024}k" if n < 2**20 else f"{n // 2**20}M" for n in sizes]


def _cluster_table(items: list[Clustering]) -> str:
    head = [
        "K",
        "iterations",
        "median size",
        "largest size",
        "imbalance",
        "singletons",
        "empty, repaired",
        "empty, left",
        "exact",
        "searched",
    ]
    body = [
        [
            f"k={c.k}",
            str(len(c.inertia) if c.updates is None else c.updates + 1),
            number(c.median),
            f"{c.largest:,}",
            number(round(c.imbalance, 2)),
            f"{percent(c.singletons_share)} %",
            f"{c.empty_repaired:,}",
            f"{c.empty_left:,}",
            f"{percent(c.exact_share, 2)} %",
            f"{percent(c.searched_share)} %",
        ]
        for c in items
    ]
    note = (
        '<p class="note">Sizes are in images. Imbalance is 1 when all clusters are of one size. '
        "Singletons are clusters of one image. Empty clusters get a new centroid while iterating; those left at the "
        "end train nothing. Exact: rows with centroids too close for floating point, settled by exact arithmetic. "
        "Searched: distances that were computed, of all between rows and centroids; bounds excluded the others.</p>"
    )
    return table(head, body) + note


def _size_charts(items: list[Clustering]) -> str:
    charts = []
    for c in items[:MOST_CLUSTERINGS]:
        axes = Axes(title=f"k={c.k}", x_label="images in a cluster, at least", y_label="clusters")
        charts.append(bar_chart([float(n) for n in c.sizes], _size_names(len(c.sizes)), axes))
    return f'<details class="fold"><summary>Cluster sizes, one by one</summary>{grid(charts)}</details>'


def curve_section(content: ReportContent) -> str:
    """Curves by kind of job, as losses of classes and losses of pairs are not comparable."""
    curves = {job: curve for job, curve in content.curves.items() if curve}
    if not curves:
        return ""
    kinds: dict[str, dict[str, list[dict[str, float]]]] = {}
    for job, curve in curves.items():
        name = "With labels, to compare with" if job in SAW_LABELS else "Fusion and other jobs"
        kinds.setdefault("Adaptor sets" if "k=" in job else name, {})[job] = curve
    return "".join(_kind_of_job(name, jobs) for name, jobs in kinds.items() if jobs)


def _kind_of_job(name: str, jobs: dict[str, list[dict[str, float]]]) -> str:
    keys = list(dict.fromkeys(key for curve in jobs.values() for point in curve for key in point if key not in _TIMES))
    charts = [_curve(key, jobs) for key in sorted(keys, key=lambda k: (k not in _NAMES, k != "loss"))[:MOST_METRICS]]
    return f"<h3>{text(name)}</h3>{grid(charts)}"


def _curve(key: str, jobs: dict[str, list[dict[str, float]]]) -> str:
    lines, broken = [], 0
    for place, (job, curve) in enumerate(jobs.items()):
        pairs = [(p.get("step", float(i)), p[key]) for i, p in enumerate(curve) if key in p]
        if pairs:
            broken += sum(not math.isfinite(y) for _, y in pairs)
            lines.append(Series(job, [x for x, _ in pairs], [y for _, y in pairs], place, place >= COLOURS))
    values = [y for s in lines for y in s.y if math.isfinite(y)]
    log = key not in ("accuracy", "lr") and bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    note = f"{pluralize(broken, 'value')} not finite, not drawn." if broken else ""
    shown = _NAMES.get(key, key.replace("_", " "))
    return line_chart(lines, Axes(title=shown + (" (log)" if log else ""), x_label="step", log_y=log, note=note))


def label_free_section(content: ReportContent) -> str:
    if not content.label_free:
        return ""
    lead = (
        '<p class="lead">Figures that need no label, in percent. They are not accuracies, and do not tell which model '
        "is better: over 100 models, how often a view finds its source had a rank correlation of −0.2 with "
        "R-Precision.</p>"
    )
    of_models = [item for item in content.label_free if not item.get("of_graph")]
    of_graphs = [item for item in content.label_free if item.get("of_graph")]
    return lead + _figures(of_models) + _graphs(of_graphs)


def _figures(items: list[LabelFree]) -> str:
    """Models down, figures across."""
    figures, models, cells = _cells(items)
    body = [[text(model, 40), *(_share(cells.get((model, figure))) for figure in figures)] for model in models]
    return table(["model", *(text(figure, 80) for figure in figures)], body) if items else ""


def _graphs(items: list[LabelFree]) -> str:
    """Figures down, the fusions that learned from a graph across."""
    figures, models, cells = _cells(items)
    body = [[text(figure, 80), *(_share(cells.get((model, figure))) for model in models)] for figure in figures]
    lead = (
        '<h3>The neighbours that fusions learned from</h3><p class="lead">Of the training images and their nearest '
        "neighbours in the last graph; other models learn from no neighbours. A neighbour that shares the "
        "k=K pseudo-label lies in the same of K clusters; fewer do the finer the clusters are.</p>"
    )
    return lead + table(["figure", *(text(model, 40) for model in models)], body) if items else ""


def _cells(items: list[LabelFree]) -> tuple[list[str], list[str], dict[tuple[str, str], LabelFree]]:
    """Figures and models in order, and the items by model and figure."""
    figures, models = list(dict.fromkeys(i["figure"] for i in items)), ordered(i["model"] for i in items)
    return figures, models, {(item["model"], item["figure"]): item for item in items}


def _share(item: LabelFree | None) -> str:
    if item is None or not math.isfinite(item["value"]):
        return percent(math.nan)
    wide = min(1.0, max(0.0, item["value"]))
    tip = f"of {pluralize(item['queries'], 'query', 'queries')}"
    meter = f'<span class="meter"><i style="width:{wide:.1%}"></i></span>'
    return f'<span title="{tip}">{percent(item["value"])}</span>{meter}'


def kind_of(reason: str) -> str:
    """A reason without the place of the image."""
    return reason.partition(" (byte ")[0][:200]


def bad_section(content: ReportContent) -> str:
    if not content.bad_rows:
        return ""
    counts = Counter[str]()
    for row in content.bad_rows:
        counts[kind_of(row["reason"])] += row.get("images", 1)
    first = f" The first {MOST_BAD_ROWS} are listed." if len(content.bad_rows) > MOST_BAD_ROWS else ""
    lead = (
        f'<p class="lead">{pluralize(counts.total(), "image")} could not be read and took no part in '
        f"clustering, training or evaluation.{first}</p>"
    )
    why = table(["reason", "images"], [[text(reason, 200), f"{count:,}"] for reason, count in counts.most_common(10)])
    listed = content.bad_rows[:MOST_BAD_ROWS]
    columns: list[Literal["file", "key", "shard", "reason"]] = ["key", "shard", "reason"]
    if any(row.get("file") for row in listed):
        columns.insert(0, "file")
    body = [[text(row.get(column, "")) for column in columns] for row in listed]
    listing = table(columns, body, numeric=False)
    return f'{lead}{why}<details class="fold"><summary>The images</summary>{listing}</details>'


def run_section(content: ReportContent) -> str:
    facts = "".join(f"<dt>{text(name, 80)}</dt><dd>{text(value, 4000)}</dd>" for name, value in content.facts.items())
    listing = f'<dl class="facts">{facts}</dl>' if facts else absent("The run recorded no facts.")
    config = f"<pre>{text(content.config_yaml, MOST_CONFIG)}</pre>" if content.config_yaml else ""
    return listing + (f'<details class="fold"><summary>Configuration</summary>{config}</details>' if config else "")
