"""Measures what the documentation claims about speed: ratios against baselines, from one run on one machine.

python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --threads 2
python launch/bench.py data --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from benchmarks import adapt, assign, data, embed, evaluate, fuse, kmeans, knn, methods, pipeline
from benchmarks.harness import OneLineParser
from grappa_dist.files import write_json
from grappa_dist.make_shards.building import Tell


class Command(Protocol):
    SHORT: str
    DESCRIPTION: str
    EXAMPLE: str

    def arguments(self, add: Callable[..., Any]) -> None:
        """Adds what can be asked, by a parser's add_argument; `json`, a file for all numbers, is among it."""

    def run(self, asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
        """Measures; the findings as text and as JSON. A ValueError names the flag that is wrong."""


COMMANDS: dict[str, Command] = {
    "kmeans": kmeans,
    "methods": methods,
    "assign": assign,
    "data": data,
    "knn": knn,
    "fuse": fuse,
    "adapt": adapt,
    "embed": embed,
    "evaluate": evaluate,
    "pipeline": pipeline,
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Gives a parser every command, with its help; `command` is which one was asked for."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        texts = {"help": command.SHORT, "description": command.DESCRIPTION, "epilog": command.EXAMPLE}
        own = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)  # type: ignore[arg-type]
        command.arguments(own.add_argument)


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that is asked for; the exit status: 2 for a wrong call."""
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
