"""`grappa-dist search`: the images that look most like a query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import embedder_of, list_left_out, places_of, with_model
from grappa_dist.console import Console, Ending, pluralize
from grappa_dist.output import printable


@verb(
    "search",
    examples=[
        "grappa-dist search --model runs/mine --images photos/ query.jpg",
        "grappa-dist search --model runs/mine --images photos/ --keep embeddings/photos query.jpg",
        "grappa-dist search --model runs/mine --images embeddings/photos --out sheet.html a.jpg b.jpg",
    ],
)
@words("given", "QUERY...")
@click.option("-k", "hits", type=click.IntRange(1), default=10, show_default=True, help="How many hits.")
@click.option("--out", metavar="FILE", help="A contact sheet: a page (.html) or a picture (.jpg, .png).")
@click.option(
    "--keep", metavar="DIR", help="Keep the embeddings there; the next search embeds only what is new or changed."
)
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Images: a folder, a CSV, shards; or a folder of embeddings. May be given several times.",
)
@with_model()
def command(
    ending: Ending, given: tuple[str, ...], images: tuple[str, ...], hits: int, out: str | None, keep: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Prints the images that look most like each QUERY: cosine and name, nearest first.

    Search is exact. Images of a folder are embedded first, in this process.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.collection import open_collection
    from grappa_dist.retrieval.embedding import describe_bad
    from grappa_dist.retrieval.search import describe, search, write_sheet
    from grappa_dist.retrieval.sheet import check_sheet

    queries, settings = split_words(given)
    if not queries:
        raise click.UsageError("missing QUERY: the image that is searched for")
    sheet = Path(expanded(out, "--out")) if out else None
    if sheet is not None:
        check_sheet(sheet)
    asked_for = places_of(queries, "QUERY")
    if missing := [query for query in asked_for if not Path(query).exists()]:
        raise ValueError(f"QUERY {missing[0]}: does not exist; expected an image")
    embedder = embedder_of(options, settings)
    folder = Path(expanded(keep, "--keep")) if keep else None
    collection = open_collection(places_of(images), lambda: embedder, keep=folder)
    answers, asked = search(asked_for, collection, embedder, k=hits)
    print(describe(answers))
    bad = [(collection.name(row), why) for row, why in collection.bad.items()]
    for line in describe_bad(bad, len(collection), list_left_out(options, bad)):
        print(line)
    if sheet is not None:
        lost = write_sheet(sheet, answers, collection, asked)
        print(printable(f"sheet  {sheet}"))
        if lost:
            Console().log(f"warning: {pluralize(lost, 'image')} of the sheet not found where they were embedded from")
