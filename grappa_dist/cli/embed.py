"""`grappa-dist embed`: embeddings of images, on any number of workers."""

from __future__ import annotations

from pathlib import Path

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import gallery_weights, places_of, trust_modules
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "embed",
    examples=[
        "grappa-dist embed --model runs/mine --images photos/ --out embeddings/photos",
        "grappa-dist embed --model runs/mine --images shards/photos --out embeddings/photos resources.workers=4",
        "grappa-dist embed --model runs/mine --images photos/ --out embeddings/photos --index",
    ],
)
@words("given", "[PLACE]...")
@click.option("--model", required=True, metavar="M", help="A run directory, or an exported model's.")
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Images: a folder, parquet, a list, or shards, also s3://. May be given several times.",
)
@click.option("--out", required=True, metavar="DIR", help="The folder for the embeddings; what is in it is reused.")
@click.option("--index", is_flag=True, help="Make an index for search there as well, or bring it up to date.")
@gallery_weights()
@trust_modules
def command(
    ending: Ending, given: tuple[str, ...], model: str, images: tuple[str, ...], out: str, gallery: str | None,
    index: bool, trust_modules: bool | None,
) -> None:  # fmt: skip
    """Embeds images with an adapted model, on the Ray cluster of RAY_ADDRESS, else on a local one.

    What is no shards is made into shards once, below DIR. Shards that were embedded before are reused. Settings are
    data.max_bad_share, embed.batch_size and most of resources.
    """
    from grappa_dist.bucket import is_bucket
    from grappa_dist.config import expanded
    from grappa_dist.console import Console
    from grappa_dist.export import describe_embeddings, embed_images
    from grappa_dist.extras import require
    from grappa_dist.retrieval.index import build_index, describe_index
    from grappa_dist.stages.run import run_root

    places, settings = split_words(given)
    place = expanded(out, "--out")
    if is_bucket(place):
        raise ValueError(f"--out {place}: embeddings are written to a directory; expected one, to be copied afterwards")
    ending.log_dir = root = run_root(place, "embeddings")
    where = places_of((*images, *places))
    options = {"gallery": gallery, "trust_modules": trust_modules}
    if index:
        require("faiss", what="--index")  # before all is embedded
    folder = Path(expanded(model, "--model"))
    found = embed_images(folder, where, root, settings, **options)  # type: ignore[arg-type]
    print(printable(describe_embeddings(found)))
    if index:
        print(printable(describe_index(build_index(root, folder, Console()))))
