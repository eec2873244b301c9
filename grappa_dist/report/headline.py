"""The headline of the page: tiles, the score table, what it says, and which granularity suits which task."""

from __future__ import annotations

import math

from grappa_dist.console import counted
from grappa_dist.report.content import ReportContent
from grappa_dist.report.markup import absent, percent, points, sentences, text
from grappa_dist.report.plots import Axes, Series, grid, line_chart
from grappa_dist.report.scores import AVERAGE, BACKBONE, ORACLE, Scores, kind
from grappa_dist.report.sentences import read_scores
from grappa_dist.report.tables import recall_table, score_table

MOST_PROFILES = 24
_WORDS = (
    (
        "R-Precision",
        "the share of the query's class among its R nearest images, R being how many of them there are to find.",
    ),
    ("MAP@R", "like R-Precision, but it also rewards having the right images first. Never above R-Precision."),
    ("recall@1", "how often the nearest image is of the query's class."),
    ("backbone", "the pretrained model as it came, frozen."),
    (
        "k=K",
        "the backbone with one adaptor set, trained to tell K clusters of unlabelled images apart. Larger K is finer.",
    ),
    (
        "oracle",
        "the best of the k=K rows for each task, chosen with its labels: what picking one set could reach at most.",
    ),
    ("average", "all adaptor sets in one model, each with the same weight. Nothing is learned."),
    (
        "gallery",
        "all sets, weighed alike for all images of a task, by how often neighbours of neighbours are neighbours "
        "there. Nothing is learned and no label is read, but it sees the test images that are searched, and which task "
        "each belongs to; no other row but the oracle does.",
    ),
    ("transforms", "all sets, weighed for each image by attention that was trained on two views of one image."),
    (
        "neighbours",
        "all sets, weighed by attention that was trained on pairs of an image and one of its nearest neighbours.",
    ),
    (
        "random-one, random-all",
        "to compare with: one adaptor set, or as many as there are partitions with their attention, that began at "
        "random and learned from pairs of neighbours alone, without clusters. M+A_1 and M* of the paper.",
    ),
    (
        "supervised-set, supervised",
        "to compare with: one set trained on the labels of the training images in place of clusters, and attention "
        "over the k=K sets trained with these labels. No other row was trained with a label.",
    ),
)


def headline_section(content: ReportContent) -> str:
    if not content.rows:
        lacks = "The test images carry no labels"
        if not content.has_test:
            lacks = "There is no test set (data.test), so the models were looked at on training images"
        why = "The label-free figures and the galleries say what can be said without labels."
        return absent(f"{lacks}, and there are no retrieval scores. {why}")
    scores = Scores.of(content.rows)
    key = (
        '<p class="note"><b>Large:</b> R-Precision in percent. <b>Small:</b> MAP@R. <b>Signed:</b> points of '
        "R-Precision over the backbone, drawn to one scale. ★ is the best of its column at the precision shown; "
        "the oracle and rows trained with labels do not compete.</p>"
    )
    recall = f'<details class="fold"><summary>Recall@1</summary>{recall_table(scores)}</details>'
    reading = f"<h3>What it says</h3>{sentences(read_scores(scores))}"
    return _tiles(scores) + score_table(scores) + key + recall + reading + _profiles(scores) + _glossary()


def _tiles(scores: Scores) -> str:
    """Up to four figures that sum the run up."""
    lead = scores.leader("fusion") or scores.leader("set")
    tiles = []
    if lead is not None:
        over = scores.gain(lead, None)
        sub = f"{lead}, {points(over)} over the backbone" if math.isfinite(over) else lead
        mean = "mean R-Precision" if len(scores.tasks) > 1 else "R-Precision"
        tiles.append((mean, percent(scores.value(lead, None)), sub))
        gains = [scores.gain(lead, task) for task in scores.tasks]
        measured = [g for g in gains if math.isfinite(g)]
        if measured:
            won = sum(round(100 * g, 1) > 0 for g in measured)
            tiles.append(("tasks above the backbone", f"{won} of {len(measured)}", f"with {lead}"))
        gap = scores.gain(lead, None, over=ORACLE)
        if math.isfinite(gap) and kind(lead) == "fusion":
            tiles.append(("against the oracle", points(gap), "points; the oracle uses labels"))
    queries = sum(max((scores.queries(m, t) for m in scores.models), default=0) for t in scores.tasks)
    tiles.append(("test queries", f"{queries:,}", f"in {counted(len(scores.tasks), 'task')}, leave one out"))
    cells = "".join(
        f"<div><span>{text(a, 60)}</span><b>{text(b, 30)}</b><span>{text(c)}</span></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _profiles(scores: Scores) -> str:
    """R-Precision against K for each task, with backbone, average and best learned fusion as levels."""
    sets = [m for m in scores.models if kind(m) == "set"]
    if len(sets) < 2:
        return ""
    learned = [
        m for m in scores.models if kind(m) == "fusion" and m != AVERAGE and math.isfinite(scores.value(m, None))
    ]
    top = max(learned, key=lambda m: scores.value(m, None), default=None)
    levels = [(m, c) for m, c in ((BACKBONE, 7), (AVERAGE, 1), (top, 2)) if m is not None and m in scores.models]
    charts = []
    for task in scores.tasks[:MOST_PROFILES]:
        lines = [Series("one set", range(len(sets)), [100 * scores.value(m, task) for m in sets], 0)]
        edge = (-0.3, len(sets) - 0.7)
        lines += [
            Series(m, edge, [100 * scores.value(m, task)] * 2, colour, dashed=colour == 7) for m, colour in levels
        ]
        axes = Axes(title=task, x_label="K", y_label="R-Precision", x_names=[m.removeprefix("k=") for m in sets])
        charts.append(line_chart(lines, axes))
    lead = (
        '<h3>Which granularity suits which task</h3><p class="lead">One adaptor set at a time, from coarse to fine. '
        "A task that peaks on the right wants fine clusters; levels are the models that need no choice of K.</p>"
    )
    return lead + grid(charts)


def _glossary() -> str:
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS)
    return f'<details class="fold"><summary>What the words mean</summary><dl class="facts">{words}</dl></details>'
