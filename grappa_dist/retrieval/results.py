"""What `evaluate` found, as text whose last line is the verdict, and as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grappa_dist.console import pluralize
from grappa_dist.files import write_json, write_utf8
from grappa_dist.make_shards.progress import align
from grappa_dist.metrics import as_fractions
from grappa_dist.output import printable_line
from grappa_dist.report.html import percent
from grappa_dist.report.verdict import describe_comparison
from grappa_dist.retrieval.embedding import NAMED, describe_bad
from grappa_dist.retrieval.scores import Evaluated, Figure, Lookup, Queries, Scores, most_changed, worst_queries
from grappa_dist.verdict import Gain, caveats_on

LISTED = 20  # worst queries, and those that changed most, in the JSON
_HEAD = ("task", "model", "queries", "classes", "R-Precision", "95% interval", "MAP@R")
_NAMES = {"r_precision": "R-Precision", "map_at_r": "MAP@R", "recall": "recall", "precision": "precision", "map": "mAP"}


def metric_name(metric: str) -> str:
    """As tables have it, such as recall@5."""
    if metric in _NAMES:
        return _NAMES[metric]
    kind, _, depth = metric.partition("_at_")
    return f"{_NAMES[kind]}@{depth}"


def shown_metrics(scores: Scores) -> list[str]:
    """Recall at every depth, then precision and mAP at the largest: at 1 these equal recall."""
    metrics = [metric for metric in scores.figures if metric.startswith("recall_at_")] or ["recall_at_1"]
    deepest = metrics[-1].removeprefix("recall_at_")
    others = [f"{kind}_at_{deepest}" for kind in ("precision", "map")] if deepest != "1" else []
    return [*metrics, *(metric for metric in others if metric in scores.figures)]


def describe_search(found: Evaluated) -> str:
    """How the images were divided, as a sentence without its full stop."""
    searched = found.searched
    if searched.leave_one_out:
        line = "leave-one-out, in percent; every query among the other images of its task"
    else:
        queries = pluralize(searched.queries, "query", "queries")
        line = f"in percent; {queries} among the images of their task in a gallery of {searched.gallery:,}"
    if searched.distractors or searched.copies:
        line += f", and {pluralize(searched.distractors, 'distractor')}"
    if searched.copies:
        line += f" ({searched.copies:,} more left out, which are labelled images, byte for byte)"
    return line


def describe(found: Evaluated, left_out: Path | None = None) -> str:
    """Tables, what was left out, and the verdict in the last line.

    Args:
        left_out: a CSV that names the images which could not be read.
    """
    lines = [f"{name}: {printable_line(what)}" for name, what in found.models.items()]
    lines += [describe_search(found), *align([*_table(found.scores, found.means)])]
    if found.mixed is not None:
        lines += [
            "the same queries among the images of all tasks",
            *align([*_table(found.mixed.scores, found.mixed.means)]),
        ]
    means = next(iter(found.means.values()))
    if means.alone and found.searched.leave_one_out:
        lines.append(
            f"{pluralize(means.alone, 'image')} alone in a class: searched, but no query, as there is nothing to find"
        )
    lines += _describe_unmatched(found.unmatched)
    lines += [
        f"note: {printable_line(line)}" for line in (*found.remarks, *caveats_on(next(iter(found.scores.values()))))
    ]
    lines += describe_bad(found.bad, found.images, left_out)
    if found.gains:
        lines.append(verdict_of(found))
    return "\n".join(lines)


def verdict_of(found: Evaluated) -> str:
    """Whether the first model is better than the other, by how much, how sure."""
    model, other = found.models
    than = "the backbone" if other == "backbone" else other
    return describe_comparison(found.gains[0], model, than, tasks=len(found.gains) - 1)


def _describe_unmatched(unmatched: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    if not unmatched:
        return
    count = pluralize(len(unmatched), "query", "queries")
    yield f"{count} not scored: the gallery has no image of their class, or none but themselves"
    for name, task, label in unmatched[:NAMED]:
        yield f"  {printable_line(name)} ({printable_line(task)}, {printable_line(label)})"
    if len(unmatched) > NAMED:
        yield f"  and {len(unmatched) - NAMED:,} more (--json FILE lists all)"


def _table(scores: Mapping[str, Sequence[Scores]], means: Mapping[str, Scores]) -> Iterator[tuple[str, ...]]:
    metrics = shown_metrics(next(iter(means.values())))
    yield (*_HEAD, *map(metric_name, metrics))
    tasks = len(next(iter(scores.values())))
    for place in range(tasks):
        for model, of_model in scores.items():
            yield _row(of_model[place], model, of_model[place].task or "", metrics)
    if tasks > 1:
        for model, mean in means.items():
            yield _row(mean, model, f"mean of {tasks} tasks", metrics)


def _row(scores: Scores, model: str, name: str, metrics: Sequence[str]) -> tuple[str, ...]:
    interval = f"{percent(scores.low)} to {percent(scores.high)}"
    known = {"recall_at_1": scores.recall_at_1, **{m: figure.value for m, figure in scores.figures.items()}}
    figures = (percent(scores.r_precision), interval, percent(scores.map_at_r), *(percent(known[m]) for m in metrics))
    return (name, model, f"{scores.queries:,}", f"{scores.classes:,}", *figures)


def as_json(found: Evaluated) -> dict[str, Any]:
    """All figures, as fractions; of the queries the worst, and those that changed most."""
    mixed = found.mixed
    return {
        "models": dict(found.models),
        "images": found.images,
        "searched": asdict(found.searched),
        "scores": _scores_json(found.scores),
        "means": {model: _figures_json(mean) for model, mean in found.means.items()},
        "gains": _gains_json(found.gains),
        "metric_gains": {metric: _gains_json([gain])[0] for metric, gain in found.metric_gains.items()},
        "all_tasks": None
        if mixed is None
        else {
            "scores": _scores_json(mixed.scores),
            "means": {model: _figures_json(mean) for model, mean in mixed.means.items()},
            "gains": _gains_json(mixed.gains),
        },
        "classes": [{**asdict(one), "gain": one.gain()} for one in found.classes],
        **_queries_json(found),
        "unmatched": [dict(zip(("file", "task", "label"), query, strict=True)) for query in found.unmatched],
        "left_out": [{"file": name, "reason": why} for name, why in found.bad],
        "remarks": list(found.remarks),
    }


def _scores_json(scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    return {model: [_figures_json(of_task) for of_task in of_model] for model, of_model in scores.items()}


def _figures_json(scores: Scores) -> dict[str, Any]:
    return {**vars(scores), "figures": {metric: figure._asdict() for metric, figure in scores.figures.items()}}


def _gains_json(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    return [{**vars(gain), "gain": gain.gain, "outcome": gain.outcome} for gain in gains]


def _queries_json(found: Evaluated) -> dict[str, Any]:
    """The worst queries of each model, and those that gained and lost most, with what was found for them."""
    if found.queries is None or found.lookup is None:
        return {}
    queries, lookup = found.queries, found.lookup
    worst = {model: worst_queries(queries, model, LISTED) for model in queries.rankings}
    lists: dict[str, Any] = {
        "worst": {m: [_query_json(queries, lookup, place, [m]) for place in places] for m, places in worst.items()}
    }
    if len(queries.rankings) > 1:
        for name, places in zip(("most_improved", "most_worsened"), most_changed(queries, LISTED), strict=True):
            lists[name] = [_query_json(queries, lookup, place, list(queries.rankings)) for place in places]
    return lists


def _query_json(queries: Queries, lookup: Lookup, place: int, models: Sequence[str]) -> dict[str, Any]:
    row = int(queries.rows[place])
    found = {}
    for model in models:
        ranking = queries.rankings[model]
        hits = zip(ranking.ids[place].tolist(), ranking.cosines[place].tolist(), strict=True)
        figures = dict(zip(queries.metrics, as_fractions(ranking.units[place]).tolist(), strict=True))
        found[model] = {
            **figures,
            "found": [
                {
                    "file": lookup.name(hit),
                    "label": lookup.label(hit),
                    "cosine": cosine,
                    "right": lookup.same_class(row, hit),
                }
                for hit, cosine in hits
                if hit >= 0
            ],
        }
    task = queries.task_names[queries.tasks[place]]
    return {"file": lookup.name(row), "task": task, "label": lookup.label(row), "models": found}


def write_results(
    found: Evaluated,
    json_path: Path | None,
    csv_path: Path | None,
    *,
    classes_path: Path | None = None,
    queries_path: Path | None = None,
) -> None:
    """Writes what is asked for; figures in the CSVs are fractions.

    Args:
        csv_path: a line for each task and model, in the gallery of the task and in that of all tasks.
        classes_path: a line for each class and model.
        queries_path: a line for each query and model, with the name of what was found first.
    """
    if json_path is not None:
        write_json(json_path, as_json(found))
    for path, table in ((csv_path, _task_lines), (classes_path, _class_lines), (queries_path, _query_lines)):
        if path is not None:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(table(found))
            write_utf8(path, text.getvalue())


def _task_lines(found: Evaluated) -> Iterator[Iterable[Any]]:
    figures = next(iter(found.means.values())).figures
    plain = ("task", "queries", "classes", "alone", "r_precision", "map_at_r", "recall_at_1", "low", "high")
    wide = [column for metric in figures for column in (metric, f"{metric}_low", f"{metric}_high")]
    yield ("model", *plain, "gallery", *(column for column in wide if column not in plain))
    for gallery, scores in (("task", found.scores), ("all", {} if found.mixed is None else found.mixed.scores)):
        for model, of_model in scores.items():
            for of_task in of_model:
                known = _wide(of_task.figures)
                rest = (known[column] for column in wide if column not in plain)
                yield (model, *(getattr(of_task, name) for name in plain), gallery, *rest)


def _wide(figures: Mapping[str, Figure]) -> dict[str, float]:
    parts = (("", 0), ("_low", 1), ("_high", 2))
    return {f"{metric}{ending}": figure[at] for metric, figure in figures.items() for ending, at in parts}


def _class_lines(found: Evaluated) -> Iterator[Iterable[Any]]:
    metrics = () if found.queries is None else found.queries.metrics
    yield ("model", "task", "class", "queries", *metrics)
    for one in found.classes:
        for model, figures in one.figures.items():
            yield (model, one.task, one.label, one.queries, *(figures[metric] for metric in metrics))


def _query_lines(found: Evaluated) -> Iterator[Iterable[Any]]:
    queries, lookup = found.queries, found.lookup
    if queries is None or lookup is None:
        return
    yield ("file", "task", "class", "model", *queries.metrics, "first", "first_cosine", "first_right")
    for place, row in enumerate(queries.rows.tolist()):
        about = (lookup.name(row), queries.task_names[queries.tasks[place]], lookup.label(row))
        for model, ranking in queries.rankings.items():
            hit = int(ranking.ids[place, 0])
            first = (
                (lookup.name(hit), float(ranking.cosines[place, 0]), lookup.same_class(row, hit)) if hit >= 0 else ()
            )
            yield (*about, model, *as_fractions(ranking.units[place]).tolist(), *first)
