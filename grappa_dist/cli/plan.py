"""`grappa-dist plan`: what a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path

import click

from grappa_dist.cli.run import settings_from
from grappa_dist.cli.verb import of_a_run, settings_of, split_words, verb
from grappa_dist.config import CONFIG_FILE
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "plan",
    examples=[
        "grappa-dist plan photos/",
        "grappa-dist plan runs/mine adapt.epochs=4",
        "grappa-dist plan --config mine.yaml --out runs/mine",
    ],
)
@of_a_run
@click.option("--backbone", metavar="NAME", help="As of `grappa-dist run`, for images.")
def command(ending: Ending, given: tuple[str, ...], config: str | None, out: str | None, backbone: str | None) -> None:
    """Shows what a run would do: its stages, what is reused, how long it would take, memory and disk.

    RUN is a run directory, whose latest settings are read, or images to adapt to, with the settings that
    `grappa-dist run` would choose. Nothing is written.
    """
    places, _ = split_words(given)
    if config is None and places and not (Path(places[0]).expanduser() / CONFIG_FILE).exists():
        settings, root = settings_from(given, None, out, backbone=backbone)
    elif backbone:
        raise click.UsageError("--backbone is for images; of a run it is the setting backbone.name=NAME")
    else:
        settings, root = settings_of(given, config, out)
    from grappa_dist.plan import plan

    print(printable(plan(settings, root, measured=True)))
