"""`grappa-dist tables`: the paper's tables with the scores of a run, and what the data sets for them lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grappa_dist.cli.verb import verb
from grappa_dist.console import STATUSES, Ending
from grappa_dist.output import printable

if TYPE_CHECKING:
    from grappa_dist.report.paper_tables import Comparison

SUFFIXES = (".md", ".csv", ".html")


@verb(
    "tables",
    examples=[
        "grappa-dist tables runs/mrt",
        "grappa-dist tables runs/mrt --table 2 --out table2.md --out table2.csv",
        "grappa-dist tables --check datasets/",
    ],
    statuses=f"{STATUSES} With --check: 0 where all is there, 1 where something is missing.",
)
@click.argument("run", required=False)
@click.option("--table", "numbers", multiple=True, type=click.IntRange(2, 5), help="2, 3, 4 or 5; default: all.")
@click.option(
    "--out", multiple=True, metavar="FILE", help=f"Write it there, as its suffix says: {', '.join(SUFFIXES)}."
)
@click.option("--published", metavar="FILE", help="Published figures, in place of the package's.")
@click.option(
    "--check", "root", metavar="DATASETS", help="Name what the folders of the data sets lack, and its source."
)
@click.option("--list", "list_path", metavar="FILE", help="With --check: a CSV of every file that is missing.")
def command(
    ending: Ending,
    run: str | None,
    numbers: tuple[int, ...],
    out: tuple[str, ...],
    published: str | None,
    root: str | None,
    list_path: str | None,
) -> int:
    """Prints the paper's tables with the scores of a run beside the published figures.

    RUN is a run directory, a folder of runs of several seeds, or a metrics.json. configs/mrt_tables.yaml has all rows.
    """
    from grappa_dist.config import expanded

    if (run is None) == (root is None):
        raise click.UsageError("expected a RUN, or --check DATASETS")
    if root is not None:
        if out or published:
            raise click.UsageError("--out and --published belong to a RUN, not to --check")
        return _check(Path(expanded(root, "--check")), numbers, list_path)
    if list_path is not None:
        raise click.UsageError("--list belongs to --check")
    from grappa_dist.report.paper_tables import PUBLISHED, as_text, compare, read_published, read_run

    paths = [Path(expanded(path, "--out")) for path in out]
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise click.UsageError(f"--out {path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    figures = read_published(Path(expanded(published, "--published")) if published else PUBLISHED)
    place = Path(expanded(str(run), "RUN"))
    scores = read_run(place)
    found = [compare(number, figures, scores) for number in sorted(set(numbers)) or figures.tables]
    for path in paths:
        _write(path, found, place.name or "run")
    print(printable("\n\n\n".join(map(as_text, found))))
    return 0


def _write(path: Path, found: list[Comparison], name: str) -> None:
    from grappa_dist.files import write_utf8
    from grappa_dist.report.paper_tables import as_csv, as_html, as_markdown

    made: dict[str, Callable[[], str]] = {
        ".md": lambda: "\n".join(map(as_markdown, found)),
        ".csv": lambda: as_csv(found),
        ".html": lambda: as_html(found, f"{name}: the paper's tables"),
    }
    write_utf8(path, made[path.suffix]())


def _check(root: Path, numbers: tuple[int, ...], list_path: str | None) -> int:
    """Prints what the data sets lack; whether that is anything."""
    from grappa_dist.config import expanded
    from grappa_dist.make_shards.benchmark_check import check, describe, write_missing

    parts = [part for part, of in (("mrt", {2, 3, 5}), ("zeroshot", {4})) if not numbers or of & set(numbers)]
    found = check(root, parts)
    if list_path is not None:
        write_missing(Path(expanded(list_path, "--list")), found)
    print(printable("\n".join(describe(found))))
    return 0 if all(one.complete for one in found) else 1
