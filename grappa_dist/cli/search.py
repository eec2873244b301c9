"""`grappa-dist search`: the images that look most like a query."""

from __future__ import annotations

import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import (
    Options,
    embedder_of,
    embedder_with,
    keep_option,
    path_of,
    places_of,
    print_left_out,
    with_device,
    with_model,
)
from grappa_dist.console import Console, Ending, pluralize
from grappa_dist.output import printable, printable_line

if TYPE_CHECKING:
    from grappa_dist.retrieval.collection import Collection
    from grappa_dist.retrieval.embedding import Embedder
    from grappa_dist.retrieval.search import Find, Searched


@verb(
    "search",
    examples=[
        "grappa-dist search --index embeddings/photos query.jpg",
        "grappa-dist search --model runs/mine --images photos/ query.jpg",
        "grappa-dist search --model runs/mine --images photos/ --keep embeddings/photos query.jpg",
        "grappa-dist search --index embeddings/photos --out sheet.html --open a.jpg b.jpg",
    ],
)
@words("given", "QUERY...")
@with_model(required=False)
@click.option("--index", metavar="DIR", help="What `embed --index` made; it knows its model.")
@click.option(
    "--images",
    multiple=True,
    metavar="PLACE",
    help="Images: a folder, a CSV, shards; or a folder of embeddings. May be given several times.",
)
@keep_option
@click.option(
    "--out", "--sheet", "out", metavar="FILE", help="A contact sheet: a page (.html) or a picture (.jpg, .png)."
)
@click.option("--open", "opened", is_flag=True, help="Open the contact sheet in a browser.")
@click.option("-k", "hits", type=click.IntRange(1), default=10, show_default=True, help="How many hits.")
@with_device
def command(
    ending: Ending, given: tuple[str, ...], index: str | None, images: tuple[str, ...], hits: int, out: str | None,
    keep: str | None, opened: bool, **options: Any,
) -> None:  # fmt: skip
    """Prints the images that look most like each QUERY: cosine and name, nearest first.

    An index answers at once. Images of a folder are embedded first, in this process, and all are compared. A QUERY that
    cannot be read is named, and the others are searched for; the status is 0 unless none can be read.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.search import describe, search
    from grappa_dist.retrieval.sheet import check_sheet

    queries, settings = split_words(given)
    if not queries:
        raise click.UsageError("missing QUERY: the image that is searched for")
    sheet = path_of(out, "--out")
    if sheet is not None:
        check_sheet(sheet)
    asked_for = places_of(queries, "QUERY")
    if missing := [query for query in asked_for if not Path(query).exists()]:
        raise ValueError(f"QUERY {missing[0]}: does not exist; expected an image")
    if index is not None:
        if images or keep or settings or options["gallery"]:
            raise click.UsageError("--index has its images and its model's settings: expected no --images, --keep, "
                                   "--gallery-weights or backbone settings beside it")  # fmt: skip
        collection, embedder, find = _of_index(expanded(index, "--index"), options)
    else:
        collection, embedder = _of_images(images, keep, options, settings)
        find = None
    found = search(asked_for, collection, embedder, k=hits, find=find)
    print(describe(found))
    for query, why in found.unreadable:
        Console().log(printable(f"warning: QUERY {query} cannot be read: {printable_line(why)}"))
    if index is None or options["left_out"]:
        print_left_out(collection, options)
    if sheet is not None or opened:
        _show(sheet, found, collection, opened)


def _of_index(folder: str, options: Options) -> tuple[Collection, Embedder, Find]:
    """The images of an index, its model, and how it finds them."""
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.index import describe_exact, open_index

    index = open_index(folder)
    if index.faiss is None:
        Console().log(describe_exact())
    given = expanded(options["model"], "--model") if options["model"] else None
    model = index.open_model(given, options["device"], trust_modules=options["trust_modules"])
    return index.collection, embedder_with(options, model), index.nearest


def _of_images(
    images: tuple[str, ...], keep: str | None, options: Options, settings: list[str]
) -> tuple[Collection, Embedder]:
    from grappa_dist.retrieval.collection import open_collection

    if not images or not options["model"]:
        raise click.UsageError("expected --index DIR, or --model M and --images PLACE")
    embedder = embedder_of(options, settings)
    return open_collection(places_of(images), lambda: embedder, keep=path_of(keep, "--keep")), embedder


def _show(sheet: Path | None, found: Searched, collection: Collection, opened: bool) -> None:
    """Draws the contact sheet, in a folder for such files where none is named, and opens it where that is asked for."""
    from grappa_dist.retrieval.search import write_sheet

    sheet = sheet or Path(tempfile.mkdtemp(prefix="grappa-dist-")) / "sheet.html"
    lost = write_sheet(sheet, found, collection)
    print(printable(f"sheet  {sheet}"))
    if lost:
        Console().log(f"warning: {pluralize(lost, 'image')} of the sheet not found where they were embedded from")
    if opened and not webbrowser.open(sheet.absolute().as_uri()):
        Console().log(printable(f"warning: there is no browser here that could open {sheet}"))
