"""What a step or a block asks of a GPU, by file and line: `python -m tests.gpu.count adapt --sets 8`. Needs no GPU."""

from __future__ import annotations

import argparse
import json

from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["adapt"])
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the ViT-S (default: 12, all of them)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default: 32; FLOPs depend on it)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="settings of adapt or fuse")
    parser.add_argument("--logged", action="store_true", help="the step with most waits, not the one with fewest")
    args = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    settings = {key: json.loads(value) for key, _, value in (one.partition("=") for one in args.set)}
    with PretendGpu() as gpu:
        shape = {"sets": args.sets, "depth": args.depth, "image_size": args.image_size}
        found = gpu.run(f"tests.gpu.workloads:{args.what}_counts", args.ranks, **shape, **settings)
    print(found[0]["logged_report" if args.logged else "quiet_report"])


if __name__ == "__main__":
    main()
