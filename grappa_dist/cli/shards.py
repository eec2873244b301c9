"""`grappa-dist shards`: images into shards, by the options of make_shards/cli.py, which prints its own help."""

from __future__ import annotations

import click

from grappa_dist.make_shards.cli import arguments, main, stop_on_signals

PROGRAM = "grappa-dist shards"


class _Shards(click.Command):
    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(arguments(PROGRAM).format_help())


@click.command(
    "shards", cls=_Shards, add_help_option=False, context_settings={"ignore_unknown_options": True}
)  # all words, --help among them, go to the parser
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Makes shards; the exit status."""
    stop_on_signals()
    return main(words, PROGRAM)
