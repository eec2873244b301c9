"""The paper's tables: the scores of a run beside the published figures, as text, Markdown, CSV and HTML.

paper_tables.yaml has the figures. Scores are in percent; what was not measured or is not published is NaN.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from grappa_dist.config import CONFIG_FILE, Section
from grappa_dist.files import read_bytes, read_json
from grappa_dist.make_shards.progress import align
from grappa_dist.report.html import table, text
from grappa_dist.report.page import document
from grappa_dist.report.queries import ORACLE
from grappa_dist.report.scores import Metric, Scores, kind, ordered
from grappa_dist.stages.run import configs_of_seeds, read_config
from grappa_dist.variants import SUPERVISED_SET, VARIANTS

PUBLISHED = Path(__file__).with_name("paper_tables.yaml")
METRICS_FILE = "metrics.json"
NONE, MEAN = "-", "mean"
METRICS: dict[str, Metric] = {"R-Precision": "r_precision", "mAP": "map_at_r"}
Percent = Annotated[float, Field(ge=0, le=100)]


class Row(Section):
    """A model of a table: by its name in a run, or as an adaptor set by its K."""

    name: str
    model: str | None = None
    k: int | None = None
    figures: tuple[tuple[Percent, Percent], ...] = ()  # R-Precision and mAP of each task

    @property
    def own(self) -> str:
        """The model's name in a run that has the paper's settings."""
        return self.model or f"k={self.k}"


class Table(Section):
    title: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]


class Published(Section):
    """What the paper states."""

    source: str
    backbone: str
    test_images: dict[str, int]
    tables: dict[int, Table]

    @property
    def ks(self) -> list[int]:
        return sorted({row.k for one in self.tables.values() for row in one.rows if row.k is not None})

    def figure(self, own: str, task: str, metric: int) -> float:
        """What is stated of a model on a task, in whichever table."""
        for one in self.tables.values():
            for row in one.rows:
                if row.own == own and row.figures and task in one.tasks:
                    return row.figures[one.tasks.index(task)][metric]
        return math.nan


def read_published(path: Path = PUBLISHED) -> Published:
    """The published figures in a file.

    Raises:
        ValueError: it is no such file; the message has the place.
    """
    try:
        found = Published.model_validate(yaml.safe_load(read_bytes(path)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}, got {str(first.get('input'))[:60]!r}") from None
    for number, one in found.tables.items():
        for row in one.rows:
            if (row.model is None) == (row.k is None) or len(row.figures) not in (0, len(one.tasks)):
                what = f"tables.{number}, {row.name}"
                raise ValueError(f"{path}: {what}: expected model or k, and no figures or {len(one.tasks)} pairs")
    return found


@dataclass(frozen=True)
class RunScores:
    """The scores of a run, as means where there are several seeds, and what to know of them."""

    values: Mapping[tuple[str, str, str], float]  # by model, task and metric, in percent
    queries: Mapping[str, int]  # by task
    remarks: tuple[str, ...]

    @property
    def models(self) -> list[str]:
        return ordered(model for model, _, _ in self.values)

    def value(self, model: str, task: str, metric: str) -> float:
        return self.values.get((model, task, metric), math.nan)


def read_run(place: Path) -> RunScores:
    """The scores of a run directory, of a folder of runs of several seeds, or of one metrics.json.

    Raises:
        ValueError: there is no report yet, or it has no scores.
    """
    seeds = [path.parent for path in configs_of_seeds(place)] if not (place / CONFIG_FILE).exists() else []
    files = [place] if place.is_file() else [run / "report" / METRICS_FILE for run in seeds or [place]]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is not there: expected a finished run with its report, or a {METRICS_FILE}")
    found = [_scores_in(file) for file in files]
    keys = [(m, t) for m, t in found[0].cells if all((m, t) in one.cells for one in found)]
    values: dict[tuple[str, str, str], float] = {
        (model, task, metric): 100 * sum(one.value(model, task, metric) for one in found) / len(found)
        for model, task in keys
        for metric in METRICS.values()
    }
    queries = {task: max(found[0].queries(model, task) for model in found[0].models) for task in found[0].tasks}
    if not any(map(math.isfinite, values.values())):
        raise ValueError(f"{files[0]}: has no scores; the test images (data.test) have no labels, or there are none")
    remarks = [f"means over {len(seeds)} seeds"] if len(seeds) > 1 else []
    run = seeds[0] if seeds else place
    if (run / CONFIG_FILE).is_file():
        remarks.append(f"the backbone of the run is {read_config(run).backbone.name}")
    return RunScores(values, queries, tuple(remarks))


def _scores_in(path: Path) -> Scores:
    try:
        rows = read_json(path)["rows"]
        plain = [{**row, **{m: math.nan if row[m] is None else row[m] for m in METRICS.values()}} for row in rows]
        return Scores.of(plain)  # type: ignore[arg-type]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path}: no {METRICS_FILE} of a run: {error!r}") from None


@dataclass(frozen=True)
class Line:
    """A model of a table: here, and as published."""

    name: str  # as in the paper
    model: str | None  # as in the run; None: the run has no such model
    here: Mapping[tuple[str, str], float]  # by task, or "mean", and metric
    published: Mapping[tuple[str, str], float]

    def difference(self, task: str, metric: str) -> float:
        """Of what is printed of both."""
        return round(self.here[task, metric], 1) - round(self.published[task, metric], 1)


@dataclass(frozen=True)
class Comparison:
    """One of the paper's tables with the scores of a run."""

    number: int
    title: str
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.tasks, MEAN)

    @property
    def heading(self) -> str:
        return f"Table {self.number}: {self.title}"


