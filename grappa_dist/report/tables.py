"""The score table, as plain text for a terminal and as HTML."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

from grappa_dist.report.content import ScoreRow
from grappa_dist.report.markup import MISSING, percent, points, text
from grappa_dist.report.scores import BACKBONE, SAW_LABELS, Metric, Scores, kind

WIDTH = 120  # characters of a terminal
COLUMNS = 7  # six tasks and their mean side by side, more go below
NAME = 16
MEAN = "mean"
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # what a terminal could act on or not show


def console_table(rows: list[ScoreRow], *, has_test: bool = True) -> str:
    """The scores as aligned text: R-Precision / MAP@R, the gain over the backbone, recall@1; `*` marks the best."""
    if not rows and not has_test:
        return "No test set, so no retrieval scores: see the report's label-free figures, of training images."
    if not rows:
        return "No labels in the test set, so no retrieval scores: see the report's label-free figures, of its images."
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

    blocks = [_block("R-Precision / MAP@R, percent (* best R-Precision of its column)", scores, pair)]
    if BACKBONE in scores.models:
        blocks.append(_block("R-Precision gained over the backbone, points", scores, gain))
    blocks.append(_block("recall@1, percent (* best of its column)", scores, recall))
    labelled = [m for m in SAW_LABELS if m in scores.models]
    if labelled:
        blocks.append(f"Trained with labels, out of competition: {', '.join(labelled)}. No other row was.")
    return "\n\n".join(blocks)


def _block(title: str, scores: Scores, cell: Callable[[str, str | None], str]) -> str:
    """One titled grid, in slices of columns that fit a terminal."""
    columns = scores.columns
    slices = [columns[at : at + COLUMNS] for at in range(0, len(columns), COLUMNS)]
    lines = [title]
    for piece in slices:
        room = min((WIDTH - NAME) // len(piece) - 2, 22)
        names = [MEAN if task is None else task for task in piece]
        widths = [max(12, min(_width(name), room)) for name in names]
        fitted = [_fit(name, width, right=True) for name, width in zip(names, widths, strict=True)]
        lines.append("  ".join([_fit("model", NAME), *fitted]).rstrip())
        previous = ""
        for model in scores.models:
            if previous and kind(model) != previous:
                lines.append("")
            previous = kind(model)
            values = [_fit(cell(model, task), width, right=True) for task, width in zip(piece, widths, strict=True)]
            lines.append("  ".join([_fit(model, NAME), *values]).rstrip())
    return "\n".join(lines)


def _width(name: str) -> int:
    """Terminal columns of a name: wide letters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name)


def _fit(name: str, width: int, *, right: bool = False) -> str:
    """A name padded or cut to `width` terminal columns; control characters cannot reach the terminal."""
    shown = "".join("?" if unicodedata.category(c) in _UNSEEN else c for c in name)
    if _width(shown) > width:
        while _width(shown) > width - 1:
            shown = shown[:-1]
        shown += "…"
    padding = " " * (width - _width(shown))
    return padding + shown if right else shown + padding


def score_table(scores: Scores) -> str:
    """The headline as HTML: R-Precision over MAP@R, the gain over the backbone as number and bar, the best marked."""
    gains = [scores.gain(m, t) for m in scores.models if m != BACKBONE for t in scores.columns]
    finite = [g for g in gains if math.isfinite(g)]
    low, high = min([0.0, *finite]), max([0.0, *finite])

    def cell(model: str, task: str | None) -> str:
        rp, map_at_r = scores.value(model, task), scores.value(model, task, "map_at_r")
        if not math.isfinite(rp):
            return f'<td class="none">{MISSING}</td>'
        top = model in scores.best(task)
        mark = '<b class="star" title="best of this column">★</b>' if top else ""
        body = f'<span class="rp">{mark}{percent(rp)}</span><span class="map">{percent(map_at_r)}</span>'
        where = "mean over tasks" if task is None else f"{task}, {scores.queries(model, task):,} queries"
        tip = f"{model} on {where}: R-Precision {percent(rp, 2)}, MAP@R {percent(map_at_r, 2)}"
        gain = math.nan if model == BACKBONE else scores.gain(model, task)
        return f'<td{" class=best" if top else ""} title="{text(tip)}">{body}{_gain_bar(gain, low, high)}</td>'

    return _score_grid(scores, cell, "score")


def _gain_bar(gain: float, low: float, high: float) -> str:
    """A signed number over a bar from the common zero."""
    if not math.isfinite(gain):
        return '<span class="delta"></span><span class="bar"></span>'
    span = (high - low) or 1.0
    left, width = (min(gain, 0.0) - low) / span, abs(gain) / span
    way = "up" if gain > 0 else "down"
    zero = f'<u style="left:{-low / span:.1%}"></u>'
    bar = f'<i class="{way}" style="left:{left:.1%};width:{width:.1%}"></i>'
    shade = way if points(gain)[0] != "±" else ""
    return f'<span class="delta {shade}">{points(gain)}</span><span class="bar">{bar}{zero}</span>'


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
    """Models down, tasks across; a line parts the families of models."""
    head = "".join(f'<th scope="col">{_column_head(scores, task)}</th>' for task in scores.columns)
    body, previous = [], ""
    for model in scores.models:
        family = kind(model)
        opens = ' class="opens"' if previous and family != previous else ""
        previous = family
        cells = "".join(cell(model, task) for task in scores.columns)
        body.append(f'<tr{opens}><th scope="row">{text(model, 40)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="{classes}"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _column_head(scores: Scores, task: str | None) -> str:
    if task is None:
        return "mean<small>over tasks</small>"
    most = max((scores.queries(model, task) for model in scores.models), default=0)
    return f"{text(task, 60)}<small>{most:,} queries</small>"
