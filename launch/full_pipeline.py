"""Runs everything: unlabelled images in, one adapted retrieval model, a table and a report out."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout or a job's working directory, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG_ERROR, TERMINATED = 2, 143
STAGES = ("embed", "pseudo_label", "adapt", "fuse")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Runs on the Ray cluster of RAY_ADDRESS, else on a local one that it starts and ends. "
        "A second run reuses whatever is finished; a changed setting makes anew just what depends on it. "
        "Exit status: 0 done, 2 a setting or an input is wrong, 143 after SIGTERM with state saved.",
    )
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("--out", help="the run directory (default: `out` of the config, else runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan; touch nothing")
    parser.add_argument("--check", action="store_true", help="start the workers, check every node, end; make nothing")
    parser.add_argument("--until", choices=STAGES, help="end after this stage, without a report")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. adapt.epochs=1")
    return parser.parse_intermixed_args()  # settings may stand among the options


def main() -> int:
    from grappa_dist.observe import Terminated

    arguments = parse()
    root: Path | None = None
    try:
        from grappa_dist.config_file import load
        from grappa_dist.stages.collect import run_root

        config = load(arguments.config, arguments.overrides)
        root = run_root(arguments.out or config.out, config.name)
        if arguments.dry_run:
            from grappa_dist.plan import plan

            print(plan(config, root))
            return 0
        from grappa_dist.pipeline import check, run

        if arguments.check:
            print(check(config, root))
            return 0
        found = run(config, root, arguments.until)
    except ValueError as error:
        return _fail(error, None if arguments.dry_run or arguments.check else root, CONFIG_ERROR)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        return _fail(error, None if arguments.dry_run else root, 1)
    except Terminated:
        print("terminated; state is saved, run the same command again to go on", file=sys.stderr)
        return TERMINATED
    return _tell(found, root, arguments.until)


def _tell(found: tuple[Path, Any] | None, root: Path, until: str | None) -> int:
    from grappa_dist.report import console_table

    if found is None:
        print(f"done up to {until}; the same command without --until goes on")
        return 0
    report, rows = found
    print(console_table(rows))
    print(f"report  {report / 'report.html'}\nmodel   {root / 'model'}")
    return 0


def _fail(error: Exception, root: Path | None, status: int) -> int:
    """One line for people; the traceback goes to the run's log."""
    place = ""
    if root is not None and root.is_dir():
        log = root / "errors.log"
        with contextlib.suppress(OSError), open(log, "a") as file:
            traceback.print_exception(error, file=file)
            place = f" (traceback in {log})"
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}{place}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
