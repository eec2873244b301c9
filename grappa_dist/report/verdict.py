"""The verdict of a run as sentences: whether it helps, by how much, how sure, and what next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grappa_dist.config import AUTO
from grappa_dist.console import pluralize
from grappa_dist.report.html import percent, points, text
from grappa_dist.report.plots import Axes, Interval, forest_plot
from grappa_dist.report.sentences import describe_gain
from grappa_dist.variants import BACKBONE
from grappa_dist.verdict import Gain, Verdict

LABELLED = 200  # test images that tell a gain of some points
SEEDS_CAVEAT = "one seed was run: how much another seed changes is not in the interval (--seeds 0,1,2 shows it)"
MOST_WANTED = 100_000  # queries; a difference that needs more is too small to look for
NARROW = 0.01  # bounds of an interval that leaves no gain worth looking for, as fractions
POWER = ((1.960 + 0.842) / 1.960) ** 2  # times as many queries tell a difference in 80 % of the cases, not in half
MOST_TASKS = 12  # lines
MOST_DRAWN = 24  # tasks
RUN = "RUN"  # in the commands of a page, which does not say where its run lies
TRY_MORE = "more training images or adapt.epochs, other clustering.num_labels, or other evaluate.strengths"


def describe_sureness(gain: Gain) -> str:
    """For example "95% interval +0.4 to +2.0, p = 0.004, 512 queries"."""
    p = "p < 0.001" if gain.p_value < 0.001 else f"p = {gain.p_value:.3f}"
    queries = pluralize(gain.queries, "query", "queries")
    return f"95% interval {points(gain.low)} to {points(gain.high)}, {p}, {queries}"


def verdict_lines(verdict: Verdict, run: str) -> list[str]:
    """The verdict as text, its conclusion last.

    Args:
        run: the run directory, for the commands.
    """
    head = f"verdict  {verdict.compared} against the backbone, R-Precision in percent{_queries(verdict)}"
    notes = [f"  note: {line}" for line in caveats(verdict)]
    return as_console([head, *gain_lines(verdict.mean, verdict.tasks), *notes, conclusion(verdict, run)])


def as_console(lines: Sequence[str]) -> list[str]:
    """With the minus of a terminal, as the tables of scores have it."""
    return [line.replace("−", "-") for line in lines]


def caveats(verdict: Verdict) -> list[str]:
    """What the figures do not say, as sentences."""
    return [*_losses(verdict), *verdict.caveats, SEEDS_CAVEAT]


def _losses(verdict: Verdict) -> list[str]:
    """What to do about tasks that lose where the mean does not."""
    worse = [gain for gain in verdict.tasks if gain.outcome == "worse"]
    if not worse or verdict.mean.outcome == "worse":
        return []
    named = ", ".join(f"{gain.task} ({points(gain.shown_gain)})" for gain in worse[:MOST_TASKS])
    more = f" and {len(worse) - MOST_TASKS} more" if len(worse) > MOST_TASKS else ""
    return [
        f"worse than the backbone on {named}{more}; at half the strength of adaptation (evaluate.strengths=[0.5], "
        "then evaluate.export) losses are smaller, and so are gains"
    ]


def conclusion(verdict: Verdict, run: str) -> str:
    """One line: whether it helps, by how much, how sure, what is exported, what next."""
    mean, model = verdict.mean, verdict.compared
    tasks = len(verdict.tasks)
    if verdict.exported == BACKBONE and verdict.asked == AUTO:
        by = _by(mean, model, "the backbone", tasks)
        return (
            "No adapted model was better than the backbone on the queries that choose, so the exported model is the "
            f"backbone. On the other queries, {by}; it was the best of them. Next: {TRY_MORE}"
        )
    asked = " The exported model is the backbone, as evaluate.export asks." if verdict.exported == BACKBONE else ""
    found = describe_comparison(mean, model, "the backbone", tasks=tasks)
    if mean.outcome == "better":
        return f"{found}{asked} Next: {how_to_use(run)}"
    if mean.outcome == "worse":
        return f"{found}{asked} Next: {_keep(verdict)}{TRY_MORE}"
    return f"{found}{asked} Next: {_tell(verdict)}"


def describe_comparison(mean: Gain, model: str, than: str, *, tasks: int) -> str:
    """One sentence: whether a model is better than another one, by how much, how sure.

    Args:
        mean: over this many tasks.
    """
    begins = {"better": "Better than", "worse": "Worse than", "unsure": "Not shown to be better than"}
    return f"{begins[mean.outcome]} {than}: {_by(mean, model, than, tasks)}."


def _by(mean: Gain, model: str, than: str, tasks: int) -> str:
    figure = f"mean R-Precision over {tasks} tasks" if tasks > 1 else "R-Precision"
    return f"{model} is {describe_gain(mean.shown_gain, than)} in {figure} ({describe_sureness(mean)})"


def how_to_use(run: str) -> str:
    """What to do with a better model."""
    return f"search your images with it:  grappa-dist search --model {shlex.quote(run)} --images FOLDER QUERY"


def _keep(verdict: Verdict) -> str:
    if verdict.exported == BACKBONE:
        return ""
    return "the backbone itself (evaluate.export=backbone); " + (
        "" if verdict.asked == AUTO else "evaluate.export=auto exports what is best on half of the queries; "
    )


def _tell(verdict: Verdict) -> str:
    """What would tell more.

    The interval narrows by the root of the number of queries, so that some number of them tells a difference of this
    size, four times out of five.
    """
    mean, queries = verdict.mean, verdict.mean.queries + verdict.validation_queries
    wide = (mean.high - mean.low) / 2
    wanted = POWER * queries * (wide / mean.gain) ** 2 if round(100 * mean.gain, 1) else math.inf
    if wanted > MOST_WANTED:
        if max(-mean.low, mean.high) < NARROW:
            return f"nothing to gain here, it seems; else {TRY_MORE}"
        return f"more labelled test images (now {queries:,}), as the interval is wide; else {TRY_MORE}"
    size = 10 ** max(1, len(str(round(wanted))) - 2)
    number = f"{math.ceil(max(wanted, queries + 1) / size) * size:,}"
    wanted_images = f"some {number} labelled test images (now {queries:,})"
    return f"{wanted_images} would likely tell a difference of this size; else {TRY_MORE}"


def gain_lines(mean: Gain, tasks: Sequence[Gain]) -> Iterator[str]:
    """A line for the mean over tasks and one for each task."""
    rows = [mean, *tasks] if len(tasks) > 1 else list(tasks)
    names = [f"mean of {len(tasks)} tasks" if row.task is None else row.task for row in rows]
    wide = min(30, max(map(len, names)))
    for name, row in list(zip(names, rows, strict=True))[: MOST_TASKS + 1]:
        shown = f"{percent(row.baseline)} -> {percent(row.value)}"
        yield f"  {name[:wide]:<{wide}}  {shown:<14}  {points(row.shown_gain):>5}  ({describe_sureness(row)})"
    if len(rows) > MOST_TASKS + 1:
        yield f"  and {len(rows) - MOST_TASKS - 1} more tasks: metrics.json has all"


def _queries(verdict: Verdict) -> str:
    if not verdict.validation:
        return ""
    queries = pluralize(verdict.validation_queries, "other query", "other queries")
    return f", on the queries that took no part in choosing it ({queries} did)"


def verdict_section(verdict: Verdict | None, *, has_test: bool) -> str:
    """The conclusion, the gains with their intervals as a picture, and what these do not say; or what is not known."""
    if verdict is None:
        lines = without_labels(RUN, has_test=has_test)
        return "".join(f'<p class="verdict">{text(line, 1000)}</p>' for line in lines)
    rows = [verdict.mean, *verdict.tasks] if len(verdict.tasks) > 1 else list(verdict.tasks)
    shown = [interval(row, len(verdict.tasks)) for row in rows[: MOST_DRAWN + 1]]
    hidden = len(rows) - len(shown)
    note = "A dot is the gain, its line the 95% bootstrap interval over queries; the line at 0 is the backbone."
    note += f" {hidden} more tasks are in metrics.json." if hidden else ""
    axes = Axes(title=f"{verdict.compared} against the backbone", x_label="points of R-Precision", note=note)
    notes = [
        line[0].upper() + line[1:].rstrip(".") + "." for line in (_queries_note(verdict), *caveats(verdict)) if line
    ]
    items = "".join(f"<li>{text(line, 1000)}</li>" for line in notes)
    found, _, following = conclusion(verdict, RUN).partition(" Next: ")
    return (
        f'<p class="verdict"><b>{text(found, 1000)}</b></p><p class="verdict">Next: {text(following, 1000)}.</p>'
        f'<div class="charts few">{forest_plot(shown, axes)}<ul class="reading">{items}</ul></div>'
    )


def interval(row: Gain, num_tasks: int) -> Interval:
    """A gain as a row of a forest plot."""
    name = row.task if row.task is not None else f"mean of {num_tasks} tasks"
    tip = f"{name}: {percent(row.baseline)} to {percent(row.value)}, {describe_sureness(row)}"
    return Interval(name, 100 * row.gain, 100 * row.low, 100 * row.high, points(row.shown_gain), tip)


def _queries_note(verdict: Verdict) -> str:
    if not verdict.validation:
        return ""
    chose, models = pluralize(verdict.validation_queries, "query", "queries"), len(verdict.validation)
    return (
        f"{chose} chose among {models} models; the other {verdict.mean.queries:,}, of the same classes, are reported "
        "here. The table below is of all queries."
    )


def as_json(verdict: Verdict | None) -> dict[str, Any] | None:
    """The verdict as metrics.json has it; fractions, not percent."""
    if verdict is None:
        return None
    return {
        "exported": verdict.exported,
        "compared": verdict.compared,
        "asked": verdict.asked,
        "outcome": verdict.mean.outcome,
        "mean": gain_json(verdict.mean),
        "tasks": [gain_json(gain) for gain in verdict.tasks],
        "validation": dict(verdict.validation),
        "validation_queries": verdict.validation_queries,
        "caveats": caveats(verdict),
    }


def gain_json(gain: Gain) -> Mapping[str, Any]:
    """A gain as metrics.json has it."""
    return {**vars(gain), "gain": gain.gain}


def why_exported(verdict: Verdict | None, asked: str) -> dict[str, Any]:
    """What config.json of an exported model says of how it came to be the one."""
    if asked != AUTO:
        return {"export": asked, "reason": "asked for"}
    if verdict is None:
        reason = "no labelled test images to choose by: the last of fuse.variants that is no baseline"
        return {"export": asked, "reason": reason}
    queries = pluralize(verdict.validation_queries, "labelled test query", "labelled test queries")
    reason = f"the best mean R-Precision on {queries}, half of all; the verdict is of the other half"
    return {"export": asked, "reason": reason, "validation": dict(verdict.validation)}


def without_labels(run: str, *, has_test: bool, why: str = "") -> list[str]:
    """The last lines of a run that nothing can be said of.

    Args:
        why: which labels there are and which are read, if that is known.
    """
    lacks = "no test image with a label that another one shares" if has_test else "no labelled test images"
    return [
        f"Not known: whether this model is better than the backbone; there were {lacks}. "
        "The report has label-free figures alone, and none of them is a score.",
        *([why] if why else []),
        "Answers about 200 pairs of images show a large difference (--label 200 in place of --images FOLDER). "
        f"Some {LABELLED} labelled images, two or more of each class, would settle it: put them into a folder for each "
        f"class and run  grappa-dist evaluate --model {shlex.quote(run)} --images FOLDER",
    ]
