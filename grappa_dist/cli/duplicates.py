"""`grappa-dist duplicates`: groups of images that are nearly the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import embedder_of, list_left_out, places_of, with_model
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "duplicates",
    examples=[
        "grappa-dist duplicates --model runs/mine --images photos/ --out groups.csv",
        "grappa-dist duplicates --images embeddings/photos --threshold 0.95",
    ],
)
@words("given", "[PLACE]...")
@click.option("--threshold", type=float, default=0.98, show_default=True, help="The least cosine, in (0, 1].")
@click.option("--out", metavar="FILE", help="A CSV: group, name, cosine with the first of the group.")
@click.option(
    "--keep", metavar="DIR", help="Keep the embeddings there; the next call embeds only what is new or changed."
)
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Images: a folder, a CSV, shards; or a folder of embeddings.",
)
@with_model(required=False)
def command(
    ending: Ending, images: tuple[str, ...], given: tuple[str, ...], threshold: float, out: str | None,
    keep: str | None, **options: Any,
) -> None:  # fmt: skip
    """Lists groups of images that are nearly the same.

    Images are taken in order of their names. Each joins the group whose first image is nearest, if their cosine reaches
    the threshold, or begins a group. So whoever keeps the first of each group has for every image one that is as near
    as the threshold says. All pairs are compared. Embeddings need no --model.
    """
    from grappa_dist.config import expanded
    from grappa_dist.console import Console
    from grappa_dist.retrieval.collection import open_collection
    from grappa_dist.retrieval.duplicates import describe_groups, find_groups, write_groups
    from grappa_dist.retrieval.embedding import Embedder, describe_bad
    from grappa_dist.retrieval.opening import device_of

    more, settings = split_words(given)
    if settings and options["model"] is None:
        raise click.UsageError(f"{' '.join(settings)}: settings are for a backbone that --model names")

    def embedder() -> Embedder:
        if options["model"] is None:
            raise click.UsageError("images need a model that embeds them: --model (embeddings need none)")
        return embedder_of(options, settings)

    folder = Path(expanded(keep, "--keep")) if keep else None
    places = places_of((*images, *more))
    collection = open_collection(places, embedder, keep=folder, any_model=options["model"] is None)
    groups = find_groups(collection, threshold, device_of(options["device"]), Console())
    print(describe_groups(groups, collection, threshold))
    if out is not None:
        path = Path(expanded(out, "--out"))
        write_groups(path, groups)
        print(printable(f"groups  {path}"))
    bad = [(collection.name(row), why) for row, why in collection.bad.items()]
    for line in describe_bad(bad, len(collection), list_left_out(options, bad)):
        print(line)
