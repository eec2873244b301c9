"""What a piece of work asks of a GPU, by file and line: `python -m tests.gpu.count adapt --sets 8`. Needs no GPU.

adapt, fuse: a step of training (16 images on all ranks). embed: a batch of 16 images of the model of such sets. kmeans:
a pass over the rows and its update. knn: the exact graph of the rows. hierarchical, approximate: an iteration within
coarse clusters, and one through lists. balanced: what brings clusters below their bound, and the last pass before it.
scores: retrieval scores of all rows of a task, each a query.
"""

from __future__ import annotations

import argparse
import json

from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu

TRAINING, ROWS = ("adapt", "fuse", "embed"), ("kmeans", "knn", "scores")
PARTS = {"hierarchical": "fine", "approximate": "refined", "balanced": "end"}  # of methods of clustering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*TRAINING, *ROWS, *PARTS])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sets", type=int, default=8, help="of adapt, fuse and embed (default: 8)")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the ViT-S (default: 12, all of them)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default: 32; operations are the same)")
    parser.add_argument("--rows", type=int, default=16_384, help="of all others, one block (default: 16384)")
    parser.add_argument("--clusters", type=int, default=4_096, help="of clusterings (default: 4096)")
    parser.add_argument("--dim", type=int, default=384, help="of the rows (default: 384)")
    parser.add_argument("--block-rows", type=int, help="rows of a block (default: 16384, of scores 4096)")
    parser.add_argument("--logged", action="store_true", help="a step with most waits, not one with fewest")
    parser.add_argument("--more", nargs="*", default=[], metavar="KEY=JSON", help="settings of adapt or fuse")
    args = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    module, given = "workloads", {"sets": args.sets, "depth": args.depth, "image_size": args.image_size}
    if args.what not in TRAINING:
        module, given = "rows", {"num": args.rows, "dim": args.dim, "block_rows": args.block_rows or 16_384}
        given |= {"clusters": args.clusters} if args.what not in ("knn", "scores") else {}
    if args.what == "scores":
        given |= {"block_rows": args.block_rows, "tile_rows": None}
    given |= {"batch_size": 16} if args.what == "embed" else {}
    more = {key: json.loads(value) for key, _, value in (one.partition("=") for one in args.more)}
    function = args.what
    if args.what in PARTS:
        function, more = "part", {"name": args.what, "part": PARTS[args.what]}
    with PretendGpu() as gpu:
        products = args.what not in TRAINING  # which are most of the time, and change nothing that is counted
        found = gpu.run(f"tests.gpu.{module}:{function}_counts", args.ranks, products=products, **given, **more)
    which = "logged_report" if args.logged else "quiet_report"
    print(found[0].get("report") or found[0][which])


if __name__ == "__main__":
    main()