def compare(number: int, published: Published, run: RunScores) -> Comparison:
    """A table of the paper, every model of it, and then the models of the run that the paper has not.

    Raises:
        ValueError: there is no such table.
    """
    if number not in published.tables:
        raise ValueError(f"table {number}: there are figures for {', '.join(map(str, published.tables))}")
    of = published.tables[number]
    own = _own_names(published, run)
    lines = [_line(row.name, row.own, own.get(row.own), of.tasks, (published, run)) for row in of.rows]
    known = {own.get(row.own) for one in published.tables.values() for row in one.rows}
    more = [model for model in run.models if model not in known] if number == 2 else []
    lines += [_line(f"({model})", model, model, of.tasks, (published, run)) for model in more]
    return Comparison(number, of.title, of.tasks, tuple(lines), tuple(_remarks(of, published, run, lines)))


def _own_names(published: Published, run: RunScores) -> dict[str, str]:
    """The models of the paper that the run has, and their names in it.

    Sets are those of the same K; where the run has none of the paper's, its i-th smallest K is P_i.
    """
    sets = [model for model in run.models if kind(model) == "set"]
    names = [f"k={k}" for k in published.ks]
    pairs = zip(names, sets, strict=False) if not set(names) & set(sets) else zip(names, names, strict=True)
    return {name: model for name, model in pairs if model in sets} | {
        model: model for model in run.models if kind(model) != "set"
    }


def _line(name: str, own: str, model: str | None, tasks: tuple[str, ...], of: tuple[Published, RunScores]) -> Line:
    published, run = of
    here, stated = dict[tuple[str, str], float](), dict[tuple[str, str], float]()
    for place, metric in enumerate(METRICS.values()):
        for task in tasks:
            here[task, metric] = math.nan if model is None else run.value(model, task, metric)
            stated[task, metric] = published.figure(own, task, place)
        for values in (here, stated):
            values[MEAN, metric] = sum(values[task, metric] for task in tasks) / len(tasks)
    return Line(name, model, here, stated)


def _remarks(of: Table, published: Published, run: RunScores, lines: Sequence[Line]) -> Iterator[str]:
    """What makes figures differ, and what is missing."""
    for remark in run.remarks:
        yield f"{remark}; the paper's is {published.backbone}" if "backbone" in remark else remark
    sets = [model for model in run.models if kind(model) == "set"]
    if sets and not {f"k={k}" for k in published.ks} & set(sets):
        yield f"P_1, P_2, ... are {', '.join(sets)} here, of which the paper has none: it is another experiment"
    for task in of.tasks:
        if task not in run.queries:
            yield f"{task}: not in the run; its shards are given in data.test"
        elif (found := run.queries[task]) != (right := published.test_images.get(task, found)):
            yield f"{task}: {found:,} queries here, {right:,} test images in the paper's benchmark"
    for line in lines:
        if line.model is None:
            row = next(row for row in of.rows if row.name == line.name)
            yield f"{line.name}: not in the run{_how_to_get(row)}"
    if any(math.isnan(published.figure(row.own, task, 0)) for row in of.rows for task in of.tasks):
        yield f"where no figure is published, none was found of {published.source}: --published FILE adds them"


