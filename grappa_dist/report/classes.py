"""The section on classes: on which of them a model gains and loses, however many there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from grappa_dist.console import pluralize
from grappa_dist.report.html import percent, points, table, text
from grappa_dist.report.plots import Axes, bar_chart, grid
from grappa_dist.report.queries import ClassGain
from grappa_dist.report.scores import gain_bar

MOST_LISTED = 20  # classes of one table; of more, the first and the last half of it
MOST_TASKS = 100  # rows
SAME = 0.0005  # of gains that tables show as none
BOUNDS = (-0.1, -0.03, -SAME, SAME, 0.03, 0.1)  # of the bars
_BARS = ("< −10", "−10", "−3", "0", "+3", "+10", "> 10")
_NOTE = (
    "Classes by their gain in points: below −10, −10 to −3, −3 to 0, none, 0 to 3, 3 to 10, above 10. Of a class with "
    "few queries much of the gain is chance, most of all at both ends."
)


def classes_section(gains: Sequence[ClassGain], names: Sequence[str], model: str) -> str:
    """Counts, a distribution and the classes at both ends; "" without classes.

    Args:
        names: of classes, by label.
        model: that is compared with the backbone.
    """
    if not gains:
        return ""
    several = len({g.task for g in gains}) > 1
    better, worse, same = count_outcomes(gains)
    lead = (
        f'<p class="lead">R-Precision of {text(model, 40)} against the backbone, as a mean over the queries of each '
        f"class, all queries counted: of {pluralize(len(gains), 'class', 'classes')}, {better:,} better, {worse:,} "
        f"worse, {same:,} the same.</p>"
    )
    axes = Axes(title="Classes by gain", x_label="gain, points", y_label="classes", note=_NOTE)
    drawn = grid([bar_chart(histogram(gains), _BARS, axes)])
    of_tasks = _task_table(gains) if several else ""
    ordered = sorted(gains, key=lambda g: (-round(g.gain, 9), g.task, g.label))
    if len(gains) <= MOST_LISTED:
        return lead + drawn + of_tasks + _listing("Every class", ordered, (names, model), several=several)
    half = MOST_LISTED // 2
    best = sorted(gains, key=lambda g: (-round(g.value, 9), g.task, g.label))
    parts = {
        "Gained most": ordered[:half],
        "Lost most": ordered[: -half - 1 : -1],
        f"Best with {model}": best[:half],
        f"Worst with {model}": best[: -half - 1 : -1],
    }
    made = [_listing(title, rows, (names, model), several=several) for title, rows in parts.items()]
    folded = f'<details class="fold"><summary>Best and worst classes</summary>{"".join(made[2:])}</details>'
    return lead + drawn + of_tasks + "".join(made[:2]) + folded


def count_outcomes(gains: Sequence[ClassGain]) -> tuple[int, int, int]:
    """How many classes are better, worse, the same."""
    better, worse = sum(g.gain >= SAME for g in gains), sum(g.gain <= -SAME for g in gains)
    return better, worse, len(gains) - better - worse


def histogram(gains: Sequence[ClassGain]) -> list[float]:
    """How many classes there are between BOUNDS, and beyond the first and the last."""
    counts = [0.0] * (len(BOUNDS) + 1)
    for g in gains:
        within = [bound < g.gain if bound > 0 else bound <= g.gain for bound in BOUNDS]
        counts[sum(within)] += math.isfinite(g.gain)
    return counts


def _task_table(gains: Sequence[ClassGain]) -> str:
    by_task: dict[str, list[ClassGain]] = {}
    for g in gains:
        by_task.setdefault(g.task, []).append(g)
    body = [
        [text(task, 60), f"{len(of):,}", *(f"{n:,}" for n in count_outcomes(of)), points(_median(of))]
        for task, of in list(by_task.items())[:MOST_TASKS]
    ]
    hidden = len(by_task) - len(body)
    more = f'<p class="note">{pluralize(hidden, "more task")} not shown.</p>' if hidden else ""
    return table(["task", "classes", "better", "worse", "the same", "median gain"], body) + more


def _median(gains: Sequence[ClassGain]) -> float:
    return statistics.median(g.gain for g in gains)


def _listing(title: str, rows: Sequence[ClassGain], shown: tuple[Sequence[str], str], *, several: bool) -> str:
    """A titled table of classes; the names of tasks where there are several."""
    (names, model), low, high = shown, min(0.0, *(g.gain for g in rows)), max(0.0, *(g.gain for g in rows))
    cells: dict[str, Callable[[ClassGain], str]] = {
        "class": lambda g: text(names[g.label] if g.label < len(names) else g.label, 60),
        "gain, points": lambda g: gain_bar(g.gain, low, high),  # seen first on a narrow screen
        "backbone": lambda g: percent(g.baseline),
        text(model, 40): lambda g: percent(g.value),
        "queries": lambda g: f"{g.queries:,}",
        "task": lambda g: text(g.task, 60),
    }
    if not several:
        del cells["task"]
    body = [[cell(g) for cell in cells.values()] for g in rows]
    return f"<h3>{text(title, 80)}</h3>" + table(cells, body)
