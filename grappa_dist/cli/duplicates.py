"""`grappa-dist duplicates`: images that are nearly the same, that nearly are test images, or that are far from all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import (
    Options,
    embedder_of,
    keep_option,
    places_of,
    print_left_out,
    with_device,
    with_model,
)
from grappa_dist.console import Console, Ending
from grappa_dist.output import printable

if TYPE_CHECKING:
    from grappa_dist.retrieval.collection import Collection
    from grappa_dist.retrieval.embedding import Embedder
    from grappa_dist.retrieval.odd_images import Sheet


@verb(
    "duplicates",
    examples=[
        "grappa-dist duplicates --model runs/mine --images photos/ --out groups.csv --sheet groups.html",
        "grappa-dist duplicates --images embeddings/photos --threshold 0.95 --outliers outliers.csv",
        "grappa-dist duplicates --images embeddings/train --across embeddings/test --leaks leaks.csv",
        "grappa-dist duplicates --run runs/mine --out groups.csv --leaks leaks.csv",
    ],
)
@words("given", "[PLACE]...")
@with_model(required=False)
@click.option(
    "--images",
    multiple=True,
    metavar="PLACE",
    help="Images: a folder, a CSV, shards; or a folder of embeddings. May be given several times.",
)
@click.option("--run", "run_dir", metavar="RUN", help="The images of a run, by the features of its backbone.")
@click.option(
    "--across", multiple=True, metavar="PLACE", help="Test images, as --images: which of --images are nearly those."
)
@keep_option
@click.option("--out", metavar="FILE", help="A CSV of groups: group, name, cosine with the first of the group.")
@click.option("--leaks", metavar="FILE", help="A CSV of images that nearly are test images: of --across, or of --run.")
@click.option("--outliers", metavar="FILE", help="A CSV of the images that are farthest from all others.")
@click.option("--sheet", metavar="FILE", help="A contact sheet of what is found: .html, .jpg or .png.")
@click.option(
    "--most-outliers", type=click.IntRange(1), default=100, show_default=True, help="Outliers that are listed."
)
@click.option(
    "--method",
    type=click.Choice(["auto", "exact", "lists"]),
    default="auto",
    show_default=True,
    help="exact: all pairs; lists: images are compared with those of the nearest lists, and recall is measured; auto: "
    "exact up to 100,000 images.",
)
@click.option("--threshold", type=float, default=0.98, show_default=True, help="The least cosine, in (0, 1].")
@with_device
def command(
    ending: Ending, given: tuple[str, ...], threshold: float, method: str, most_outliers: int, **options: object
) -> None:  # fmt: skip
    """Lists groups of images that are nearly the same, images that nearly are test images, and outliers.

    Images are taken in order of their names. Each joins the group whose first image is nearest, if their cosine reaches
    the threshold, or begins a group. So whoever keeps the first of each group has for every image one that is as near
    as the threshold says. Groups are left out where only --across, --leaks or --outliers is given. Embeddings and runs
    need no --model. The lists are what `grappa-dist shards --drop` and `data.exclude` read.
    """
    from grappa_dist.retrieval.duplicates import check_threshold
    from grappa_dist.retrieval.opening import device_of
    from grappa_dist.retrieval.sheet import check_sheet

    check_threshold(threshold)
    files = {name: _path(options, name) for name in ("out", "leaks", "outliers", "sheet")}
    if files["sheet"] is not None:
        check_sheet(files["sheet"])
    collection, test = _collections(options, given)
    if test is None and files["leaks"] is not None:
        raise click.UsageError("--leaks needs test images: --across PLACE, or a run that has some")
    side = "train" if options["run_dir"] is not None else ""
    wanted = _Wanted(threshold, method, most_outliers, device_of(str(options["device"])), side, files)
    sheet = _find(wanted, collection, test)
    if files["sheet"] is not None:
        print(printable(f"sheet   {files['sheet']}" if sheet.draw(files["sheet"]) else "sheet   nothing to show"))
    print_left_out(collection, options)


@dataclass(frozen=True)
class _Wanted:
    """What is looked for, how, and where it is written."""

    threshold: float
    method: Any
    most_outliers: int
    device: Any
    side: str  # that the lists are about; "": both
    files: Mapping[str, Path | None]  # by option

    def asks_for_groups(self, test: Collection | None) -> bool:
        only = test is not None or self.files["outliers"] is not None
        return self.files["out"] is not None or not only

    def tell(self, option: str, text: str) -> None:
        """Prints what was found, and where it is written."""
        print(printable(text))
        if (path := self.files[option]) is not None:
            print(printable(f"{'groups' if option == 'out' else option:<7} {path}"))


def _find(wanted: _Wanted, collection: Collection, test: Collection | None) -> Sheet:
    """Finds, prints and writes what is asked for."""
    from grappa_dist.retrieval import odd_images as lists
    from grappa_dist.retrieval.duplicates import find_groups, find_leaks
    from grappa_dist.retrieval.neighbours import graph_of, outliers_of

    console, at, device, files = Console(), wanted.threshold, wanted.device, wanted.files
    sheet, graph = lists.Sheet(collection, test=test), None
    if wanted.asks_for_groups(test):
        found = find_groups(collection, at, device, console, method=wanted.method)
        if files["out"] is not None:
            lists.write_groups(files["out"], found.groups, wanted.side)
        wanted.tell("out", lists.describe_groups(found, collection, at))
        sheet, graph = replace(sheet, groups=found.groups), found.graph
    if test is not None:
        leaks = find_leaks(collection, test, at, device, console)
        if files["leaks"] is not None:
            lists.write_leaks(files["leaks"], leaks)
        wanted.tell("leaks", lists.describe_leaks(leaks, collection, test, at))
        sheet = replace(sheet, leaks=leaks)
    if files["outliers"] is not None:
        with console.stage("outliers", "by the nearest others of each image"):
            graph = graph or graph_of(collection.rows, collection.bad, wanted.method, device, log=console.log)
            far = outliers_of(graph, wanted.most_outliers, device)
        outliers = lists.named_outliers(collection, graph, far)
        lists.write_outliers(files["outliers"], outliers, wanted.side)
        wanted.tell("outliers", lists.describe_outliers(outliers, far))
        sheet = replace(sheet, outliers=outliers)
    return sheet


def _path(options: Options, name: str) -> Path | None:
    from grappa_dist.config import expanded

    value = options[name]
    return None if value is None else Path(expanded(value, f"--{name}"))


def _collections(options: Options, given: Sequence[str]) -> tuple[Collection, Collection | None]:
    """The images, and the test images that they are compared with.

    Raises:
        click.UsageError: the words do not go together.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.collection import open_collection
    from grappa_dist.retrieval.odd_images import collections_of_run

    more, settings = split_words(given)
    places, run = [*options["images"], *more], options["run_dir"]
    if bool(run) == bool(places):
        raise click.UsageError("expected images by --images, or --run with a run directory")
    if run:
        if needless := [f"--{name}" for name in ("model", "across", "keep", "gallery") if options[name]] + settings:
            raise click.UsageError(f"{needless[0]} is for --images; a run has its images and their features")
        train, test = collections_of_run(Path(expanded(run, "--run")))
        return train, test if options["leaks"] is not None else None
    if settings and options["model"] is None:
        raise click.UsageError(f"{' '.join(settings)}: settings are for a backbone that --model names")

    @cache
    def embedder() -> Embedder:
        if options["model"] is None:
            raise click.UsageError("images need a model that embeds them: --model (embeddings need none)")
        return embedder_of(options, settings)

    keep = _path(options, "keep")
    any_model = options["model"] is None
    found = open_collection(places_of(places), embedder, keep=keep, any_model=any_model)
    if not options["across"]:
        return found, None
    return found, open_collection(places_of(options["across"], "--across"), embedder, any_model=any_model)
