"""Search: the images of a collection that look most like a query; printed, and drawn on a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from grappa_dist.output import printable_line
from grappa_dist.retrieval.collection import Collection, open_collection
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.images import open_images
from grappa_dist.retrieval.nearest import Found, Rows, nearest
from grappa_dist.retrieval.sheet import Strip, Tile, check_sheet, draw_sheet, thumbnail

Find = Callable[[Rows, int], Found]  # queries (q, D) and k -> the nearest rows of a collection


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
    row: int  # of the query, in the collection of all queries
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Searched:
    """What was found for each query that could be read."""

    answers: list[Answer]
    asked: Collection  # the queries
    unreadable: list[tuple[str, str]]  # queries, and why they cannot be read


def search(
    queries: Sequence[str], collection: Collection, embedder: Embedder, *, k: int = 10, find: Find | None = None
) -> Searched:
    """The k nearest images of each query.

    An image that is in the collection itself finds itself. A query that cannot be read does not keep the others from
    being searched for.

    Args:
        queries: files of images.
        find: the nearest rows of the collection, by an index of it; None: by comparing all.

    Raises:
        ValueError: none of the queries can be read, or the collection has no image.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: it is the number of hits")
    if len(collection) == len(collection.bad):
        raise ValueError(f"there is nothing to search: none of {len(collection)} images could be read")
    named, unreadable = _readable(queries)
    asked = open_collection(named, lambda: embedder)
    unreadable += [(asked.name(row), why) for row, why in asked.bad.items()]
    good = [row for row in range(len(asked)) if row not in asked.bad]
    if not good:
        raise ValueError(f"the query {unreadable[0][0]} cannot be read: {unreadable[0][1]}")
    if find is None:
        find = partial(_compare_all, collection, embedder.model.device)
    found = find(np.concatenate(asked.rows)[good], k)
    answers = []
    for row, rows, cosines in zip(good, found.rows.tolist(), found.cosines.tolist(), strict=True):
        hits = tuple(Hit(*hit) for hit in zip(rows, map(collection.name, rows), cosines, strict=True))
        answers.append(Answer(asked.name(row), row, hits))
    return Searched(answers, asked, unreadable)


def _readable(queries: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The queries that name images, and the others with the reason; raises ValueError where all are others."""
    named, others = list[str](), list[tuple[str, str]]()
    for query in queries:
        try:
            open_images([query])
            named.append(query)
        except ValueError as error:
            if len(queries) == 1:
                raise
            others.append((query, str(error).removeprefix(f"{query}: ")))
    if not named:
        raise ValueError(f"the query {others[0][0]} cannot be read: {others[0][1]}")
    return named, others


def _compare_all(collection: Collection, device: torch.device, queries: Rows, k: int) -> Found:
    return nearest(queries, collection.rows, collection.bad, k, device)


def describe(searched: Searched) -> str:
    """A line for each hit, its cosine and name; below the query's name where there are several queries."""
    several, lines = len(searched.answers) + len(searched.unreadable) > 1, list[str]()
    for answer in searched.answers:
        lines += [printable_line(answer.query)] if several else []
        lines += [f"{hit.cosine:.3f}  {printable_line(hit.name)}" for hit in answer.hits]
    return "\n".join(lines)


def write_sheet(path: Path, searched: Searched, collection: Collection) -> int:
    """Draws queries with their hits, by `draw_sheet`.

    Returns:
        How many images could not be drawn, since they are no longer where they were embedded from.

    Raises:
        ValueError: the name of the file says no kind of sheet.
    """
    check_sheet(path)
    drawn: dict[int, Image.Image | None] = {}
    for hit in (hit for answer in searched.answers for hit in answer.hits):
        drawn[hit.row] = drawn[hit.row] if hit.row in drawn else thumbnail(collection.image(hit.row))
    strips = [
        Strip(
            [
                Tile(thumbnail(searched.asked.image(answer.row)), "query", answer.query, marked=True),
                *(Tile(drawn[hit.row], f"{hit.cosine:.3f}", hit.name) for hit in answer.hits),
            ]
        )
        for answer in searched.answers
    ]
    draw_sheet(path, "Search", strips)
    return sum(image is None for image in drawn.values())
