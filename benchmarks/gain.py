"""What adaptation gains, by the number of images and the length of training: a run for each cell of a table.

Of every task the first half of the sorted classes trains and the other half tests, as in the paper. A cell is a number
of images, epochs, a bottleneck and a seed: the seed draws the images as well, so the spread over seeds is what a user
with another such collection would see. Each is one `grappa-dist run` with the command's own settings for its number of
images.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Log, aligned, aligned_header, check_least, machine
from grappa_dist.files import read_json, write_json
from grappa_dist.retrieval.map_images import flow_of
from grappa_dist.stages.evaluate import SCORES_FILE
from grappa_dist.variants import BACKBONE

ROOT = Path(__file__).parents[1]
FEW_OF_A_CLASS = 10  # images of a class, as many classes as that takes; more only where there are no further classes
CELL_FILE = "cell.json"
AVERAGE = "average"
Row = dict[str, str]


@dataclass(frozen=True)
class GainSettings:
    """Options of `bench.py gain`."""

    tasks: Path
    out: Path
    backbone: str
    images: tuple[int, ...]
    epochs: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    test_images: int
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        check_least(self, test_images=1)
        for name in ("images", "epochs", "bottlenecks"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"--{name}: must be 1 or more, got {min(getattr(self, name))}")
        known = {path.stem for path in self.tasks.glob("*.csv")}
        if not known:
            raise ValueError(f"--tasks {self.tasks}: holds no TASK.csv with a TASK.tar beside it")
        if strange := set(self.only) - known:
            raise ValueError(f"--only {' '.join(sorted(strange))}: expected of {', '.join(sorted(known))}")


@dataclass(frozen=True)
class Cell:
    """A collection and how it is trained on."""

    images: int
    epochs: int
    bottleneck: int
    seed: int
    task: str | None = None  # all images are of it; None: of all tasks alike

    @property
    def collection(self) -> str:
        return f"{self.task or 'all'}_n{self.images}_s{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.collection}_e{self.epochs}_h{self.bottleneck}"


def measure_gain(settings: GainSettings, log: Log) -> list[dict[str, Any]]:
    """Every cell that is not in --out yet; then all that are there, of this call or others."""
    settings.check()
    out = settings.out.absolute()
    cells = list(_cells(settings))
    if cells:
        _check_same(settings, out)
    for number, cell in enumerate(cells, 1):
        folder = out / "cells" / cell.name
        if (folder / CELL_FILE).exists():
            continue
        log(f"cell {number} of {len(cells)}: {cell.name}")
        _run(settings, cell, folder)
        write_json(folder / CELL_FILE, {**asdict(cell), "scores": _scores(folder)})
    return [read_json(path) for path in sorted(out.glob(f"cells/*/{CELL_FILE}"))]


def _check_same(settings: GainSettings, out: Path) -> None:
    """Notes what all cells of a folder have in common; raises ValueError where it was something else."""
    given = {"backbone": settings.backbone, "test_images": settings.test_images, "overrides": list(settings.overrides)}
    known = out / "settings.json"
    if known.exists() and read_json(known) != given:
        raise ValueError(f"--out {out}: its cells have {json.dumps(read_json(known))}, not {json.dumps(given)}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(known, given)


def _cells(settings: GainSettings) -> Iterator[Cell]:
    tasks: Sequence[str | None] = settings.only or (None,)
    for task, seed, *rest in itertools.product(
        tasks, settings.seeds, settings.images, settings.epochs, settings.bottlenecks
    ):
        images, epochs, bottleneck = rest
        yield Cell(images, epochs, bottleneck, seed, task)


def _run(settings: GainSettings, cell: Cell, folder: Path) -> None:
    out = settings.out.absolute()
    train = _shards(settings, out / "train" / cell.collection, rows_to_train(_tables(settings), cell), "none")
    test = _shards(settings, out / "test", rows_to_test(_tables(settings), settings.test_images), "test")
    given = [f"adapt.epochs={cell.epochs}", f"adapt.bottleneck={cell.bottleneck}", f"seed={cell.seed}"]
    command = ["run", str(train / "train"), "--test", str(test / "test"), "--backbone", settings.backbone]
    _grappa_dist([*command, "--out", str(folder), *given, *settings.overrides], folder.with_suffix(".txt"))


def _grappa_dist(arguments: Sequence[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with output.open("w", encoding="utf-8") as file:
        program = [sys.executable, "-m", "grappa_dist", *arguments]
        status = subprocess.run(program, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if status:
        last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"grappa-dist {arguments[0]}: exit status {status}, see {output}: {' '.join(last)}")


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """R-Precision of every model on every task."""
    _, flow = flow_of(folder)
    found = {model: read_json(artifact.path / SCORES_FILE) for model, artifact in flow.scores.items()}
    return {model: {row["task"]: row["r_precision"] for row in rows} for model, rows in found.items()}


def _tables(settings: GainSettings) -> dict[str, list[Row]]:
    tables = dict[str, list[Row]]()
    for path in sorted(settings.tasks.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            tables[path.stem] = list(csv.DictReader(file))
    return tables


def _by_class(rows: Sequence[Row], *, train: bool) -> dict[str, list[Row]]:
    """The rows of the classes of one half, by class."""
    found = defaultdict[str, list[Row]](list)
    for row in rows:
        found[row["fine"]].append(row)
    names = sorted(found)
    half = -(-len(names) // 2)
    return {name: found[name] for name in (names[:half] if train else names[half:])}


def rows_to_train(tables: Mapping[str, Sequence[Row]], cell: Cell) -> dict[str, list[Row]]:
    """The images of a cell, by task: as many of each task, of FEW_OF_A_CLASS a class where there are enough classes.

    A task that has fewer images than its share gives all, and the others more.
    """
    rng, tasks = np.random.default_rng(cell.seed), [cell.task] if cell.task else list(tables)
    queues = {task: _queue(_by_class(tables[task], train=True), rng) for task in tasks}
    wanted, taken = cell.images, dict[str, list[Row]]()
    for left, task in zip(range(len(tasks), 0, -1), sorted(tasks, key=lambda t: len(queues[t])), strict=True):
        taken[task] = _of_classes(queues[task], wanted // left)
        wanted -= len(taken[task])
    return {task: taken[task] for task in tasks}


def _queue(classes: Mapping[str, list[Row]], rng: np.random.Generator) -> list[tuple[int, int, Row]]:
    """All images: of each the place of its class in a drawn order, and its own place among those of the class."""
    found = list[tuple[int, int, Row]]()
    for place, of_class in zip(rng.permutation(len(classes)).tolist(), classes.values(), strict=True):
        for own, row in enumerate(rng.permutation(len(of_class)).tolist()):
            found.append((place, own, of_class[row]))
    return found


def _of_classes(queue: Sequence[tuple[int, int, Row]], count: int) -> list[Row]:
    """The first `count` by rounds of FEW_OF_A_CLASS images: a class after the other, and then a next round."""
    ordered = sorted(queue, key=lambda item: (item[1] // FEW_OF_A_CLASS, item[0], item[1]))
    return [row for _, _, row in ordered[:count]]


def rows_to_test(tables: Mapping[str, Sequence[Row]], most: int) -> dict[str, list[Row]]:
    """Whole classes of the other half, evenly spread over their sorted names, about `most` images of each task."""
    found = dict[str, list[Row]]()
    for task, rows in tables.items():
        classes = list(_by_class(rows, train=False).values())
        count = min(len(classes), max(2, round(most * len(classes) / sum(map(len, classes)))))
        places = np.linspace(0, len(classes) - 1, count).round().astype(int)
        found[task] = [row for place in places for row in classes[place]]
    return found


def _shards(settings: GainSettings, folder: Path, rows: Mapping[str, Sequence[Row]], split: str) -> Path:
    """Shards of these images, made once."""
    lists, given = folder.with_name(f"{folder.name}_lists"), list[str]()
    lists.mkdir(parents=True, exist_ok=True)
    for task, of_task in rows.items():
        path = lists / f"{task}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(of_task[0]))
            writer.writeheader()
            writer.writerows(of_task)
        given += ["--csv", str(path), "--images", str(settings.tasks / f"{task}.tar")]
    _grappa_dist(["shards", "--out", str(folder), "--split", split, *given], lists / "output.txt")
    return folder


def as_text(header: Mapping[str, str], cells: Sequence[Mapping[str, Any]], models: Sequence[str] = (AVERAGE,)) -> str:
    """Gain of models over the backbone in points, by task and in the mean; over seeds the mean, least and most."""
    groups = defaultdict[tuple[Any, ...], list[dict[str, float]]](list)
    for cell, model in itertools.product(cells, models):
        if model in cell["scores"]:
            key = (cell["task"] or "all", cell["images"], cell["epochs"], cell["bottleneck"], model)
            groups[key].append(gains(cell["scores"], model))
    tasks = sorted({task for of_cells in groups.values() for found in of_cells for task in found})
    lines = [["images of", "images", "epochs", "bottleneck", "model", "seeds", *tasks, "mean"]]
    for key, found in sorted(groups.items()):
        columns = [_spread([of_cell[task] for of_cell in found]) for task in tasks]
        mean = _spread([statistics.fmean(of_cell.values()) for of_cell in found])
        lines.append([*map(str, key), str(len(found)), *columns, mean])
    return "\n\n".join([aligned_header(dict(header)), aligned(lines), *_summary(cells, models)])


def _summary(cells: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """What a model gains in the mean over all cells, and the most that it loses on a task of any."""
    lines = [["model", "cells", "mean gain", "least on a task"]]
    for model in models:
        if found := [gains(cell["scores"], model) for cell in cells if model in cell["scores"]]:
            mean = statistics.fmean(statistics.fmean(of_cell.values()) for of_cell in found)
            least = min(min(of_cell.values()) for of_cell in found)
            lines.append([model, str(len(found)), f"{mean:+.2f}", f"{least:+.2f}"])
    return [aligned(lines)] if len(lines) > 1 else []


def gains(scores: Mapping[str, Mapping[str, float]], model: str) -> dict[str, float]:
    """A model less the backbone, in points of R-Precision, by task."""
    return {task: 100 * (value - scores[BACKBONE][task]) for task, value in scores[model].items()}


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):+.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.1f} to {max(values):+.1f})"


SHORT = "what adaptation gains, by images and epochs"
DESCRIPTION = __doc__
EXAMPLE = """example, minutes a cell:
  python launch/bench.py gain --tasks TASKS --out runs/gain --images 250 1000 --epochs 1 3 --seeds 0 1 2"""


def arguments(add: Callable[..., Any]) -> None:
    add(
        "--tasks",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds TASK.csv (file, fine, dataset) and TASK.tar of each task",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="gets the runs; a further call adds cells")
    add("--backbone", default="grappa_dist.demo.backbone:create", help="default: %(default)s")
    add("--images", type=int, nargs="*", default=[250, 1000], metavar="N", help="of a collection; default: 250 1000")
    add("--epochs", type=int, nargs="*", default=[1, 3], metavar="N", help="default: 1 3")
    add("--bottlenecks", type=int, nargs="*", default=[64], metavar="H", help="default: 64")
    add("--seeds", type=int, nargs="*", default=[0], metavar="S", help="default: 0")
    add("--only", nargs="*", default=[], metavar="TASK", help="collections of one task each; default: of all together")
    add("--test-images", type=int, default=600, metavar="N", help="about so many of each task; default: %(default)s")
    add("--models", nargs="*", default=[AVERAGE], metavar="NAME", help="that are shown; default: %(default)s")
    add("overrides", nargs="*", metavar="key=value", help="of all runs")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    lists = ("images", "epochs", "bottlenecks", "seeds", "only", "overrides")
    models = options.pop("models")
    settings = GainSettings(**{**options, **{name: tuple(options[name]) for name in lists}})
    cells = measure_gain(settings, log)
    header = machine(1, "timm")
    return as_text(header, cells, models), {"machine": header, "cells": cells}
