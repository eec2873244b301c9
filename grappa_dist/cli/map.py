"""`grappa-dist map`: the embeddings of images as a page, backbone and adapted model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grappa_dist.cli.verb import split_words, verb, words
from grappa_dist.cli.with_model import (
    Options,
    collections_of,
    label_column_option,
    path_of,
    places_of,
    with_device,
    with_model,
)
from grappa_dist.console import Ending, pluralize
from grappa_dist.output import printable

if TYPE_CHECKING:
    from grappa_dist.retrieval.map_images import MapImages

MOST = 100_000


@verb(
    "map",
    examples=[
        "grappa-dist map runs/mine",
        "grappa-dist map --model runs/mine --images photos/ --out map.html",
        "grappa-dist map --model runs/mine --images list.csv --label-column breed --keep embeddings/map",
    ],
)
@words("given", "[RUN]")
@with_model(required=False)
@click.option(
    "--images",
    multiple=True,
    metavar="PLACE",
    help="Images: class folders or any folder, a CSV, shards. May be given several times.",
)
@label_column_option
@click.option(
    "--against",
    default="backbone",
    show_default=True,
    metavar="OTHER",
    help="With --model: the model of the first map, as --model; backbone: the model's own; none: a single map.",
)
@click.option("--name", metavar="MODEL", help="With RUN: another of its models, as in the table of scores.")
@click.option("--keep", metavar="DIR", help="With --images: keep the embeddings of both models there.")
@click.option(
    "--fiftyone", metavar="DIR", help="Also a new folder that FiftyOne reads: images, labels, embeddings, points."
)
@click.option("--most", type=click.IntRange(10, MOST), default=MOST, show_default=True, help="Images of the map.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of UMAP's random numbers.")
@click.option("--out", metavar="FILE", help="The page (default: map.html, in the directory of RUN).")
@with_device
def command(
    ending: Ending, given: tuple[str, ...], images: tuple[str, ...], out: str | None, seed: int, most: int,
    name: str | None, fiftyone: str | None, **options: object,
) -> None:  # fmt: skip
    """Draws images as points of a page, near where a model finds them alike: the backbone's map beside the adapted one.

    Colours show classes, the pointer shows the image. RUN shows the images that a finished run was tested on, and
    embeds nothing; --model embeds --images in this process.
    """
    from grappa_dist.config import expanded
    from grappa_dist.console import Console
    from grappa_dist.retrieval.fiftyone import check_new, write_fiftyone
    from grappa_dist.retrieval.map import lay_out_images
    from grappa_dist.retrieval.map_images import images_of_run
    from grappa_dist.retrieval.map_page import MapContent, write_map
    from grappa_dist.retrieval.opening import device_of

    runs, settings = split_words(given)
    _check(runs, settings, images, name, options)
    device = device_of(str(options["device"]))
    folder = path_of(fiftyone, "--fiftyone")
    if folder is not None:
        check_new(folder)
    if runs:
        root = Path(expanded(runs[0], "RUN"))
        path = Path(expanded(out, "--out")) if out else root / "map.html"
        shown = images_of_run(root, most, name)
    else:
        path, shown = Path(expanded(out or "map.html", "--out")), _embedded(options, settings, images, most)
    layouts = lay_out_images(shown.embeddings, Console(), device=device, seed=seed)
    title = f"Map of {Path(expanded(runs[0], 'RUN')).resolve().name}" if runs else f"Map of {', '.join(images)}"
    content = MapContent(title, layouts, shown.names, shown.ground_truth, shown.notes)
    written = write_map(path, content, shown.read, threads=max(1, int(str(options["decode_threads"]))))
    print(printable(f"map     {written.path}  ({written.bytes / 1e6:.1f} MB, {written.pictures:,} pictures)"))
    if folder is not None:
        print(printable(f"fiftyone  {folder}  ({pluralize(write_fiftyone(folder, shown, layouts), 'image')})"))


def _check(
    runs: Sequence[str], settings: Sequence[str], images: Sequence[str], name: str | None, options: Options
) -> None:
    """Raises click.UsageError unless the words name either a run, or a model and images."""
    if len(runs) > 1 or bool(runs) == bool(images) or bool(images) != (options["model"] is not None):
        raise click.UsageError("expected one run directory, or --model and --images")
    if runs and settings:
        raise click.UsageError(f"{' '.join(settings)}: settings are for a backbone that --model names")
    needless = [f"--{key.replace('_', '-')}" for key in ("label_column", "keep", "gallery", "left_out") if options[key]]
    if runs and needless:
        raise click.UsageError(f"{needless[0]} is for --model and --images; a run has its images and labels")
    if name is not None and not runs:
        raise click.UsageError("--name is for a run directory; --model names the model itself")


def _embedded(options: Options, settings: Sequence[str], images: Sequence[str], most: int) -> MapImages:
    from grappa_dist.console import Console
    from grappa_dist.retrieval.map_images import images_of_collections, labels_by_name

    places = places_of(images)
    collections = collections_of(options, settings, places)
    return images_of_collections(collections, labels_by_name(places, options["label_column"], Console().log), most)
