"""`grappa-dist status`: how far a run is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from grappa_dist.cli.verb import verb
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "status",
    examples=["grappa-dist status runs/mine", "grappa-dist status --follow runs/mine"],
    statuses="Exit status: 0 whatever the run's state is, 2 for a folder that is no run directory.",
)
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print an object a line instead of text.")
@click.option("--follow", is_flag=True, help="Look again every 2 s until the run ends.")
def command(ending: Ending, run: str, as_json: bool, follow: bool) -> None:
    """Shows how far the run in the directory RUN is: stage, jobs, rates, time left, the last error, what to do next.
    Of several seeds, each is shown.

    It reads the run's files alone and writes none, so it may be called at any time, also on another machine that
    shares the directory.
    """
    from grappa_dist import status
    from grappa_dist.bucket import folder_of, is_bucket
    from grappa_dist.config import expanded

    place = expanded(run, "RUN")
    root = folder_of(place) if is_bucket(place) else Path(place).absolute()
    show, between = (status.status_json, "\n") if as_json else (status.describe_status, "\n\n")
    looks = status.follow(root) if follow else [[status.status(run) for run in status.runs_in(root)]]
    for text in _changes(between.join(map(show, found)) for found in looks):
        print(printable(text), flush=True)


def _changes(texts: Iterator[str]) -> Iterator[str]:
    """The texts that are not the one before."""
    before = ""
    for text in texts:
        if text != before:
            yield text
        before = text
