"""The images of a map: those that a finished run was tested on, with the features that it kept, or any others.

Shapes: n images, D channels of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.console import pluralize
from grappa_dist.data.loader import Images
from grappa_dist.data.open_images import is_generated
from grappa_dist.data.open_images import open_images as open_shards
from grappa_dist.data.rng import Purpose, generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.inputs import look
from grappa_dist.layout import lay_out
from grappa_dist.make_shards.progress import Log
from grappa_dist.models.spec import exported_config
from grappa_dist.output import suggestion
from grappa_dist.retrieval.collection import Collection, names_of
from grappa_dist.retrieval.images import open_images
from grappa_dist.retrieval.nearest import Rows
from grappa_dist.retrieval.sprites import Read
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import feature_rows
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.ground_truth import GroundTruth, load_ground_truth, members_of, numbered_members
from grappa_dist.stages.run import read_config
from grappa_dist.variants import BACKBONE


@dataclass(frozen=True)
class MapImages:
    """Images that can be read, and where models put them."""

    names: Sequence[str] = field(repr=False)  # (n,)
    ground_truth: GroundTruth = field(repr=False)  # task and label of each
    embeddings: Mapping[str, Rows] = field(repr=False)  # by model, (n, D) unit rows
    read: Read = field(repr=False)  # the file of an image, by its place
    notes: Sequence[str]  # sentences about what is not shown


def images_of_run(root: Path, most: int, model: str | None = None) -> MapImages:
    """The test images of a finished run (some of its training images if it had none) by its backbone and a model.

    Args:
        most: images; of more, some are drawn.
        model: as in the table of scores; by default the exported one or, where that is the backbone, the one that would
            have been exported without scores.

    Raises:
        ValueError: there is no such run or model, or it is not finished.
    """
    config, flow = flow_of(root)
    if model is None:
        model = exported_config(root)[1]["variant"]
        model = config.exported if model == BACKBONE else model
    if model not in flow.models:
        raise ValueError(
            f"{root} has no model {model!r}; it has {', '.join(flow.models)}{suggestion(model, flow.models)}"
        )
    models = dict.fromkeys((BACKBONE, model))
    if not flow.ground_truth.complete or not all(a.complete for m in models for a in flow.test_features[m]):
        raise ValueError(f"{root}: the run has not come to its scores yet; run it first")
    images, bad = flow.test, bad_rows(flow.test, flow.test_features[BACKBONE])
    rows, notes = _some(np.setdiff1d(np.arange(len(images)), bad), most)
    return MapImages(
        [images.called(row) for row in rows.tolist()],
        _of_rows(load_ground_truth(flow.ground_truth), rows),
        {m: feature_rows(images, flow.test_features[m]).take_unit(rows) for m in models},
        lambda place: next(iter(images.images([int(rows[place])]))),
        [*notes, *_bad_note(len(bad))],
    )


def flow_of(root: Path) -> tuple[Config, Flow]:
    """What a run has made; writes nothing."""
    config = read_config(root)
    store, inputs = Store(root), look(config, root)
    if inputs.missing or not is_generated(config.data, store):
        raise ValueError(f"{root}: some images of data.train and data.test are in no shard; run it first")
    train, test = open_shards(inputs.config.data, store, config.resources, write_index=False)
    return inputs.config, lay_out(inputs.config, store, train, test)


def images_of_collections(
    collections: Mapping[str, Collection], labels: Mapping[str, Mapping[str, object]], most: int
) -> MapImages:
    """The images that each of the models could embed.

    Args:
        collections: by model, all of the same images.
        labels: `task` and `label` of images, by name, of those that have some.
        most: images; of more, some are drawn.

    Raises:
        ValueError: the collections hold different images.
    """
    first, *others = collections.values()
    count, bad = len(first), {row for collection in collections.values() for row in collection.bad}
    if any(len(other) != count for other in others):
        raise ValueError(f"the models embedded {[count, *map(len, others)]} images; expected the same ones")
    rows, notes = _some(np.setdiff1d(np.arange(count), np.array(sorted(bad), dtype=np.int64)), most)
    names = [first.name(row) for row in rows.tolist()]
    return MapImages(
        names,
        numbered_members((labels.get(name, {}) for name in names), len(names))[0],
        {model: np.concatenate(collection.rows)[rows] for model, collection in collections.items()},
        lambda place: first.image(int(rows[place])),
        [*notes, *_bad_note(len(bad))],
    )


def labels_by_name(paths: Sequence[str], column: str | None, log: Log) -> dict[str, dict[str, object]]:
    """Task and label of images, by their names in a collection of the same paths; {} where they have none.

    Args:
        column: of a list, or the key of the shards' JSON members.
        log: gets a line that says why there are none.

    Raises:
        ValueError: a column is named, and there is none.
    """
    try:
        images: Images = open_images(paths, labelled=True, label_column=column)
    except ValueError as error:
        if column is not None:
            raise
        log(f"map: all in one colour, as images have no labels: {error}")
        return {}
    key = column if isinstance(images, ImageShards) else None
    return dict(zip(names_of(images), members_of(images, key, None, []), strict=True))


def _some(rows: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], list[str]]:
    """At most so many of the rows, ascending, and a sentence that says so."""
    if len(rows) <= most:
        return rows, []
    some = np.sort(generator(Purpose.MAP, len(rows)).choice(rows, most, replace=False))
    return some, [f"{most:,} of {pluralize(len(rows), 'image')} are shown, drawn by chance."]


def _of_rows(found: GroundTruth, rows: NDArray[np.int64]) -> GroundTruth:
    return replace(found, tasks=found.tasks[rows], labels=found.labels[rows])


def _bad_note(count: int) -> Iterator[str]:
    if count:
        yield f"Not shown: {pluralize(count, 'image')} that could not be read."
