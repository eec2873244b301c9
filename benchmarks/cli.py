"""Measures what the documentation claims about speed: ratios to baselines, from one run on one machine.

python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --threads 2
python launch/bench.py data --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import (
    adapt,
    assign,
    criteria,
    data,
    driver,
    duplicates,
    embed,
    evaluate,
    fuse,
    gain,
    kmeans,
    knn,
    label,
    methods,
    passes,
    pipeline,
    precision,
    scale,
    serve,
)
from benchmarks.harness import Log, OneLineParser
from grappa_dist.files import write_json


class Command(Protocol):
    """A module of this folder that is a command."""

    SHORT: str
    DESCRIPTION: str
    EXAMPLE: str

    def arguments(self, add: Callable[..., Any]) -> None:
        """Adds the command's options by a parser's add_argument."""

    def run(self, options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
        """Measures; the results as text and as JSON. A ValueError names the flag that is wrong."""


COMMANDS: dict[str, Command] = {
    "kmeans": kmeans,
    "methods": methods,
    "assign": assign,
    "data": data,
    "knn": knn,
    "fuse": fuse,
    "adapt": adapt,
    "embed": embed,
    "passes": passes,
    "evaluate": evaluate,
    "pipeline": pipeline,
    "serve": serve,
    "duplicates": duplicates,
    "label": label,
    "gain": gain,
    "criteria": criteria,
    "precision": precision,
    "scale": scale,
    "driver": driver,
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds a subparser per command; `command` is the chosen one, `json` the file for its numbers."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        texts = {"help": command.SHORT, "description": command.DESCRIPTION, "epilog": command.EXAMPLE}
        own = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)  # type: ignore[arg-type]
        command.arguments(own.add_argument)
        own.add_argument("--json", type=Path, metavar="FILE", help="where to write all numbers, also of single runs")


def log_line(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 2 for a wrong call."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser)
    options = vars(parser.parse_args(argv))
    path, command = options.pop("json"), options.pop("command")
    try:
        text, numbers = COMMANDS[command].run(options, log_line)
        print(text)
        if path is not None:
            write_json(path, numbers)
    except (ValueError, OSError) as error:
        log_line(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        log_line("interrupted")
        return 130
    return 0
