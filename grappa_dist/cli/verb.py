"""What all verbs share: how a function becomes a command, and what its words mean."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.console import STATUSES, Ending
from grappa_dist.output import suggestion

if TYPE_CHECKING:
    from grappa_dist.config import Config

_SETTING = re.compile(r"[a-z_]+(\.\w+)*=")


def verb(name: str, *, examples: Sequence[str], statuses: str = STATUSES) -> Callable[..., click.Command]:
    """Makes a function the command of a verb. It gets `ending: Ending` and, by name, what its click options say.

    Its docstring is the help, with the examples below. A number that it returns is the exit status, as is what it
    raises (see `Ending`); wrong arguments (`click.UsageError`) leave as they are.
    """

    def decorated(work: Callable[..., object]) -> click.Command:
        @functools.wraps(work)  # with the options that click has noted on it
        @click.pass_context
        def call(ctx: click.Context, /, **options: Any) -> int:
            found: object = None

            def worked() -> None:
                nonlocal found
                try:
                    found = work(ending, **options)
                except click.ClickException as error:
                    found = error

            ending = Ending()
            status = ending.of(worked)
            if isinstance(found, click.ClickException):
                raise found
            return found if status == 0 and isinstance(found, int) else status

        listed = "\n".join(f"  {line}" for line in examples)
        epilog = f"\b\nExamples:\n{listed}\n\n{statuses}"
        return click.command(name, epilog=epilog)(call)

    return decorated


class OneOf(click.Choice[str]):
    """One of several words; a misspelt one gets a suggestion."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + suggestion(str(value), self.choices)


def words(name: str, metavar: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument of a verb that takes places and settings in any order; `split_words` tells them apart."""
    return click.argument(name, nargs=-1, metavar=f"{metavar} [SECTION.KEY=VALUE]...")


def split_words(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The places (folders, files, patterns, URLs) and the settings (`section.key=value`) among the words of a command.

    A folder whose name looks like a setting is written with `./` before it.
    """
    settings = [word for word in given if _SETTING.match(word)]
    return [word for word in given if not _SETTING.match(word)], settings


def of_a_run(work: Callable[..., Any]) -> Callable[..., Any]:
    """The words and options of a verb about a run, which `settings_of` reads: RUN, or --config with --out."""
    for option in (
        click.option("--out", metavar="DIR", help="With --config: the run directory (default: as the config has it)."),
        click.option("--config", metavar="FILE", help="A YAML file of settings, in place of those of a run directory."),
        words("given", "[RUN]"),
    ):
        work = option(work)
    return work


def settings_of(given: Sequence[str], config: str | None, out: str | None) -> tuple[Config, Path]:
    """The settings that a verb about a run is to use, and the run directory.

    Raises:
        click.UsageError: neither or both of a run directory and --config are given, or several run directories.
        ValueError: there is no such run or file, or a setting is wrong.
    """
    from grappa_dist.config import expanded, load
    from grappa_dist.stages.run import placed, read_config, run_root

    places, settings = split_words(given)
    if config is not None and not places:
        found = load(config, settings)
        return found, run_root(expanded(out, "--out") if out else found.out, found.name, found.resources)
    if len(places) != 1 or config is not None or out is not None:
        raise click.UsageError("expected one run directory, or --config FILE and perhaps --out DIR")
    root = run_root(expanded(places[0], "RUN"), "")
    found = read_config(root, settings)
    return found, placed(root, found.resources)
