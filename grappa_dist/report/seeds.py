"""Runs of several seeds side by side: the mean of every score and its spread, and the verdict over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from grappa_dist.report.content import ScoreRow
from grappa_dist.report.html import MISSING, points, text
from grappa_dist.report.page import document
from grappa_dist.report.plots import Axes, Interval, forest_plot
from grappa_dist.report.scores import Scores, titled_grid
from grappa_dist.report.sentences import describe_gain
from grappa_dist.report.verdict import (
    MOST_DRAWN,
    RUN,
    TRY_MORE,
    as_console,
    describe_sureness,
    gain_json,
    gain_lines,
    how_to_use,
    interval,
)
from grappa_dist.variants import BACKBONE
from grappa_dist.verdict import SeedsVerdict


def seeds_table(rows: Mapping[int, list[ScoreRow]]) -> str:
    """R-Precision as the mean over seeds and its standard deviation, of all queries, as aligned text."""
    scores = [Scores.of(of_seed) for of_seed in rows.values()]

    def cell(model: str, task: str | None) -> str:
        values = [100 * one.value(model, task) for one in scores]
        if not all(map(math.isfinite, values)):
            return MISSING
        return f"{statistics.fmean(values):.1f} ±{_spread(values):.1f}"

    seeds = ", ".join(map(str, rows))
    return titled_grid(f"R-Precision, percent: mean and standard deviation over the seeds {seeds}", scores[0], cell)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def seeds_lines(verdict: SeedsVerdict, run: str) -> list[str]:
    """The verdict over seeds as text, its conclusion last."""
    pairs = zip(verdict.seeds, verdict.compared, verdict.each, strict=True)
    each = [f"  seed {seed}: {model}, {points(gain)} points" for seed, model, gain in pairs]
    head = f"verdict  {_model(verdict)} of each seed against the backbone, R-Precision in percent, mean over seeds"
    notes = [f"  note: {line}" for line in (*verdict.caveats, _INTERVAL)]
    return as_console([head, *gain_lines(verdict.mean, verdict.tasks), *each, *notes, seeds_conclusion(verdict, run)])


def _model(verdict: SeedsVerdict) -> str:
    return "the best adapted model" if verdict.asked == BACKBONE else "the exported model"


_INTERVAL = "the interval is over queries; the gains of the seeds show what chance in training adds to it"


def seeds_conclusion(verdict: SeedsVerdict, run: str) -> str:
    """One line: whether it helps, by how much, how sure, what next."""
    several = len(verdict.tasks) > 1
    figure = f"mean R-Precision over {len(verdict.tasks)} tasks" if several else "R-Precision"
    low, high = min(verdict.each), max(verdict.each)
    by = (
        f"over {len(verdict.seeds)} seeds {_model(verdict)} is {describe_gain(verdict.mean.shown_gain)} in {figure} "
        f"({describe_sureness(verdict.mean)}; by seed {points(low)} to {points(high)})"
    )
    if all(model == BACKBONE for model in verdict.compared):
        return f"No seed gave a model that is better than the backbone, so each exports the backbone. Next: {TRY_MORE}"
    if verdict.outcome == "better":
        return f"Better than the backbone: {by}. Next: {how_to_use(run)}"
    if verdict.outcome == "worse":
        return f"Worse than the backbone: {by}. Next: the backbone itself (evaluate.export=backbone); {TRY_MORE}"
    return f"Not shown to be better than the backbone: {by}. Next: more labelled test images; else {TRY_MORE}"


def seeds_page(title: str, rows: Mapping[int, list[ScoreRow]], verdict: SeedsVerdict | None) -> str:
    """The page of all seeds, for `<run>/report/report.html`, with links to those of each."""
    links = "".join(f'<li><a href="../seed-{s}/report/report.html">seed {s}</a></li>' for s in rows)
    table = f"<pre>{text(seeds_table(rows), 100_000)}</pre>" if any(rows.values()) else ""
    sections = [("verdict", "The verdict over seeds", _section(verdict)), ("scores", "Retrieval scores", table)]
    return document(title, [*sections, ("runs", "The reports of the seeds", f'<ul class="reading">{links}</ul>')])


def _section(verdict: SeedsVerdict | None) -> str:
    if verdict is None:
        return '<p class="verdict">Not known: there are no labelled test images to compare the models on.</p>'
    found, _, following = seeds_conclusion(verdict, RUN).partition(" Next: ")
    several = [verdict.mean, *verdict.tasks] if len(verdict.tasks) > 1 else list(verdict.tasks)
    drawn = [interval(gain, len(verdict.tasks)) for gain in several[: MOST_DRAWN + 1]]
    for seed, model, gain in zip(verdict.seeds, verdict.compared, verdict.each, strict=True):
        at = 100 * gain
        drawn.append(Interval(f"seed {seed}: {model}", at, at, at, points(gain)))
    axes = Axes(title=f"{_model(verdict)} against the backbone", x_label="points of R-Precision", note=_PLOT_NOTE)
    notes = "".join(f"<li>{text(note[0].upper() + note[1:], 1000)}.</li>" for note in (*verdict.caveats, _INTERVAL))
    more = f'<p class="verdict">Next: {text(following, 1000)}.</p>' if following else ""
    return (
        f'<p class="verdict"><b>{text(found, 1000)}</b></p>{more}'
        f'<div class="charts few">{forest_plot(drawn, axes)}<ul class="reading">{notes}</ul></div>'
    )


_PLOT_NOTE = (
    "Lines are 95% bootstrap intervals over queries of the mean over seeds; a seed's dot is its mean over tasks. "
    "The line at 0 is the backbone."
)


def seeds_json(rows: Mapping[int, list[ScoreRow]], verdict: SeedsVerdict | None) -> dict[str, Any]:
    """What metrics.json of several seeds has: every score by seed, its mean and spread, and the verdict."""
    scores = {seed: Scores.of(of_seed) for seed, of_seed in rows.items()}
    first = next(iter(scores.values()))
    table = []
    for model in first.models:
        for task in first.tasks:
            values = [one.value(model, task) for one in scores.values()]
            if all(map(math.isfinite, values)):
                spread = {"mean": statistics.fmean(values), "standard_deviation": _spread(values)}
                table.append({"model": model, "task": task, "r_precision": {**spread, "by_seed": values}})
    return {"seeds": list(rows), "rows": table, "verdict": verdict_json(verdict)}


def verdict_json(verdict: SeedsVerdict | None) -> dict[str, Any] | None:
    """The verdict over seeds as metrics.json has it; fractions, not percent."""
    if verdict is None:
        return None
    seeds = [str(seed) for seed in verdict.seeds]
    return {
        "compared": dict(zip(seeds, verdict.compared, strict=True)),
        "gains": dict(zip(seeds, verdict.each, strict=True)),
        "asked": verdict.asked,
        "outcome": verdict.outcome,
        "mean": gain_json(verdict.mean),
        "tasks": [gain_json(gain) for gain in verdict.tasks],
        "caveats": [*verdict.caveats, _INTERVAL],
    }
