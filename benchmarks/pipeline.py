"""The whole pipeline against one straightforward script of the paper: equal images, settings, steps and threads.

Ours is a complete run: the start of Ray and of its workers (the latter within the first step), checkpoints, label-free
figures, the report and the exported model, none of which the script has. The script's images are files in a folder,
written before its clock starts, and are decoded in as many processes as it has threads.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Log, aligned, aligned_header, check_least, machine
from examples.paper_in_one_file import AVERAGE, NEIGHBOURS, TRANSFORMS, PaperScript, Pictures
from grappa_dist import pipeline
from grappa_dist.artifacts import Store
from grappa_dist.config import Config, load
from grappa_dist.console import EVENTS_FILE
from grappa_dist.data.open_images import generate_data_set, generated_data_set, open_images
from grappa_dist.data.shards import ImageShards

OURS, SCRIPT = "ours", "the script"
DEMO = Path(__file__).parents[1] / "configs/demo.yaml"
STEPS = ("embed", "pseudo_label", "adapt", "fuse", "evaluate")
OTHER = "all else"
Scores = Mapping[str, Mapping[str, float]]  # R-Precision by model and task


@dataclass(frozen=True)
class PipelineSettings:
    """Options of `bench.py pipeline`."""

    config: Path
    overrides: tuple[str, ...]
    threads: int

    def check(self) -> None:
        check_least(self, threads=1)


@dataclass(frozen=True)
class Side:
    """One side: ours or the script."""

    seconds: dict[str, float]  # by step
    scores: Scores

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def mean(self, model: str) -> float:
        """R-Precision over tasks, in percent."""
        return 100 * statistics.fmean(self.scores[model].values())


@dataclass(frozen=True)
class PipelineFindings:
    """Results of `bench.py pipeline`."""

    source: str
    ours: Side
    script: Side

    def ratio(self, step: str | None = None) -> float:
        """The script over ours, of one step or of all."""
        if step is None:
            return self.script.total / self.ours.total
        return self.script.seconds[step] / self.ours.seconds[step]


def measure_pipeline(settings: PipelineSettings, log: Log) -> PipelineFindings:
    settings.check()
    variants = f"fuse.variants=[{AVERAGE},{TRANSFORMS},{NEIGHBOURS}]"
    cores = [f"resources.workers={settings.threads}", "resources.cpus_per_worker=1"]
    config = load(settings.config, [*settings.overrides, variants, *cores])
    if config.clustering.num_labels == "auto":
        raise ValueError("clustering.num_labels=auto: give the numbers, both sides need the same")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        store = Store(root)
        if config.data.collection:
            log("images")
            generate_data_set(config.data, generated_data_set(store, config.data))
        train, test = open_images(config.data, store)
        if test is None:
            raise ValueError("data.test=[]: both sides are scored on test images, give some")
        log(OURS)
        ours = _ours(config, root)
        pictures = _files(train, Path(folder) / "train"), _files(test, Path(folder) / "test")
        script = PaperScript(config, *pictures, settings.threads, log)
        scores = script.run()
    labels = ", ".join(map(str, config.clustering.num_labels))
    source = f"{len(train)} training and {len(test)} test images, K = {labels}"
    return PipelineFindings(source, ours, Side(script.seconds, scores))


def _ours(config: Config, root: Path) -> Side:
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        found = pipeline.run(config, root)
    assert found is not None
    seconds = seconds_by_step((root / EVENTS_FILE).read_text(encoding="utf-8").splitlines())
    seconds[OTHER] = time.perf_counter() - start - sum(seconds.values())
    scores: dict[str, dict[str, float]] = {}
    for row in found.rows:
        scores.setdefault(row["model"], {})[row["task"]] = row["r_precision"]
    return Side(seconds, scores)


def seconds_by_step(events: Iterable[str]) -> dict[str, float]:
    """Seconds of a run from scratch; images embedded after training count as evaluation."""
    seconds = dict.fromkeys(STEPS, 0.0)
    for event in map(json.loads, events):
        if event["name"] == "stage_ends":
            stage = {"partitions": "pseudo_label"}.get(event["stage"], event["stage"])
            step = "evaluate" if stage == "embed" and seconds["adapt"] else stage
            if step in seconds:
                seconds[step] += event["seconds"]
    return seconds


def _files(images: ImageShards, folder: Path) -> Pictures:
    """Writes every image as a file. All must decode: the script stops at a bad one."""
    folder.mkdir()
    pictures = Pictures([])
    for row in range(len(images)):
        path = folder / f"{row:09d}"
        path.write_bytes(images.image_bytes(row))
        member = images.labels(row) or {}
        pictures.files.append(path)
        pictures.tasks.append(str(member.get("task") or "all"))
        pictures.labels.append(str(member.get("label")))
    return pictures


def as_text(header: dict[str, str], found: PipelineFindings) -> str:
    ours, script = found.ours, found.script
    lines = [["seconds", OURS, SCRIPT, "script/ours"]]
    for step in STEPS:
        lines.append([step, f"{ours.seconds[step]:.1f}", f"{script.seconds[step]:.1f}", f"{found.ratio(step):.2f}"])
    lines.append([OTHER, f"{ours.seconds[OTHER]:.1f}", "-", "-"])
    lines.append(["in all", f"{ours.total:.1f}", f"{script.total:.1f}", f"{found.ratio():.2f}"])
    scores = [["R-Precision, mean of tasks", OURS, SCRIPT]]
    scores += [[model, f"{ours.mean(model):.1f}", f"{script.mean(model):.1f}"] for model in script.scores]
    return "\n\n".join([aligned_header({**header, "images": found.source}), aligned(lines), aligned(scores)])


def as_json(header: dict[str, str], found: PipelineFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "images": found.source,
        "sides": {name: vars(side) for name, side in ((OURS, found.ours), (SCRIPT, found.script))},
        "ratio": {**{step: found.ratio(step) for step in STEPS}, "in all": found.ratio()},
    }


SHORT = "against one script of the paper"
DESCRIPTION = """\
A whole run, from images to scores, against a straightforward script of the paper in one process, with plain timm,
DataLoader and faiss (examples/paper_in_one_file.py): the same images, settings and number of steps. Prints seconds of
every step, ratios (script / ours: above 1, ours is faster) and the scores of both, which differ as with another seed.
The config must give its numbers of labels and have labelled test images; pytorch-metric-learning must be installed."""
EXAMPLE = """example, five minutes:
  python launch/bench.py pipeline --config configs/demo.yaml"""


def arguments(add: Callable[..., Any]) -> None:
    add("--config", type=Path, default=DEMO, metavar="FILE", help="default: configs/demo.yaml of this repository")
    add("--threads", type=int, default=2, metavar="N", help="of the script, and workers of ours; default: %(default)s")
    add("overrides", nargs="*", metavar="key=value", help="of the config, e.g. adapt.epochs=1")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    options["overrides"] = tuple(options["overrides"])
    settings = PipelineSettings(**options)
    header = machine(settings.threads, "ray", "deepspeed", "faiss-cpu", "timm", "pytorch-metric-learning")
    found = measure_pipeline(settings, log)
    return as_text(header, found), as_json(header, found)
