"""Calls a verb in this process."""

from __future__ import annotations

from typing import NamedTuple

import click
from click.testing import CliRunner


class Called(NamedTuple):
    status: int
    out: str
    err: str


def called(command: click.Command, *args: str) -> Called:
    """What a verb printed and its status; arguments that click refuses have status 2, their message in `err`."""
    found = CliRunner().invoke(command, args, standalone_mode=False)
    if isinstance(found.exception, click.ClickException):
        return Called(found.exception.exit_code, found.stdout, f"error: {found.exception.format_message()}")
    assert found.exception is None
    return Called(found.return_value, found.stdout, found.stderr)