def _how_to_get(row: Row) -> str:
    if row.model in VARIANTS:
        return f"; fuse.variants has no {row.model}"
    if row.model == SUPERVISED_SET:
        return "; adapt.supervised=true adds it"
    if row.model == ORACLE:
        return "; it needs labelled test images"
    return f"; clustering.num_labels has no {row.k}" if row.k else ""


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else NONE


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}" if math.isfinite(value) else ""


def _name(line: Line) -> str:
    """The paper's name, and the run's where that says more."""
    return f"{line.name} ({line.model})" if line.model and line.model.startswith("k=") else line.name


def _cell(line: Line, task: str, metric: str) -> str:
    both = f"{_number(line.here[task, metric])}/{_number(line.published[task, metric])}"
    return f"{both} {_signed(line.difference(task, metric))}".rstrip()


def as_text(found: Comparison) -> str:
    """Two grids, for R-Precision and for mAP: here/published and the difference, in percent."""
    blocks = []
    for title, metric in METRICS.items():
        head = ("", *found.columns)
        body = [(_name(line), *(_cell(line, task, metric) for task in found.columns)) for line in found.lines]
        what = f"{found.heading}. {title} in percent: here/published, and the difference"
        blocks.append("\n".join([what, *(line.rstrip() for line in align([head, *body]))]))
    notes = "\n".join(f"  note: {remark}" for remark in found.remarks)
    return "\n\n".join([*blocks, *([notes] if notes else [])])


def as_markdown(found: Comparison) -> str:
    """The same as two tables of Markdown."""
    parts = [f"## {found.heading}"]
    for title, metric in METRICS.items():
        lines = [("model", *found.columns), ("---", *("---:" for _ in found.columns))]
        lines += [(_name(line), *(_cell(line, task, metric) for task in found.columns)) for line in found.lines]
        rows = ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]
        parts.append("\n".join([f"{title} in percent: here/published, and the difference", "", *rows]))
    parts += ["\n".join(f"- {_escaped(remark)}" for remark in found.remarks)] if found.remarks else []
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return cell if set(cell) <= set("-:") else cell.replace("|", r"\|").replace("*", r"\*").replace("_", r"\_")


def as_csv(tables: Sequence[Comparison]) -> str:
    """A line for each figure: here and published in percent, empty where there is none."""
    out = io.StringIO(newline="")
    lines = csv.writer(out)
    lines.writerow(["table", "row", "model", "task", "metric", "here", "published", "difference"])
    for found in tables:
        for line in found.lines:
            for metric in METRICS.values():
                for task in found.columns:
                    values = (line.here[task, metric], line.published[task, metric], line.difference(task, metric))
                    cells = [f"{value:.2f}" if math.isfinite(value) else "" for value in values]
                    lines.writerow([found.number, line.name, line.model or "", task, metric, *cells])
    return out.getvalue()


def as_html(tables: Sequence[Comparison], name: str) -> str:
    """A page of its own, in the style of the report."""
    sections = []
    for found in tables:
        parts = []
        for title, metric in METRICS.items():
            head = ("model", *(text(column) for column in found.columns))
            body = [(text(_name(one)), *(_markup(one, task, metric) for task in found.columns)) for one in found.lines]
            parts.append(f"<h3>{title} in percent: here / published</h3>{table(head, body)}")
        parts += [f'<p class="note">{text(remark)}.</p>' for remark in found.remarks]
        sections.append((f"table-{found.number}", text(found.heading), "".join(parts)))
    return document(name, sections)


def _markup(line: Line, task: str, metric: str) -> str:
    difference = line.difference(task, metric)
    shade = (
        "" if not math.isfinite(difference) else " up" if difference > 0.05 else " down" if difference < -0.05 else ""
    )
    both = f"{_number(line.here[task, metric])} / {_number(line.published[task, metric])}"
    return f'{both}<span class="delta{shade}">{_signed(difference)}</span>'
