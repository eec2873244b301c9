"""Measures what the documentation claims about speed: ratios against judges, from one run on one machine.

python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --threads 2
python launch/bench.py methods --rows 20000 --num-labels 1024
python launch/bench.py data --rows 512 --threads 2
python launch/bench.py adapt --classes 100000
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if importlib.util.find_spec("grappa_dist") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.artifacts import write_json
from grappa_dist.bench import data, data_table, methods, packing, softmax
from grappa_dist.bench.arguments import OneLineParser
from grappa_dist.bench.kmeans import DRAWN_DIM, DRAWN_ROWS, KMeansSettings, measure_kmeans
from grappa_dist.bench.machine import machine
from grappa_dist.bench.table import aligned_header, as_json, as_text

KMEANS = """k-means of ours against faiss.Kmeans and faiss.SuperKmeans: the same rows, first centroids, updates and
threads, until every row has its label. Prints seconds, and ratios (judge / ours: above 1, ours is faster); then the
time of k-means++, what more workers gain, and what one worker holds in memory. Progress goes to stderr."""

EXAMPLE = """example, a minute or two:
  python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --init both --repeats 2 --json kmeans.json

The machine should do nothing else: where `CPU s` is far below seconds x threads, a side was kept waiting, and only the
ratio of CPU seconds says something."""


METHODS = """The methods of `clustering.method` against exact k-means: time, seeding included, and what they cost in
inertia and labels, on the same drawn rows; and exact k-means with a bound on the size of clusters."""

METHODS_EXAMPLE = """example, half a minute:
  python launch/bench.py methods --rows 20000 --num-labels 1024 --probes 4 --json methods.json"""

DATA = """Reading, decoding and cropping images: ours against a plain webdataset + DataLoader loop (by Pillow, and by
our own decoding) and against decoding alone, from memory. The same images, crops and number of threads or processes.
Prints images/s and ratios (ours / judge: above 1, ours is faster), for the augmented crops of training and for test
views."""

DATA_EXAMPLE = """example, half a minute:
  python launch/bench.py data --rows 512 --repeats 1 --json data.json

`images/CPU s` is what one core gives to a side, whatever else the machine does."""

ADAPT = """softmax: the classifier of step 2, its gradients and Adam, against one that materialises the logits: ours in
chunks of classes, in chunks and spread over ranks, and with sampled classes. Prints seconds of a step and the memory
that it takes beside weights, gradient and state of Adam. packing: several adaptor sets in one job against as many jobs
one after the other, decoding included."""

ADAPT_EXAMPLE = """example, a minute:
  python launch/bench.py adapt --classes 100000 --repeats 1 --json adapt.json

A million classes of 384 channels take some 11 GB with materialised logits."""


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="kmeans|methods|data|adapt")
    kmeans_arguments(commands)
    methods_arguments(commands)
    data_arguments(commands)
    adapt_arguments(commands)
    return parser


def _command(commands: Any, name: str, short: str, long: tuple[str, str]) -> Callable[..., Any]:
    """Adds a command with its description and example; what adds arguments to it."""
    description, epilog = long
    form = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=short, description=description, epilog=epilog, formatter_class=form)
    add: Callable[..., Any] = parser.add_argument
    return add


def kmeans_arguments(commands: Any) -> None:
    add = _command(commands, "kmeans", "against faiss", (KMEANS, EXAMPLE))
    add("--rows", type=int, metavar="N", help=f"default: {DRAWN_ROWS} drawn ones, or all of --features")
    add("--dim", type=int, metavar="D", help=f"dimensions of drawn rows; default: {DRAWN_DIM}")
    add("--num-labels", type=int, nargs="+", default=[256, 4096, 16384], metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add("--workers", type=int, default=2, metavar="N", help="against one, a thread each; 1: leave out; default: 2")
    add("--scaling-labels", type=int, nargs="+", metavar="K", help="for --workers; default: the middle --num-labels")
    add("--repeats", type=int, default=1, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--init", choices=("none", "ours", "both"), default="ours", help="whose k-means++ to time; default: ours")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def methods_arguments(commands: Any) -> None:
    add = _command(commands, "methods", "shortcuts against exact k-means", (METHODS, METHODS_EXAMPLE))
    add("--rows", type=int, default=60_000, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=128, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--probes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="of lists; default: %(default)s")
    add("--sample-rows-per-cluster", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--balance", type=float, default=1.5, metavar="B", help="of one more exact run; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers")


def data_arguments(commands: Any) -> None:
    add = _command(commands, "data", "against webdataset + DataLoader", (DATA, DATA_EXAMPLE))
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


def adapt_arguments(commands: Any) -> None:
    add = _command(commands, "adapt", "against materialised logits", (ADAPT, ADAPT_EXAMPLE))
    add("--classes", type=int, default=1_000_000, metavar="K", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    add("--sampled", type=float, default=0.1, metavar="SHARE", help="of the classes; default: %(default)s")
    add("--ranks", type=int, default=2, metavar="N", help="that share the classes; 1: leave out; default: 2")
    add("--threads", type=int, default=2, metavar="N", help="of a side, all ranks together; default: %(default)s")
    add("--steps", type=int, default=2, metavar="N", help="timed ones of a run; default: %(default)s")
    add("--repeats", type=int, default=2, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--sections", nargs="+", choices=("softmax", "packing"), default=["softmax", "packing"], help="default: both")
    add("--sets", type=int, default=8, metavar="N", help="packing: adaptor sets; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="TIMM", help="packing; default: %(default)s")
    add("--image-size", type=int, default=96, metavar="PX", help="packing: side of an image; default: %(default)s")
    add("--images", type=int, default=32, metavar="N", help="packing: of a step; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run_kmeans(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    asked["num_labels"] = tuple(asked["num_labels"])
    asked["scaling_labels"] = tuple(asked["scaling_labels"]) if asked["scaling_labels"] else None
    settings = KMeansSettings(**asked)
    header = machine(settings.threads)
    findings = measure_kmeans(settings, tell)
    return as_text(header, findings), as_json(header, findings)


def run_methods(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = methods.MethodsSettings(**{**asked, "probes": tuple(asked["probes"])})
    header = machine(settings.threads)
    ways = methods.measure_methods(settings, tell)
    return methods.as_text(header, settings, ways), methods.as_json(header, settings, ways)


def run_data(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    asked["views"] = tuple(asked["views"])
    asked["shards"] = tuple(asked["shards"]) if asked["shards"] else None
    settings = data.DataSettings(**asked)
    header = machine(settings.threads, "pillow", "simplejpeg", "webdataset")
    findings = data.measure_data(settings, tell)
    return data_table.as_text(header, findings), data_table.as_json(header, findings)


def run_adapt(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
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
    return "\n\n".join(texts), numbers


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    asked = vars(arguments().parse_args(argv))
    path, command = asked.pop("json"), asked.pop("command")
    try:
        runs = {"kmeans": run_kmeans, "methods": run_methods, "data": run_data, "adapt": run_adapt}
        text, numbers = runs[command](asked)
        print(text)
        if path is not None:
            write_json(path, numbers)
    except (ValueError, OSError) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through what ends workers and removes files
    sys.exit(main())
