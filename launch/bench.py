"""Measures what the documentation claims about speed: ratios against judges, from one run on one machine.

python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --threads 2
python launch/bench.py data --help
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

from benchmarks.cli import COMMANDS, add_commands
from grappa_dist.bench.arguments import OneLineParser
from grappa_dist.files import write_json


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser)
    asked = vars(parser.parse_args(argv))
    path, command = asked.pop("json"), asked.pop("command")
    try:
        text, numbers = COMMANDS[command].run(asked, tell)
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
