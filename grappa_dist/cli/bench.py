"""`grappa-dist bench`: how fast this machine decodes, embeds, trains and clusters."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.console import Ending
from grappa_dist.output import printable


@verb(
    "bench",
    examples=[
        "grappa-dist bench",
        "grappa-dist bench photos/ --backbone timm:vit_base_patch16_224 resources.cpus_per_worker=2",
        "grappa-dist bench --json",
    ],
)
@words("given", "[IMAGES]...")
@click.option("--backbone", default="timm:vit_small_patch16_224", show_default=True, metavar="NAME")
@click.option("--sets", type=click.IntRange(1), default=2, show_default=True, help="Adaptor sets of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(ending: Ending, given: tuple[str, ...], backbone: str, sets: int, as_json: bool) -> None:
    """Measures this machine in some fifteen seconds, with random weights: nothing is downloaded or written.

    Some of IMAGES (folders, lists or shards) are decoded; without any, noise of the backbone's size. Comparisons with
    webdataset and faiss are not installed: they are launch/bench.py of a checkout.
    """
    from grappa_dist.bench import bench
    from grappa_dist.config import expanded

    places, settings = split_words(given)
    found = bench(backbone, [expanded(place, "IMAGES") for place in places], settings, sets=sets)
    print(printable(json.dumps(asdict(found), indent=1) if as_json else found.text()))
