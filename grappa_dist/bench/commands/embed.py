"""`bench.py embed`: embedding images against a plain timm + DataLoader loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import embed
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against a timm + DataLoader loop"
DESCRIPTION = """\
Embedding images with a frozen ViT of timm, reading and decoding included: ours against a plain loop of timm, webdataset
and DataLoader, and against the forward pass alone, on images that are in memory. Prints images/s and ratios (ours /
judge: above 1, ours is faster), the share of the machine's arithmetic limit, and how alike the features are."""
EXAMPLE = """example, half a minute:
  python launch/bench.py embed --rows 128 --backbone vit_tiny_patch16_224"""


def arguments(add: Callable[..., Any]) -> None:
    add("--shards", nargs="+", metavar="DIR_OR_TAR", help="real images, all of which decode; default: drawn ones")
    add("--rows", type=int, default=512, metavar="N", help="drawn images; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="NAME", help="of timm; default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of a side; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["shards"] = tuple(asked["shards"]) if asked["shards"] else None
    settings = embed.EmbedSettings(**asked)
    header = machine(settings.threads, "pillow", "simplejpeg", "webdataset", "timm")
    found = embed.measure_embed(settings, tell)
    return embed.as_text(header, settings, found), embed.as_json(header, settings, found)
