"""What launch/bench.py can be asked for: a module per command, with its arguments and what runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

from grappa_dist.bench.commands import adapt, assign, data, embed, evaluate, fuse, kmeans, knn, methods, pipeline
from grappa_dist.data.progress import Tell


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
