"""`bench.py fuse`: adaptors and fusion against a literal Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grappa_dist.bench import fuse, fuse_table
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against a literal Algorithm 1"
DESCRIPTION = """\
The adaptors and their fusion against a literal Algorithm 1 of the paper, once with all adapted outputs in one
tensor and once set by set: time forward and forward+backward (gradients of the input, Q and K; adaptors are frozen),
what is kept for the backward pass, and the same for whole blocks, on a CPU or, in bfloat16 by autocast, on a GPU.
Ratios are judge / ours, of the fastest run of each side."""
EXAMPLE = """example, half a minute:
  python launch/bench.py fuse --repeats 9 --json fuse.json"""


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
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    settings = fuse.FuseSettings(**asked)
    header = machine(settings.threads, "timm")
    findings = fuse.measure_fuse(settings, tell)
    return fuse_table.as_text(header, settings, findings), fuse_table.as_json(header, settings, findings)
