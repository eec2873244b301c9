"""`grappa-dist evaluate`: retrieval scores of any model on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import (
    label_column_option,
    list_left_out,
    places_of,
    strength_option,
    with_device,
    with_model,
)
from grappa_dist.console import Ending

_FILES = {  # option -> what is written
    "json": "Write all figures there, with the worst queries and what was found for them.",
    "csv": "Write a line for each task and model there.",
    "csv_classes": "Write a line for each class and model there.",
    "csv_queries": "Write a line for each query and model there.",
    "page": "Write a page there, with the worst and the most changed queries as pictures; FILE ends in .html.",
}
_PLACES = ("images", "queries", "gallery", "distractors")
_DEPTHS = "1,5,10"


@verb(
    "evaluate",
    examples=[
        "grappa-dist evaluate --model runs/mine --images photos/",
        "grappa-dist evaluate --model runs/mine --images list.csv --label-column breed --page scores.html",
        "grappa-dist evaluate --model runs/mine --images list.csv --split-column split --json scores.json",
        "grappa-dist evaluate --model runs/mine --queries shots/ --gallery shop/ --distractors crawl/",
        "grappa-dist evaluate --model runs/mine --against runs/other --images shards/test",
        "grappa-dist evaluate --model runs/mine --strength 0.5 --against runs/mine --images photos/",
        "grappa-dist evaluate --model timm:vit_small_patch16_224.dino --images photos/ backbone.image_size=112",
        "grappa-dist evaluate --model runs/mine --label 200",
        "grappa-dist evaluate --model runs/mine --images photos/ --label 200 --answers answers.jsonl",
    ],
)
@words("given", "[PLACE]...")
@with_model(weights="")
@strength_option
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
@click.option("--at", default=_DEPTHS, show_default=True, metavar="K,K,...", help="k of recall, precision, mAP at k.")
@click.option(
    "--against",
    default="backbone",
    show_default=True,
    metavar="OTHER",
    help="The model to compare with, as --model; backbone: the model's own; none: nothing.",
)
@click.option(
    "--label",
    type=click.IntRange(2, 100_000),
    metavar="N",
    help="Without labels: ask so many questions on a page of this machine; --at K takes one k (default: 5).",
)
@click.option("--answers", default="answers.jsonl", show_default=True, metavar="FILE", help="With --label: keeps them.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="With --label; 0: any that is free."
)
@click.option("--json", metavar="FILE", help=_FILES["json"])
@click.option("--csv", metavar="FILE", help=_FILES["csv"])
@click.option("--csv-classes", metavar="FILE", help=_FILES["csv_classes"])
@click.option("--csv-queries", metavar="FILE", help=_FILES["csv_queries"])
@click.option("--page", metavar="FILE", help=_FILES["page"])
@with_device
def command(
    ending: Ending, given: tuple[str, ...], at: str, against: str, label: int | None, answers: str, port: int,
    **options: Any,
) -> None:  # fmt: skip
    """Scores a model on labelled images, beside its backbone or another model.

    Every image is a query among the others of its task, unless --queries and --gallery or --split-column divide them. A
    gallery image with the bytes of a query is not searched for it. Queries with no image of their class in the gallery
    are named and not scored. Several tasks are searched in one gallery, too.

    R is the number of images of the query's class in the gallery. R-Precision is the share of them among the first R;
    MAP@R, mAP@k: the sum of the precision at each right place up to R, or k, divided by R; recall@k: whether any of the
    first k is right; precision@k: the share of the first k that is. All have a 95% bootstrap interval over queries; a
    paired permutation test says how sure the difference between the two models is.

    --label N needs no labels: a page asks whether two images show the same, about N pairs that tell the two models
    apart, and the answers give the precision at k of both, the difference and its interval. Without --images it takes
    the test images of the run, or some of its training images. Answers are kept at once; the next call goes on.
    """
    from grappa_dist.config import expanded

    files = {name: options.pop(name) for name in _FILES}
    paths = {name: None if path is None else Path(expanded(path, _option(name))) for name, path in files.items()}
    more, settings = split_words(given)
    options |= {"images": (*options["images"], *more), "against": against}
    if label is None:
        _score(_depths(at), options, settings, paths)
        return
    from grappa_dist.cli.label import ask

    depths = None if at == _DEPTHS else _depths(at)
    ask(options | {**paths, "at": depths, "label": label, "answers": answers, "port": port}, settings)


def _score(depths: list[int], options: dict[str, Any], settings: list[str], paths: dict[str, Path | None]) -> None:
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.evaluation import evaluate
    from grappa_dist.retrieval.results import describe, write_results
    from grappa_dist.retrieval.score_page import check_page, write_page

    if paths["page"] is not None:
        check_page(paths["page"])
    model, against = expanded(options.pop("model"), "--model"), options.pop("against")
    left_out = options.pop("left_out")
    options |= {name: places_of(options[name], _option(name)) for name in _PLACES}
    other = None if against == "none" else expanded(against, "--against")
    found = evaluate(model, against=other, depths=depths, settings=settings, **options)
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
