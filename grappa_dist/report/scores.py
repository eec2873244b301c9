"""The score rows as a grid of models by tasks with gains over the backbone, as plain text and as HTML.

A task of None stands for the mean over all tasks. What was not measured is NaN.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grappa_dist.console import pluralize
from grappa_dist.report.content import ScoreRow
from grappa_dist.report.html import MISSING, percent, points, text
from grappa_dist.report.queries import ORACLE, Intervals
from grappa_dist.variants import BACKBONE, SUPERVISED, SUPERVISED_SET, VARIANTS, Variant, split_strength

Metric = Literal["r_precision", "map_at_r", "recall_at_1"]
AVERAGE = "average"
SAW_LABELS = (SUPERVISED_SET, SUPERVISED)
_FAMILIES = (BACKBONE, "set", ORACLE, "fusion", "random", "supervised", "other")
WIDTH = 120  # characters of a terminal
COLUMNS = 7  # six tasks and their mean side by side; more tasks go below
MOST_COLUMNS = 140  # of a page: 139 tasks and their mean
NAME, LONGEST_NAME = 16, 22  # characters of the column of models, at least and at most
MEAN = "mean"
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories that a terminal may act on or not show


def kind(model: str) -> str:
    """The family of a model: "backbone", "set", "oracle", "fusion", "random", "supervised" or "other"."""
    if model in (BACKBONE, ORACLE):
        return model
    if model.startswith("k=") and model[2:].isdecimal():
        return "set"
    if model in SAW_LABELS:
        return "supervised"
    variant, strength = split_strength(model)
    if variant not in VARIANTS or not (strength == 1 or VARIANTS[variant].has_strengths):
        return "other"
    return "fusion" if Variant.parse(variant).start == "adapted" else "random"


def is_learned(model: str) -> bool:
    """Whether it is a fusion other than the average, at any strength of adaptation."""
    return kind(model) == "fusion" and split_strength(model)[0] != AVERAGE


def ordered(models: Iterable[str]) -> list[str]:
    """Models as a table lists them: backbone, sets from coarse to fine, oracle, fusions, rows to compare with; each
    fusion from the least strength of adaptation to the greatest."""

    def rank(model: str) -> tuple[int, int, float, str]:
        family, within, strength = kind(model), 0, 1.0
        if family == "set":
            within = int(model[2:])
        elif family == "supervised":
            within = SAW_LABELS.index(model)
        elif family in ("fusion", "random"):
            variant, strength = split_strength(model)
            within = list(VARIANTS).index(variant)
        return _FAMILIES.index(family), within, strength, model

    return sorted(set(models), key=rank)


@dataclass(frozen=True)
class Scores:
    """Look-ups in the score rows; of two rows of one model and task the last counts."""

    cells: dict[tuple[str, str], ScoreRow]
    models: list[str]
    tasks: list[str]

    @classmethod
    def of(cls, rows: list[ScoreRow]) -> Scores:
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        return cls({(row["model"], row["task"]): row for row in rows}, ordered(row["model"] for row in rows), tasks)

    @property
    def columns(self) -> list[str | None]:
        """The tasks, and their mean where there are several."""
        return [*self.tasks, None] if len(self.tasks) > 1 else [*self.tasks]

    def queries(self, model: str, task: str) -> int:
        cell = self.cells.get((model, task))
        return cell["queries"] if cell else 0

    def value(self, model: str, task: str | None, metric: Metric = "r_precision") -> float:
        """The score, or NaN if the model has no queries there. The mean is over the tasks that any model has."""
        if task is None:
            scored = [t for t in self.tasks if any(self.queries(m, t) for m in self.models)]
            values = [self.value(model, t, metric) for t in scored]
            return sum(values) / len(values) if values else math.nan
        cell = self.cells.get((model, task))
        return float(cell[metric]) if cell and cell["queries"] > 0 else math.nan

    def gain(self, model: str, task: str | None, over: str = BACKBONE) -> float:
        """R-Precision above another model's: the difference of what tables print of them, so that figures agree."""
        return (round(100 * self.value(model, task), 1) - round(100 * self.value(over, task), 1)) / 100

    def best(self, task: str | None, metric: Metric = "r_precision") -> set[str]:
        """The best models, at the precision a table prints, except the oracle and models trained with labels."""
        unsupervised = [m for m in self.models if m != ORACLE and m not in SAW_LABELS]
        shown = {m: round(100 * self.value(m, task, metric), 1) for m in unsupervised}
        top = max((v for v in shown.values() if math.isfinite(v)), default=math.nan)
        return {m for m, v in shown.items() if v == top}

    def leader(self, family: str) -> str | None:
        """The model of a family with the best mean R-Precision; names break ties by table order."""
        scored = [m for m in self.models if kind(m) == family and math.isfinite(self.value(m, None))]
        return max(scored, key=lambda m: self.value(m, None), default=None)


