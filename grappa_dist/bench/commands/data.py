"""`bench.py data`: reading and decoding against webdataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import data
from grappa_dist.bench import data_table
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against webdataset + DataLoader"
DESCRIPTION = """\
Reading, decoding and cropping images: ours against a plain webdataset + DataLoader loop (by Pillow, and by
our own decoding) and against decoding alone, from memory. The same images, crops and number of threads or processes.
Prints images/s and ratios (ours / judge: above 1, ours is faster), for the augmented crops of training and for test
views."""
EXAMPLE = """example, half a minute:
  python launch/bench.py data --rows 512 --repeats 1 --json data.json

`images/CPU s` is what one core gives to a side, whatever else the machine does."""


def arguments(add: Callable[..., Any]) -> None:
    add("--shards", nargs="+", metavar="DIR_OR_TAR", help="real images; default: drawn ones")
    add("--rows", type=int, default=1024, metavar="N", help="drawn images; default: %(default)s")
    add("--width", type=int, default=500, metavar="PX", help="of drawn images; default: %(default)s")
    add("--height", type=int, default=375, metavar="PX", help="of drawn images; default: %(default)s")
    add("--image-size", type=int, default=224, metavar="PX", help="side of a view; default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="threads or processes of a side; default: %(default)s")
    add("--views", nargs="+", choices=(data.AUGMENTED, data.TEST), default=[data.AUGMENTED, data.TEST])
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["views"] = tuple(asked["views"])
    asked["shards"] = tuple(asked["shards"]) if asked["shards"] else None
    settings = data.DataSettings(**asked)
    header = machine(settings.threads, "pillow", "simplejpeg", "webdataset")
    findings = data.measure_data(settings, tell)
    return data_table.as_text(header, findings), data_table.as_json(header, findings)
