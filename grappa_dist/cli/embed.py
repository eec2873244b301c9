"""`grappa-dist embed`: embeddings of images, on any number of workers."""

from __future__ import annotations

from pathlib import Path

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import places_of
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "embed",
    examples=[
        "grappa-dist embed --model runs/mine --images photos/ --out embeddings/photos",
        "grappa-dist embed --model runs/mine --images shards/photos --out embeddings/photos resources.workers=4",
        "grappa-dist search --model runs/mine --images embeddings/photos query.jpg",
    ],
)
@words("given", "[PLACE]...")
@click.option("--out", required=True, metavar="DIR", help="The folder for the embeddings; what is in it is reused.")
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Images: a folder, parquet, a list, or shards, also s3://. May be given several times.",
)
@click.option(
    "--trust-modules",
    is_flag=True,
    default=None,
    help="Import the module that a model from elsewhere names as its backbone; it is run.",
)
@click.option("--gallery", metavar="TASK", help="Of a model of the variant gallery: whose weights to use.")
@click.option("--model", required=True, metavar="M", help="A run directory, or an exported model's.")
def command(
    ending: Ending, given: tuple[str, ...], model: str, images: tuple[str, ...], out: str, gallery: str | None,
    trust_modules: bool | None,
) -> None:  # fmt: skip
    """Embeds images with an adapted model, on the Ray cluster of RAY_ADDRESS, else on a local one.

    What is no shards is made into shards once, below DIR. Shards that were embedded before are reused. Settings are
    data.max_bad_share, embed.batch_size and most of resources.
    """
    from grappa_dist.config import expanded
    from grappa_dist.export import describe_embeddings, embed_images
    from grappa_dist.stages.run import run_root

    places, settings = split_words(given)
    ending.log_dir = root = run_root(expanded(out, "--out"), "embeddings")
    where = places_of((*images, *places))
    options = {"gallery": gallery, "trust_modules": trust_modules}
    found = embed_images(Path(expanded(model, "--model")), where, root, settings, **options)  # type: ignore[arg-type]
    print(printable(describe_embeddings(found)))
