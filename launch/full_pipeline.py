"""Runs everything: unlabelled images in, one adapted retrieval model, a table and a report out."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout or a job's working directory, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.console import STATUSES, Ending, print_end
from grappa_dist.output import Parser, choose_mode, guard_output, printable


def parse() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        epilog="Runs on the Ray cluster of RAY_ADDRESS, else on a local one that it starts and ends. "
        f"A second run reuses whatever is finished; a changed setting makes anew just what depends on it. {STATUSES}",
    )
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("--out", help="the run directory (default: `out` of the config, else runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the resolved config; touch nothing")
    parser.add_argument("--check", action="store_true", help="check artefacts and nodes, make nothing")
    parser.add_argument("--deep", action="store_true", help="with --check: read all bytes of all artefacts")
    parser.add_argument("--clean", action="store_true", help="list what no result of this configuration needs")
    parser.add_argument("--yes", action="store_true", help="with --clean: remove it")
    stages = ("embed", "pseudo_label", "adapt", "fuse")
    parser.add_argument("--until", choices=stages, help="end after this stage, without a report")
    parser.add_argument("--seeds", metavar="0,1,2", help="a run for each, in <out>/seed-<seed>, and a verdict over all")
    parser.add_argument("--quiet", action="store_true", help="show warnings, errors and the end only")
    parser.add_argument("--json", action="store_true", help="show an object a line on stdout, as in events.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. adapt.epochs=1")
    asked = parser.parse_intermixed_args()  # settings may stand among the options
    if asked.yes and not asked.clean:
        parser.error("--yes goes with --clean")
    if asked.seeds and (asked.dry_run or asked.check or asked.clean):
        parser.error("--seeds goes with a run; for one of its runs give --out <out>/seed-<seed> seed=<seed>")
    return asked


def work(asked: argparse.Namespace, ending: Ending) -> None:
    from grappa_dist.config import expanded, load
    from grappa_dist.stages.run import run_root

    config = load(asked.config, asked.overrides)
    choose_mode(quiet=asked.quiet, json=asked.json)
    root = run_root(expanded(asked.out, "--out") if asked.out else config.out, config.name, config.resources)
    if asked.deep and not asked.check:
        raise ValueError("--deep goes with --check: it reads all bytes of the artefacts that are there")
    if asked.dry_run:
        from grappa_dist.plan import plan

        print(printable(plan(config, root, measured=True)))
        return
    if asked.clean:
        from grappa_dist.clean import clean

        print(printable(clean(config, root, remove=asked.yes)))
        return
    from grappa_dist.pipeline import check, run

    if asked.check:
        print(printable(check(config, root, deep=asked.deep)))
        return
    ending.log_dir = root
    if asked.seeds:
        from grappa_dist.seeds import parse_seeds, run_seeds

        several = run_seeds(config, root, parse_seeds(asked.seeds), asked.until)
    found = several if asked.seeds else run(config, root, asked.until)
    print_end(found, asked.until)


if __name__ == "__main__":
    guard_output()
    asked, ending = parse(), Ending()
    sys.exit(ending.of(lambda: work(asked, ending)))
