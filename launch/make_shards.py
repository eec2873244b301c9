"""Makes WebDataset shards of labelled or unlabelled images: OUT/train and OUT/test.

python launch/make_shards.py --csv birds.csv --images birds.tar --csv food.csv --images food/ --out shards
python launch/make_shards.py --images class_folders/ --out shards
python launch/make_shards.py --images pile/ --split none --out shards
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.data.collections import CollectionConfig, make_shards


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", action="append", required=True, metavar="TAR_OR_DIR", help="may be repeated")
    parser.add_argument(
        "--csv",
        action="append",
        default=[],
        metavar="FILE",
        help="columns file, fine (label) and dataset (task); one for each --images, or none at all",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets train/ and, with a test half, test/"
    )
    parser.add_argument("--label-column", metavar="NAME", help="default: fine")
    parser.add_argument("--task-column", default="dataset", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--task", metavar="NAME", help="one task for all images; default: the column, or the folder's name"
    )
    parser.add_argument(
        "--split",
        choices=("classes", "column", "none"),
        default="classes",
        help="classes (default): the first half of each task's sorted classes, rounded up, trains; "
        "column: what the CSV's column `split` says, train or test; none: all images train, labels are optional",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="re-encode larger images to this shorter side")
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="order of the train images; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.csv and len(args.csv) != len(args.images):
        parser.error(f"{len(args.csv)} --csv but {len(args.images)} --images; expected as many, or no --csv")
    try:
        cfg = CollectionConfig(
            label_column=args.label_column,
            task_column=args.task_column,
            task=args.task,
            split=args.split,
            image_size=args.image_size,
            images_per_shard=args.images_per_shard,
            seed=args.seed,
        )
        pairs = list(zip(args.csv or [None] * len(args.images), args.images, strict=True))
        print(make_shards(pairs, args.out, cfg, tell=lambda line: print(line, file=sys.stderr, flush=True)))
    except (ValueError, OSError) as error:
        print(f"make_shards: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # leaves through the writer, which removes unfinished shards
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
