"""`grappa-dist evaluate`: retrieval scores of any model on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import label_column_option, list_left_out, places_of, with_device, with_model
from grappa_dist.console import Ending

_FILES = {  # option -> what is written
    "json": "Write all figures there, with the worst queries and what was found for them.",
    "csv": "Write a line for each task and model there.",
    "csv_classes": "Write a line for each class and model there.",
    "csv_queries": "Write a line for each query and model there.",
    "page": "Write a page there, with the worst and the most changed queries as pictures; FILE ends in .html.",
}
_PLACES = ("images", "queries", "gallery", "distractors")


@verb(
    "evaluate",
    examples=[
        "grappa-dist evaluate --model runs/mine --images photos/",
        "grappa-dist evaluate --model runs/mine --images list.csv --label-column breed --page scores.html",
        "grappa-dist evaluate --model runs/mine --images list.csv --split-column split --json scores.json",
        "grappa-dist evaluate --model runs/mine --queries shots/ --gallery shop/ --distractors crawl/",
        "grappa-dist evaluate --model runs/mine --against runs/other --images shards/test",
        "grappa-dist evaluate --model timm:vit_small_patch16_224.dino --images photos/ backbone.image_size=112",
    ],
)
@words("given", "[PLACE]...")
@with_model(weights="")
@click.option(
    "--images",
    multiple=True,
    metavar="PLACE",
    help="Labelled images: class folders, a CSV, or shards. May be given several times.",
)
@click.option(
    "--queries", multiple=True, metavar="PLACE", help="With --gallery: labelled images that are queries alone."
)
@click.option(
    "--gallery", multiple=True, metavar="PLACE", help="With --queries: the labelled images that are searched."
)
@click.option(
    "--distractors",
    multiple=True,
    metavar="PLACE",
    help="Images without labels that are searched as well: never queries, never right. May be given several times.",
)
@label_column_option
@click.option(
    "--split-column",
    metavar="NAME",
    help="The column of a CSV, or the key in shards, that says query, gallery or distractor.",
)
@click.option("--at", default="1,5,10", show_default=True, metavar="K,K,...", help="k of recall, precision, mAP at k.")
@click.option(
    "--against",
    default="backbone",
    show_default=True,
    metavar="OTHER",
    help="The model to compare with, as --model; backbone: the model's own; none: nothing.",
)
@click.option("--json", metavar="FILE", help=_FILES["json"])
@click.option("--csv", metavar="FILE", help=_FILES["csv"])
@click.option("--csv-classes", metavar="FILE", help=_FILES["csv_classes"])
@click.option("--csv-queries", metavar="FILE", help=_FILES["csv_queries"])
@click.option("--page", metavar="FILE", help=_FILES["page"])
@with_device
def command(ending: Ending, given: tuple[str, ...], at: str, against: str, **options: Any) -> None:
    """Scores a model on labelled images, beside its backbone or another model.

    Every image is a query among the others of its task, unless --queries and --gallery or --split-column divide them. A
    gallery image with the bytes of a query is not searched for it. Queries with no image of their class in the gallery
    are named and not scored. Several tasks are searched in one gallery, too.

    R is the number of images of the query's class in the gallery. R-Precision is the share of them among the first R;
    MAP@R, mAP@k: the sum of the precision at each right place up to R, or k, divided by R; recall@k: whether any of the
    first k is right; precision@k: the share of the first k that is. All have a 95% bootstrap interval over queries; a
    paired permutation test says how sure the difference between the two models is.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.evaluation import evaluate
    from grappa_dist.retrieval.results import describe, write_results
    from grappa_dist.retrieval.score_page import check_page, write_page

    files = {name: options.pop(name) for name in _FILES}
    paths = {name: None if path is None else Path(expanded(path, _option(name))) for name, path in files.items()}
    if paths["page"] is not None:
        check_page(paths["page"])
    more, settings = split_words(given)
    model, left_out = expanded(options.pop("model"), "--model"), options.pop("left_out")
    options["images"] = (*options["images"], *more)
    options |= {name: places_of(options[name], _option(name)) for name in _PLACES}
    other = None if against == "none" else expanded(against, "--against")
    found = evaluate(model, against=other, depths=_depths(at), settings=settings, **options)
    write_results(
        found, paths["json"], paths["csv"], classes_path=paths["csv_classes"], queries_path=paths["csv_queries"]
    )
    if paths["page"] is not None:
        write_page(found, paths["page"])
    print(describe(found, list_left_out({"left_out": left_out}, found.bad)))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _depths(given: str) -> list[int]:
    try:
        return [int(k) for k in given.split(",")]
    except ValueError:
        raise ValueError(f"--at {given}: expected numbers with commas between, such as 1,5,10") from None
