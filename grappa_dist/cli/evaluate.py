"""`grappa-dist evaluate`: retrieval scores of any model on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import list_left_out, places_of, with_model
from grappa_dist.console import Ending


@verb(
    "evaluate",
    examples=[
        "grappa-dist evaluate --model runs/mine --images photos/",
        "grappa-dist evaluate --model runs/mine --images list.csv --label-column breed --json scores.json",
        "grappa-dist evaluate --model runs/mine --against runs/other --images shards/test",
        "grappa-dist evaluate --model timm:vit_small_patch16_224.dino --images photos/ backbone.image_size=112",
    ],
)
@words("given", "[PLACE]...")
@click.option("--csv", "csv_path", metavar="FILE", help="Write a line for each task and model there.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
@click.option(
    "--against",
    default="backbone",
    show_default=True,
    metavar="OTHER",
    help="The model to compare with, as --model; backbone: the model's own; none: nothing.",
)
@click.option("--label-column", metavar="NAME", help="The column of a CSV, or the key in shards, that has the labels.")
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Labelled images: class folders, a CSV, or shards. May be given several times.",
)
@with_model()
def command(
    ending: Ending, images: tuple[str, ...], given: tuple[str, ...], against: str, label_column: str | None,
    json_path: str | None, csv_path: str | None, **options: Any,
) -> None:  # fmt: skip
    """Scores a model on labelled images, beside its backbone or another model.

    Every image is a query among the others of its task: R-Precision, MAP@R and recall@1, with a 95% bootstrap interval
    over queries; a paired permutation test says how sure the difference between the two models is.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.evaluation import evaluate
    from grappa_dist.retrieval.results import describe, write_results

    paths = [None if path is None else Path(expanded(path, option)) for path, option in
             ((json_path, "--json"), (csv_path, "--csv"))]  # fmt: skip
    more, settings = split_words(given)
    model = expanded(options["model"], "--model")
    how = {name: given for name, given in options.items() if name not in ("model", "left_out")}
    other = None if against == "none" else expanded(against, "--against")
    found = evaluate(
        model, places_of((*images, *more)), against=other, label_column=label_column, settings=settings, **how
    )
    write_results(found, *paths)
    print(describe(found, list_left_out(options, found.bad)))
