"""`grappa-dist plan`: what a run would do, without doing it."""

from __future__ import annotations

from grappa_dist.cli.verb import of_a_run, settings_of, verb
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "plan",
    examples=[
        "grappa-dist plan runs/mine adapt.epochs=4",
        "grappa-dist plan --config mine.yaml --out runs/mine",
    ],
)
@of_a_run
def command(ending: Ending, given: tuple[str, ...], config: str | None, out: str | None) -> None:
    """Shows what a run would do: its stages, what is reused, how long it would take, memory and disk.

    RUN is a run directory, whose latest settings are read. Nothing is written.
    """
    settings, root = settings_of(given, config, out)
    from grappa_dist.plan import plan

    print(printable(plan(settings, root, measured=True)))
