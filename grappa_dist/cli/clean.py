"""`grappa-dist clean`: what no current result of a run needs."""

from __future__ import annotations

import click

from grappa_dist.cli.verb import of_a_run, settings_of, verb
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb("clean", examples=["grappa-dist clean runs/mine", "grappa-dist clean runs/mine --yes"])
@of_a_run
@click.option("--yes", is_flag=True, help="Remove what is listed.")
def command(ending: Ending, given: tuple[str, ...], config: str | None, out: str | None, yes: bool) -> None:
    """Lists what a run directory holds that no result of its settings needs; --yes removes it.

    RUN is a run directory, whose latest settings are read.
    """
    settings, root = settings_of(given, config, out)
    from grappa_dist.clean import clean

    print(printable(clean(settings, root, remove=yes)))
