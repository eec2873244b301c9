"""Makes WebDataset shards of images, labelled or not: OUT/train and OUT/test. A second call goes on after a kill."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from grappa_dist.config import expanded
from grappa_dist.make_shards.benchmarks import gather
from grappa_dist.make_shards.collection import CollectionConfig, Split, Work, make_shards, write_items
from grappa_dist.make_shards.filling import WorkerDied
from grappa_dist.make_shards.planning import parse_bytes
from grappa_dist.make_shards.progress import Terminal
from grappa_dist.output import Parser, printable, unprinted, without_secrets
from grappa_dist.storage import described

EXAMPLES = (
    "--images class_folders/ --out shards",
    "--images pile/ --split none --out shards --image-size 256 --shard-bytes 500MB",
    "--csv birds.csv --images birds.tar --csv food.csv --images food/ --out shards",
    "--benchmark mrt --root datasets/ --out shards/mrt",
    "--benchmark mrt --part zeroshot --root datasets/ --out shards/zeroshot",
)


def stop_on_signals() -> None:
    """From now on a signal leaves through the writer, which keeps finished shards and removes unfinished ones."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


def main(argv: Sequence[str] | None = None, program: str = "python launch/make_shards.py") -> int:
    """Writes the shards that the arguments ask for and prints a table of them; the exit status.

    Args:
        program: how it was called, for its help.
    """
    parser = arguments(program)
    args = parser.parse_args(argv)
    _check(parser, args)
    terminal = Terminal(sys.stderr)
    try:
        print(printable(_make(args, terminal)))
    except (ValueError, OSError, WorkerDied) as error:
        terminal.log(f"make_shards: {' '.join(str(described(error)).split())}")
        return 1 if isinstance(error, WorkerDied) else 2
    except SystemExit:  # of the signals below
        terminal.log("make_shards: stopped; the same command goes on from the shards that are finished")
        raise
    if why := unprinted():
        terminal.log(f"make_shards: warning: done, but standard output could not be written: {why}")
    return 0


def _local_folder(text: str) -> Path:
    if "://" in text:
        shown = without_secrets(text)
        raise argparse.ArgumentTypeError(f"{shown}: expected a local folder; upload it once it is finished")
    return _path(text)


def _path(text: str) -> Path:
    try:
        return Path(expanded(text, "path"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments(program: str) -> argparse.ArgumentParser:
    """The options, for a program that is called in this way."""
    examples = "\n".join(f"  {program} {example}" for example in EXAMPLES)
    parser = Parser(
        prog=program.removeprefix("python launch/"),
        description=f"{__doc__}\nExamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=_local_folder, required=True, metavar="DIR", help="gets train/ and, with a test half, test/"
    )
    _add_images(parser.add_argument_group("one's own images"))
    _add_benchmark(parser.add_argument_group("a published benchmark, from the original folders of its data sets"))
    _add_shards(parser.add_argument_group("shards"))
    return parser


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--images", action="append", default=[], metavar="TAR_OR_DIR", help="may be repeated")
    group.add_argument(
        "--csv",
        action="append",
        default=[],
        metavar="FILE",
        help="columns file, fine (label) and dataset (task); one for each --images, or none at all",
    )
    group.add_argument("--label-column", metavar="NAME", help="default: fine; '' where there are no labels")
    group.add_argument("--task-column", metavar="NAME", help="default: dataset")
    group.add_argument(
        "--task", metavar="NAME", help="one task for all images; default: the column, or the folder's name"
    )
    group.add_argument(
        "--split",
        choices=get_args(Split),
        help="classes: the first half of each task's sorted classes, rounded up, trains; folders: DIR/train/CLASS/FILE "
        "trains and DIR/val or DIR/test tests; column: what the CSV's column `split` says, train or test; none: all "
        "images train, test: all test; labels are optional in both. Default: folders where there are such folders and "
        "no others, else classes",
    )


def _add_benchmark(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--benchmark", choices=("mrt",), help="the benchmark of the paper")
    group.add_argument("--root", type=_path, metavar="DIR", help="holds the data sets, up to two levels below")
    group.add_argument(
        "--part",
        choices=("mrt", "zeroshot"),
        help="mrt (default): aircraft, cars, cub, flowers, food101, products; zeroshot: dtd, eurosat, pets, test only",
    )
    group.add_argument("--only", metavar="NAME,NAME", help="some of the data sets")
    group.add_argument("--strict", action="store_true", help="refuse other counts than the expected; default: warn")


def _add_shards(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image-size", type=int, metavar="PX", help="re-encode larger images to this shorter side")
    group.add_argument(
        "--images-per-shard", type=int, metavar="N", help="default: 1000, or any number with --shard-bytes"
    )
    group.add_argument(
        "--shard-bytes",
        metavar="SIZE",
        help="such as 500MB: no tar is larger (with --image-size: about so large, from a sample of each task)",
    )
    group.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="FILE",
        help="a CSV of images to leave out, as `grappa-dist duplicates` writes it: of near-duplicates, all but the "
        "first of each group; may be repeated",
    )
    group.add_argument("--seed", type=int, default=0, help="order of the train images; default: %(default)s")
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; the shards are the same for any number; default: all CPUs, %(default)s here",
    )


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if args.benchmark:
        if args.root is None:
            parser.error("--benchmark takes --root")
        if any((args.images, args.csv, args.task, args.split, args.label_column, args.task_column)):
            parser.error("--images, --csv, --task, --split and columns are for one's own images, not for --benchmark")
    elif not args.images:
        parser.error("expected --images, or --benchmark with --root")
    elif args.root or args.only or args.strict or args.part:
        parser.error("--root, --part, --only and --strict belong to --benchmark")
    if args.csv and len(args.csv) != len(args.images):
        parser.error(f"{len(args.csv)} --csv but {len(args.images)} --images; expected as many, or no --csv")


def _make(args: argparse.Namespace, terminal: Terminal) -> str:
    """Table of what was written."""
    cfg = CollectionConfig(
        label_column=args.label_column,
        task_column=args.task_column,
        task=args.task,
        split="column" if args.benchmark else args.split,
        image_size=args.image_size,
        images_per_shard=args.images_per_shard,
        shard_bytes=None if args.shard_bytes is None else parse_bytes(args.shard_bytes),
        seed=args.seed,
        drop=tuple(expanded(path, "--drop") for path in args.drop),
    )
    work = Work(args.workers, terminal.log, terminal.renew if terminal.is_interactive else None)
    if args.benchmark:
        only = args.only.split(",") if args.only else None
        items, left_out = gather(args.root, args.part or "mrt", only, strict=args.strict, log=terminal.log)
        return write_items(items, args.out, cfg, work=work, left_out=left_out, base=args.root.absolute())
    images = [expanded(path, "--images") for path in args.images]
    csvs: list[str | None] = [expanded(path, "--csv") for path in args.csv]
    return make_shards(list(zip(csvs or [None] * len(images), images, strict=True)), args.out, cfg, work)
