"""Embeds images with an adapted model, on any number of workers: per shard unit rows, keys and names of files."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout or a job's working directory, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.console import STATUSES, Ending
from grappa_dist.output import Parser, guard_output, printable


def parse() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        epilog="Runs on the Ray cluster of RAY_ADDRESS, else on a local one. Shards that were embedded before are "
        f"reused, so new ones alone take time. {STATUSES}",
    )
    parser.add_argument("--model", required=True, help="a run directory, or an exported model's")
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        help="folders of shards (see make_shards.py), tars or patterns, also s3://; folders of images, parquet, lists",
    )
    parser.add_argument("--gallery", help="of a model of the variant gallery: the task whose weights are used")
    parser.add_argument("--out", required=True, help="the folder for the embeddings")
    parser.add_argument(
        "--trust-modules",
        action="store_true",
        default=None,
        help="import the module that a model from elsewhere names as its backbone; it is run",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data.max_bad_share, embed.batch_size or of resources"
    )
    return parser.parse_intermixed_args()


def work(asked: argparse.Namespace, ending: Ending) -> None:
    from grappa_dist.config import expanded
    from grappa_dist.export import describe_embeddings, embed_images
    from grappa_dist.stages.run import run_root

    ending.log_dir = root = run_root(expanded(asked.out, "--out"), "embeddings")
    options = {"gallery": asked.gallery, "trust_modules": asked.trust_modules}
    found = embed_images(Path(expanded(asked.model, "--model")), asked.images, root, asked.overrides, **options)
    print(printable(describe_embeddings(found)))


if __name__ == "__main__":
    guard_output()
    asked, ending = parse(), Ending()
    sys.exit(ending.of(lambda: work(asked, ending)))
