"""`grappa-dist serve`: a page that searches by an image, under the backbone and the adapted model side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import (
    Options,
    embedder_of,
    keep_option,
    list_left_out,
    path_of,
    places_of,
    with_device,
    with_model,
)
from grappa_dist.console import Console, Ending, pluralize
from grappa_dist.output import printable_line

if TYPE_CHECKING:
    from grappa_dist.retrieval.collection import Collection
    from grappa_dist.serving.searcher import Searcher

_STATUSES = "Exit status: 0 after Ctrl-C or SIGTERM, 2 a setting or an input is wrong, 1 anything else."


@verb(
    "serve",
    examples=[
        "grappa-dist serve --model runs/mine --images photos/ --keep embeddings/served",
        "grappa-dist serve --index embeddings/backbone --index embeddings/adapted --port 0",
    ],
    statuses=_STATUSES,
)
@words("given", "")
@with_model(required=False)
@click.option(
    "--index", multiple=True, metavar="DIR", help="What `embed --index` made, by the models to compare: one or two."
)
@click.option(
    "--images",
    multiple=True,
    metavar="PLACE",
    help="Images: a folder, a CSV, shards. May be given several times.",
)
@keep_option
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where it listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--max-upload-mib", type=click.FloatRange(0.001, 1024), default=20.0, show_default=True, help="Of a file."
)
@click.option(
    "--max-megapixels", type=click.FloatRange(0.001, 64), default=40.0, show_default=True, help="Of an image."
)
@click.option("--public", is_flag=True, help="With a --host that other machines reach: that they may.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name by which browsers may call this server.")
@with_device
def command(
    ending: Ending, given: tuple[str, ...], index: tuple[str, ...], images: tuple[str, ...], keep: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Serves a page on this machine: drop an image, and see its neighbours under the backbone and the adapted model.

    Ctrl-C stops it. Images of a folder are embedded first, in this process, by both models; each --index is a column.
    """
    from grappa_dist.extras import require

    places, settings = split_words(given)
    if places:
        raise click.UsageError(f"{places[0]}: expected no more places; images are given by --images")
    if index and (images or keep or settings or options["gallery"] or len(index) > 2):
        raise click.UsageError("--index, once or twice, has its images and its model's settings: expected no --images, "
                               "--keep, --gallery-weights or backbone settings beside it")  # fmt: skip
    if not index and not (images and options["model"]):
        raise click.UsageError("expected --model M and --images PLACE, or --index DIR")
    require("starlette", "uvicorn")
    from grappa_dist.serving.app import create_app
    from grappa_dist.serving.limits import MIB, Limits
    from grappa_dist.serving.server import engine_of, hosts_of, serve, take_port, url_of

    with take_port(options["host"], options["port"], public=options["public"]) as bound:
        searcher = _of_indexes(index, options) if index else _of_images(images, keep, options, settings)
        app = create_app(
            searcher,
            engine_of(searcher, options["batch_size"]),
            limits=Limits(int(options["max_upload_mib"] * MIB), int(options["max_megapixels"] * 1e6)),
            hosts=hosts_of(options["host"], options["allow_host"]),
            threads=options["decode_threads"],
        )
        line = f"serving {_describe(searcher.columns[0].collection, options)} at {url_of(bound)}  (Ctrl-C stops)"
        serve(app, bound, lambda: print(printable_line(line), flush=True))
        print("stopped")


def _of_indexes(folders: tuple[str, ...], options: Options) -> Searcher:
    from grappa_dist.config import expanded
    from grappa_dist.serving.searcher import open_indexes

    model = expanded(options["model"], "--model") if options["model"] else None
    return open_indexes(
        places_of(folders, "--index"),
        model,
        options["device"],
        trust_modules=options["trust_modules"],
        log=Console().log,
    )


def _of_images(images: tuple[str, ...], keep: str | None, options: Options, settings: list[str]) -> Searcher:
    from grappa_dist.serving.searcher import open_columns

    return open_columns(embedder_of(options, settings), places_of(images), path_of(keep, "--keep"))


def _describe(collection: Collection, options: Options) -> str:
    """How many images there are, for the line that says where; before it, those that are left out, and warnings."""
    from grappa_dist.retrieval.embedding import describe_bad

    bad = [(collection.name(row), why) for row, why in collection.bad.items()]
    for line in describe_bad(bad, len(collection), list_left_out(options, bad)):
        print(line)
    if options["public"]:
        Console().log("warning: other machines may see these images, and no password is asked for")
    return pluralize(len(collection) - len(bad), "image")
