"""`bench.py adapt`: the classifier and packed sets against plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grappa_dist.bench import last_block, packing, softmax
from grappa_dist.bench.machine import machine
from grappa_dist.bench.table import aligned_header
from grappa_dist.data.progress import Tell

SECTIONS = ("softmax", "packing", "last-block")
SHORT = "against materialised logits"
DESCRIPTION = """\
softmax: the classifier of step 2, its gradients and Adam, against one that materialises the logits: ours in
chunks of classes, in chunks and spread over ranks, and with sampled classes. Prints seconds of a step and the memory
that it takes beside weights, gradient and state of Adam. packing: several adaptor sets in one job against as many jobs
one after the other, decoding included. last-block: a step of the model with the last block for the class token alone
against the whole block."""
EXAMPLE = """example, a minute:
  python launch/bench.py adapt --classes 100000 --repeats 1 --json adapt.json

A million classes of 384 channels take some 11 GB with materialised logits."""


def arguments(add: Callable[..., Any]) -> None:
    add("--classes", type=int, default=1_000_000, metavar="K", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    add("--sampled", type=float, default=0.1, metavar="SHARE", help="of the classes; default: %(default)s")
    add("--ranks", type=int, default=2, metavar="N", help="that share the classes; 1: leave out; default: 2")
    add("--threads", type=int, default=2, metavar="N", help="of a side, all ranks together; default: %(default)s")
    add("--steps", type=int, default=2, metavar="N", help="timed ones of a run; default: %(default)s")
    add("--repeats", type=int, default=2, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    add("--sets", type=int, default=8, metavar="N", help="adaptor sets, but of softmax; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="TIMM", help="but of softmax; default: %(default)s")
    add("--image-size", type=int, default=96, metavar="PX", help="but of softmax: side; default: %(default)s")
    add("--images", type=int, default=32, metavar="N", help="but of softmax: of a step; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    sections, of_packing = asked.pop("sections"), ("sets", "backbone", "image_size", "images")
    shared = {name: asked[name] for name in ("threads", "steps", "repeats")}
    packs = packing.PackingSettings(**shared, **{name: asked.pop(name) for name in of_packing})
    classes = softmax.SoftmaxSettings(**asked)
    classes.check()
    packs.check()
    header = machine(classes.threads, "deepspeed")
    texts, numbers = [aligned_header(header)], dict[str, Any](machine=header)
    if "softmax" in sections:
        sides = softmax.measure_softmax(classes, tell)
        texts.append(softmax.as_text(classes, sides))
        numbers["softmax"] = softmax.as_json(classes, sides)
    if "packing" in sections:
        found = packing.measure_packing(packs, tell)
        texts.append(packing.as_text(packs, found))
        numbers["packing"] = packing.as_json(packs, found)
    if "last-block" in sections:
        steps = last_block.measure_last_block(packs, tell)
        texts.append(last_block.as_text(packs, steps))
        numbers["last_block"] = last_block.as_json(packs, steps)
    return "\n\n".join(texts), numbers
