"""What the verbs share that embed images in this process: the options of the model, and of how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS

if TYPE_CHECKING:
    from grappa_dist.retrieval.collection import Collection
    from grappa_dist.retrieval.embedding import Embedder
    from grappa_dist.retrieval.opening import OpenModel

Options = dict[str, Any]  # by name, as click gives them


def with_model(
    *, required: bool = True, weights: str = "--gallery"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that name the model of a verb; `embedder_of` reads them and those of `with_device`.

    Args:
        weights: as of `gallery_weights`.
    """

    def decorated(work: Callable[..., Any]) -> Callable[..., Any]:
        work = gallery_weights(weights)(work)
        return click.option(
            "--model",
            required=required,
            metavar="M",
            help="A run directory, an exported model, or timm:NAME or MODULE:FUNCTION with backbone.KEY=VALUE.",
        )(work)

    return decorated


def gallery_weights(older: str = "--gallery") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option of the task whose weights a model of the variant gallery uses: `gallery` among the options.

    Args:
        older: an older name of it; "" where that means something else, and the option is `gallery_weights`.
    """
    return click.option(
        *(("--gallery-weights", older, "gallery") if older else ("--gallery-weights",)),
        metavar="TASK",
        help="Of a model of the variant gallery: the task whose weights of the sets to use.",
    )


strength_option = click.option(
    "--strength",
    type=float,
    metavar="S",
    help="Of adaptation: 0 is the backbone, 1 as trained, 4 the most (default: as exported).",
)

trust_modules = click.option(
    "--trust-modules",
    is_flag=True,
    default=None,
    help="Import the module that a model from elsewhere names as its backbone; it is run.",
)


label_column_option = click.option(
    "--label-column", metavar="NAME", help="The column of a CSV, or the key in shards, that has the labels."
)
keep_option = click.option(
    "--keep", metavar="DIR", help="Keep the embeddings there; the next call embeds only what is new or changed."
)


def with_device(work: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how a verb runs its model in this process, last in its help."""
    for option in (
        click.option(
            "--decode-threads",
            type=click.IntRange(0),
            default=DECODE_THREADS,
            show_default=True,
            help="Threads that decode images.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=BATCH_SIZE,
            show_default=True,
            help="Images that are embedded at a time.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto: a GPU if there is one."
        ),
        trust_modules,
        click.option("--left-out", metavar="FILE", help="A CSV that names the images that could not be read."),
    ):
        work = option(work)
    return work


def embedder_of(options: Options, settings: Sequence[str] = ()) -> Embedder:
    """The model that the options name, opened, and how it is run.

    Args:
        settings: `backbone.key=value`, of a backbone that is named.

    Raises:
        ValueError: there is no such model or device.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.opening import open_model

    model = open_model(
        expanded(options["model"], "--model"),
        options["device"],
        gallery=options["gallery"],
        settings=settings,
        trust_modules=options["trust_modules"],
    )
    return embedder_with(options, model)


def embedder_with(options: Options, model: OpenModel) -> Embedder:
    """A model that is open, and how it is run."""
    from grappa_dist.console import Console
    from grappa_dist.retrieval.embedding import Embedder

    return Embedder(model, Console(), options["batch_size"], options["decode_threads"])


def collections_of(options: Options, settings: Sequence[str], places: Sequence[str]) -> dict[str, Collection]:
    """The images under the model that the options name and under the one that it is compared with, this one first.

    Says which images could not be read. `against` is among the options, and `keep`, where embeddings are kept.

    Raises:
        ValueError: there is no such model, or there are no images.
    """
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.collection import open_collection
    from grappa_dist.retrieval.opening import open_models

    models = open_models(
        expanded(options["model"], "--model"),
        None if options["against"] == "none" else expanded(options["against"], "--against"),
        options["device"],
        gallery=options["gallery"],
        strength=options.get("strength"),
        settings=settings,
        trust_modules=options["trust_modules"],
    )
    collections: dict[str, Collection] = {}
    for number, (called, model) in enumerate(reversed(models.items()), 1):
        embedder, folder = embedder_with(options, model), path_of(options["keep"], "--keep")
        folder = folder / ("model" if number == len(models) else "against") if folder else None
        collections[called] = open_collection(places, lambda embedder=embedder: embedder, keep=folder)  # type: ignore[misc]
    print_left_out(collections[called], options)
    return collections


def path_of(given: str | None, option: str) -> Path | None:
    """The path that an option gives, if it does."""
    from grappa_dist.config import expanded

    return Path(expanded(given, option)) if given else None


def places_of(given: Sequence[str], option: str = "--images") -> list[str]:
    """Paths as they are meant: `~` and `$NAME` stand for what they name."""
    from grappa_dist.config import expanded

    return [expanded(path, option) for path in given]


def print_left_out(collection: Collection, options: Options) -> None:
    """Says which images of a collection could not be read, and lists them where --left-out asks for it."""
    from grappa_dist.retrieval.embedding import describe_bad

    bad = [(collection.name(row), why) for row, why in collection.bad.items()]
    for line in describe_bad(bad, len(collection), list_left_out(options, bad)):
        print(line)


def list_left_out(options: Options, bad: Sequence[tuple[str, str]]) -> Path | None:
    """Writes the CSV that --left-out asks for; its path.

    Args:
        bad: names of images that could not be read, and why; without any the CSV has its columns alone.
    """
    from grappa_dist.config import expanded
    from grappa_dist.make_shards.left_out import write_rows

    if options["left_out"] is None:
        return None
    path = Path(expanded(options["left_out"], "--left-out"))
    write_rows(path, bad)
    return path
