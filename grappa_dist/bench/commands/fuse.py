"""`bench.py fuse`: adaptors and fusion against a literal Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import fuse
from grappa_dist.bench import correlation, fuse_table
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against a literal Algorithm 1"
DESCRIPTION = """\
The adaptors and their fusion against a literal Algorithm 1 of the paper, once with all adapted outputs in one
tensor and once set by set: time forward and forward+backward (gradients of the input, Q and K; adaptors are frozen),
what is kept for the backward pass, and the same for whole blocks, on a CPU or, in bfloat16 by autocast, on a GPU.
Ratios are judge / ours, of the fastest run of each side.

With --ranks also the correlation matrix of Barlow Twins over so many processes of a thread each: by rows, whole on
every rank, and whole by plain autograd, value and gradients; ratios are to the first of these."""
EXAMPLE = """examples, half a minute each:
  python launch/bench.py fuse --repeats 9 --json fuse.json
  python launch/bench.py fuse --ranks 2 --width 4096 --pairs 256 --batch 1 --depth 1"""


def arguments(add: Callable[..., Any]) -> None:
    add("--batch", type=int, default=16, metavar="B", help="images; default: %(default)s")
    add("--tokens", type=int, default=197, metavar="T", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--sets", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--bottleneck", type=int, default=64, metavar="H", help="default: %(default)s")
    add("--depth", type=int, default=2, metavar="N", help="whole blocks; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16; default: %(default)s")
    add("--repeats", type=int, default=5, metavar="N", help="in alternating order, the fastest; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--ranks", type=int, metavar="R", help="also the correlation matrix, over so many; default: without it")
    add("--width", type=int, default=4096, metavar="D", help="of that matrix; default: %(default)s")
    add("--pairs", type=int, default=256, metavar="B", help="over all ranks; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    ranks, width, pairs = (asked.pop(name) for name in ("ranks", "width", "pairs"))
    settings = fuse.FuseSettings(**asked)
    matrix = None if ranks is None else correlation.CorrelationSettings(ranks, width, pairs, settings.repeats)
    if matrix is not None:
        matrix.check()
    header = machine(settings.threads, "timm")
    findings = fuse.measure_fuse(settings, tell)
    text, numbers = fuse_table.as_text(header, settings, findings), fuse_table.as_json(header, settings, findings)
    if matrix is None:
        return text, numbers
    tell(f"the correlation matrix on {ranks} ranks")
    found = correlation.measure_correlation(matrix)
    return f"{text}\n\n{correlation.correlation_text(matrix, found)}", {
        **numbers,
        "matrix": correlation.correlation_json(matrix, found),
    }