def console_table(rows: list[ScoreRow]) -> str:
    """The scores as aligned text: R-Precision / MAP@R, the gain over the backbone, recall@1; `*` marks the best."""
    scores = Scores.of(rows)

    def pair(model: str, task: str | None) -> str:
        rp = scores.value(model, task)
        star = "*" if model in scores.best(task) else ""
        map_at_r = percent(scores.value(model, task, "map_at_r"))
        return f"{percent(rp)}{star}/{map_at_r}" if math.isfinite(rp) else MISSING

    def gain(model: str, task: str | None) -> str:
        return MISSING if model == BACKBONE else points(scores.gain(model, task)).replace("−", "-").replace("±", " ")

    def recall(model: str, task: str | None) -> str:
        mark = "*" if model in scores.best(task, "recall_at_1") else " "
        return percent(scores.value(model, task, "recall_at_1")) + mark

    blocks = [titled_grid("R-Precision / MAP@R, percent (* best R-Precision of its column)", scores, pair)]
    if BACKBONE in scores.models:
        blocks.append(titled_grid("R-Precision above the backbone (-: below it), points", scores, gain))
    blocks.append(titled_grid("recall@1, percent (* best of its column)", scores, recall))
    labelled = [m for m in SAW_LABELS if m in scores.models]
    if labelled:
        blocks.append(f"Trained with labels, out of competition: {', '.join(labelled)}. No other row was.")
    return "\n\n".join(blocks)


