"""`bench.py adapt`: the classifier and packed sets against plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import adapt as packing
from benchmarks import softmax
from grappa_dist.bench import last_block, step
from grappa_dist.bench.machine import machine
from grappa_dist.bench.table import aligned_header
from grappa_dist.data.progress import Tell

SECTIONS = ("softmax", "packing", "last-block", "step")
SHORT = "against materialised logits"
DESCRIPTION = """\
softmax: the classifier of step 2, its gradients and Adam, against one that materialises the logits: ours in
chunks of classes, in chunks and spread over ranks, and with sampled classes. Prints seconds of a step, the memory
that it takes beside weights, gradient and state of Adam, and all that a rank holds. packing: several adaptor sets in
one job against as many jobs one after the other, decoding included. last-block: a step of the model with the last block
for the class token alone against the whole block. step: a step of the model, its images/s and its share of the
arithmetic limit of this machine, measured in the same run. The last three run on a GPU with --device cuda, in
bfloat16."""
EXAMPLE = """example, a minute:
  python launch/bench.py adapt --classes 100000 --repeats 1 --json adapt.json

A million classes of 384 channels take some 11 GB with materialised logits. On a GPU:
  python launch/bench.py adapt --sections step --device cuda --image-size 224 --images 512 --steps 10"""


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
    add("--device", choices=("cpu", "cuda"), default="cpu", help="but of softmax; default: %(default)s")
    add("--compiled", action="store_true", help="of step, on a GPU: layers, as resources.compile=auto would")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    sections, of_packing = asked.pop("sections"), ("sets", "backbone", "image_size", "images", "device", "compiled")
    shared = {name: asked[name] for name in ("threads", "steps", "repeats")}
    packs = packing.PackingSettings(**shared, **{name: asked.pop(name) for name in of_packing})
    classes = softmax.SoftmaxSettings(**asked)
    classes.check()
    packs.check()
    header = machine(classes.threads, "deepspeed")
    texts, numbers = [aligned_header(header)], dict[str, Any](machine=header)
    of_packs: dict[str, tuple[Callable[..., Any], ...]] = {
        "packing": (packing.measure_packing, packing.packing_text, packing.packing_json),
        "last-block": (last_block.measure_last_block, last_block.last_block_text, last_block.last_block_json),
        "step": (step.measure_step, step.step_text, step.step_json),
    }
    if "softmax" in sections:
        sides = softmax.measure_softmax(classes, tell)
        texts.append(softmax.as_text(classes, sides))
        numbers["softmax"] = softmax.as_json(classes, sides)
    for name, (measure, as_text, as_json) in of_packs.items():
        if name in sections:
            found = measure(packs, tell)
            texts.append(as_text(packs, found))
            numbers[name.replace("-", "_")] = as_json(packs, found)
    return "\n\n".join(texts), numbers
