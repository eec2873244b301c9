"""`bench.py pipeline`: the whole pipeline against one script of the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import pipeline
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against one script of the paper"
DESCRIPTION = """\
A whole run, from images to scores, against a straightforward script of the paper in one process, with plain timm,
DataLoader and faiss (examples/paper_in_one_file.py): the same images, settings and number of steps. Prints seconds of
every step, ratios (script / ours: above 1, ours is faster) and the scores that both reach; these differ as seeds do.
The config must name its numbers of labels and have labelled test images; pytorch-metric-learning must be installed."""
EXAMPLE = """example, five minutes:
  python launch/bench.py pipeline --config configs/demo.yaml"""


def arguments(add: Callable[..., Any]) -> None:
    add("--config", type=Path, default=Path("configs/demo.yaml"), metavar="FILE", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of the script, and workers of ours; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers")
    add("overrides", nargs="*", metavar="key=value", help="of the config, e.g. adapt.epochs=1")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["overrides"] = tuple(asked["overrides"])
    settings = pipeline.PipelineSettings(**asked)
    header = machine(settings.threads, "ray", "deepspeed", "faiss-cpu", "timm", "pytorch-metric-learning")
    found = pipeline.measure_pipeline(settings, tell)
    return pipeline.as_text(header, found), pipeline.as_json(header, found)
