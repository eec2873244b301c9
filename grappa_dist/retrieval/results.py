"""What `evaluate` found, as text whose last line is the verdict, and as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from grappa_dist.console import pluralize
from grappa_dist.files import write_json, write_utf8
from grappa_dist.make_shards.progress import align
from grappa_dist.output import printable_line
from grappa_dist.report.html import percent
from grappa_dist.report.verdict import describe_comparison
from grappa_dist.retrieval.embedding import describe_bad
from grappa_dist.retrieval.evaluation import Evaluated, Scores
from grappa_dist.verdict import caveats_on

_HEAD = ("task", "model", "queries", "classes", "R-Precision", "95% interval", "MAP@R", "recall@1")


def describe(found: Evaluated, left_out: Path | None = None) -> str:
    """Tables, what was left out, and the verdict in the last line.

    Args:
        left_out: a CSV that names the images which could not be read.
    """
    lines = [f"{name}: {printable_line(what)}" for name, what in found.models.items()]
    lines += [
        "leave-one-out, in percent; every query among the other images of its task",
        *align([_HEAD, *_rows(found)]),
    ]
    means = next(iter(found.means.values()))
    if means.alone:
        lines.append(
            f"{pluralize(means.alone, 'image')} alone in a class: searched, but no query, as there is nothing to find"
        )
    lines += [
        f"note: {printable_line(line)}" for line in (*found.remarks, *caveats_on(next(iter(found.scores.values()))))
    ]
    lines += describe_bad(found.bad, found.images, left_out)
    if found.gains:
        model, other = found.models
        than = "the backbone" if other == "backbone" else other
        lines.append(describe_comparison(found.gains[0], model, than, tasks=len(found.gains) - 1))
    return "\n".join(lines)


def _rows(found: Evaluated) -> Iterator[tuple[str, ...]]:
    tasks = len(next(iter(found.scores.values())))
    for place in range(tasks):
        for model, scores in found.scores.items():
            yield _row(scores[place], model, scores[place].task or "")
    if tasks > 1:
        for model, mean in found.means.items():
            yield _row(mean, model, f"mean of {tasks} tasks")


def _row(scores: Scores, model: str, name: str) -> tuple[str, ...]:
    interval = f"{percent(scores.low)} to {percent(scores.high)}"
    figures = (percent(scores.r_precision), interval, percent(scores.map_at_r), percent(scores.recall_at_1))
    return (name, model, f"{scores.queries:,}", f"{scores.classes:,}", *figures)


def as_json(found: Evaluated) -> dict[str, Any]:
    """All figures, as fractions."""
    return {
        "models": dict(found.models),
        "images": found.images,
        "scores": {model: [asdict(of_task) for of_task in scores] for model, scores in found.scores.items()},
        "means": {model: asdict(mean) for model, mean in found.means.items()},
        "gains": [{**vars(gain), "gain": gain.gain, "outcome": gain.outcome} for gain in found.gains],
        "left_out": [{"file": name, "reason": why} for name, why in found.bad],
        "remarks": list(found.remarks),
    }


def write_results(found: Evaluated, json_path: Path | None, csv_path: Path | None) -> None:
    """Writes what is asked for; the CSV has a line for each task and model, as fractions."""
    if json_path is not None:
        write_json(json_path, as_json(found))
    if csv_path is not None:
        text = io.StringIO(newline="")
        lines = csv.writer(text)
        lines.writerow(["model", *(field.name for field in fields(Scores))])
        for model, scores in found.scores.items():
            lines.writerows([model, *asdict(of_task).values()] for of_task in scores)
        write_utf8(csv_path, text.getvalue())
