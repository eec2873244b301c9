"""Search: the images of a collection that look most like a query; printed, and drawn on a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from grappa_dist.output import printable_line
from grappa_dist.retrieval.collection import Collection, open_collection
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.nearest import nearest
from grappa_dist.retrieval.sheet import Strip, Tile, check_sheet, draw_sheet, thumbnail


@dataclass(frozen=True)
class Hit:
    """An image of the collection that was found."""

    row: int  # in the collection
    name: str
    cosine: float


@dataclass(frozen=True)
class Answer:
    """What was found for one query, nearest first."""

    query: str
    hits: tuple[Hit, ...]


def search(
    queries: Sequence[str], collection: Collection, embedder: Embedder, *, k: int = 10
) -> tuple[list[Answer], Collection]:
    """The k nearest images of each query; and the queries as a collection of their own, for a contact sheet.

    An image that is in the collection itself finds itself.

    Args:
        queries: files of images.

    Raises:
        ValueError: a query cannot be read, or the collection has no image.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: it is the number of hits")
    if len(collection) == len(collection.bad):
        raise ValueError(f"there is nothing to search: none of {len(collection)} images could be read")
    asked = open_collection(queries, lambda: embedder)
    for row, why in asked.bad.items():
        raise ValueError(f"the query {asked.name(row)} cannot be read: {why}")
    found = nearest(np.concatenate(asked.rows), collection.rows, collection.bad, k, embedder.model.device)
    answers = []
    for number in range(len(asked)):
        pairs = zip(found.rows[number].tolist(), found.cosines[number].tolist(), strict=True)
        hits = tuple(Hit(row, collection.name(row), cosine) for row, cosine in pairs)
        answers.append(Answer(asked.name(number), hits))
    return answers, asked


def describe(answers: Sequence[Answer]) -> str:
    """A line for each hit, its cosine and name; below the query's name where there are several."""
    lines = []
    for answer in answers:
        lines += [printable_line(answer.query)] if len(answers) > 1 else []
        lines += [f"{hit.cosine:.3f}  {printable_line(hit.name)}" for hit in answer.hits]
    return "\n".join(lines)


def write_sheet(path: Path, answers: Sequence[Answer], collection: Collection, asked: Collection) -> int:
    """Draws queries with their hits, by `draw_sheet`.

    Returns:
        How many images could not be drawn, since they are no longer where they were embedded from.

    Raises:
        ValueError: the name of the file says no kind of sheet.
    """
    check_sheet(path)
    drawn: dict[int, Image.Image | None] = {}
    for hit in (hit for answer in answers for hit in answer.hits):
        drawn[hit.row] = drawn[hit.row] if hit.row in drawn else thumbnail(collection.image(hit.row))
    strips = [
        Strip(
            [
                Tile(thumbnail(asked.image(number)), "query", answer.query, marked=True),
                *(Tile(drawn[hit.row], f"{hit.cosine:.3f}", hit.name) for hit in answer.hits),
            ]
        )
        for number, answer in enumerate(answers)
    ]
    draw_sheet(path, "Search", strips)
    return sum(image is None for image in drawn.values())
