"""`grappa-dist export`: any model of a finished run as a folder of its own."""

from __future__ import annotations

from pathlib import Path

import click

from grappa_dist.cli.verb import verb
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "export",
    examples=[
        "grappa-dist export runs/mine",
        "grappa-dist export runs/mine --name k=128 --out models/birds",
        "grappa-dist export runs/mine --name backbone --out models/backbone",
    ],
)
@click.argument("run")
@click.option("--name", metavar="MODEL", help="As in the table of scores: a variant, k=<K> or backbone.")
@click.option("--out", metavar="DIR", help="The new folder.")
def command(ending: Ending, run: str, name: str | None, out: str | None) -> None:
    """Writes a model of a run as a folder that grappa_dist.load_model reads; without --name, lists the models.

    RUN is a run directory; it is not changed, and its own model stays as it is.
    """
    from grappa_dist.config import expanded
    from grappa_dist.run_models import export_from_run, models_of

    if (name is None) != (out is None):
        raise click.UsageError("--name and --out go together")
    root = Path(expanded(run, "RUN"))
    if name is None or out is None:
        print(printable("\n".join(models_of(root))))
        return
    print(printable(f"model   {export_from_run(root, name, Path(expanded(out, '--out')).absolute())}"))
