"""`grappa-dist check`: the artefacts of a run, and the nodes that it would run on."""

from __future__ import annotations

import click

from grappa_dist.cli.verb import of_a_run, settings_of, verb
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "check",
    examples=[
        "grappa-dist check runs/mine",
        "grappa-dist check runs/mine --deep",
        "grappa-dist check --config mine.yaml --out runs/mine resources.workers=8",
    ],
)
@of_a_run
@click.option("--deep", is_flag=True, help="Read all bytes of all artefacts.")
def command(ending: Ending, given: tuple[str, ...], config: str | None, out: str | None, deep: bool) -> None:
    """Checks the artefacts of a run, and whether every node can take part. Makes nothing.

    RUN is a run directory, whose latest settings are read.
    """
    settings, root = settings_of(given, config, out)
    from grappa_dist.pipeline import check

    print(printable(check(settings, root, deep=deep)))