def titled_grid(title: str, scores: Scores, cell: Callable[[str, str | None], str]) -> str:
    """One titled grid, in slices of columns that fit a terminal."""
    columns = scores.columns
    slices = [columns[at : at + COLUMNS] for at in range(0, len(columns), COLUMNS)]
    lines, name = [title], min(max([NAME, *map(_width, scores.models)]), LONGEST_NAME)
    for piece in slices:
        most = min((WIDTH - name) // len(piece) - 2, 22)
        names = [MEAN if task is None else task for task in piece]
        widths = [max(12, min(_width(name), most)) for name in names]
        head = [_padded(name, width, right=True) for name, width in zip(names, widths, strict=True)]
        lines.append("  ".join([_padded("model", name), *head]).rstrip())
        previous = ""
        for model in scores.models:
            if previous and kind(model) != previous:
                lines.append("")
            previous = kind(model)
            values = [_padded(cell(model, task), width, right=True) for task, width in zip(piece, widths, strict=True)]
            lines.append("  ".join([_padded(model, name), *values]).rstrip())
    return "\n".join(lines)


def _width(name: str) -> int:
    """Terminal columns of a name: wide letters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name)


def _padded(name: str, width: int, *, right: bool = False) -> str:
    """A name padded or cut to `width` terminal columns; control characters cannot reach the terminal."""
    shown = "".join("?" if unicodedata.category(c) in _UNSEEN else c for c in name)
    if _width(shown) > width:
        while _width(shown) > width - 1:
            shown = shown[:-1]
        shown += "…"
    padding = " " * (width - _width(shown))
    return padding + shown if right else shown + padding


def score_table(scores: Scores, intervals: Intervals | None = None) -> str:
    """The headline as HTML: R-Precision and MAP@R, the gain over the backbone as number and bar, the best marked.

    Args:
        intervals: of R-Precision, shown below it where they are known.
    """
    gains = [scores.gain(m, t) for m in scores.models if m != BACKBONE for t in scores.columns]
    finite = [g for g in gains if math.isfinite(g)]
    least, most = min([0.0, *finite]), max([0.0, *finite])

    def cell(model: str, task: str | None) -> str:
        rp, map_at_r = scores.value(model, task), scores.value(model, task, "map_at_r")
        if not math.isfinite(rp):
            return f'<td class="none">{MISSING}</td>'
        top = model in scores.best(task)
        mark = '<b class="star" title="best of this column">★</b>' if top else ""
        body = f'<span class="rp">{mark}{percent(rp)}</span><span class="map">{percent(map_at_r)}</span>'
        where = (
            "mean over tasks"
            if task is None
            else f"{task}, {pluralize(scores.queries(model, task), 'query', 'queries')}"
        )
        tip = f"{model} on {where}: R-Precision {percent(rp, 2)}, MAP@R {percent(map_at_r, 2)}"
        interval = ""
        low, high = (intervals or {}).get((model, task), (math.nan, math.nan))
        if math.isfinite(low + high):
            interval = f'<span class="range">{percent(low)}–{percent(high)}</span>'
            tip += f", 95% interval {percent(low, 2)} to {percent(high, 2)}"
        gain = math.nan if model == BACKBONE else scores.gain(model, task)
        return (
            f'<td{" class=best" if top else ""} title="{text(tip)}">{body}{gain_bar(gain, least, most, interval)}</td>'
        )

    return _score_grid(scores, cell, "score")


def gain_bar(gain: float, low: float, high: float, between: str = "") -> str:
    """A signed number over a bar from the common zero, which `low` and `high` span; markup may stand between them."""
    if not math.isfinite(gain):
        return f'<span class="delta"></span>{between}<span class="bar"></span>'
    span = (high - low) or 1.0
    left, width = (min(gain, 0.0) - low) / span, abs(gain) / span
    way = "up" if gain > 0 else "down"
    zero = f'<u style="left:{-low / span:.1%}"></u>'
    bar = f'<i class="{way}" style="left:{left:.1%};width:{width:.1%}"></i>'
    shade = way if points(gain)[0] != "±" else ""
    return f'<span class="delta {shade}">{points(gain)}</span>{between}<span class="bar">{bar}{zero}</span>'


def recall_table(scores: Scores) -> str:
    """Recall@1 in percent, the best marked, as HTML."""
    metric: Metric = "recall_at_1"

    def cell(model: str, task: str | None) -> str:
        top = model in scores.best(task, metric)
        mark = '<b class="star">★</b>' if top else ""
        shown = percent(scores.value(model, task, metric))
        return f'<td{" class=best" if top else ""}><span class="rp">{mark}{shown}</span></td>'

    return _score_grid(scores, cell, "score slim")


def _score_grid(scores: Scores, cell: Callable[[str, str | None], str], classes: str) -> str:
    """Models down, tasks across, a line between families of models; of many tasks, one grid below the other."""
    columns = scores.columns
    if len(columns) > COLUMNS:  # the mean leads
        columns = [None, *columns[:-1]][:MOST_COLUMNS]
    slices = [columns[at : at + COLUMNS] for at in range(0, len(columns), COLUMNS)]
    grids = [_score_slice(scores, part, cell, classes) for part in slices]
    hidden = len(scores.columns) - len(columns)
    more = f'<p class="note">{pluralize(hidden, "more task")}: metrics.json has all.</p>' if hidden else ""
    if len(grids) < 3:
        return "".join(grids) + more
    rest = f"<summary>The other {sum(map(len, slices[1:]))} tasks</summary>{''.join(grids[1:])}{more}"
    return f'{grids[0]}<details class="fold">{rest}</details>'


def _score_slice(
    scores: Scores, columns: Sequence[str | None], cell: Callable[[str, str | None], str], classes: str
) -> str:
    head = "".join(f'<th scope="col">{_column_head(scores, task)}</th>' for task in columns)
    body, previous = [], ""
    for model in scores.models:
        family = kind(model)
        opens = ' class="opens"' if previous and family != previous else ""
        previous = family
        cells = "".join(cell(model, task) for task in columns)
        body.append(f'<tr{opens}><th scope="row">{text(model, 40)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="{classes}"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _column_head(scores: Scores, task: str | None) -> str:
    if task is None:
        return "mean<small>over tasks</small>"
    most = max((scores.queries(model, task) for model in scores.models), default=0)
    return f"{text(task, 60)}<small>{pluralize(most, 'query', 'queries')}</small>"
