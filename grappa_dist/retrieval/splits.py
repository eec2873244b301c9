"""Which images are queries, which are searched, and which only distract; their tasks and labels.

Every labelled image is a query among the others (leave-one-out), or queries and gallery are divided by a column, or
given as two inputs. A gallery image with the bytes of a query is that query, and is not searched for it; in
leave-one-out only the image itself is left out, as in a run. A distractor with the bytes of a labelled image is no
distractor.

Shapes: n labelled images, queries and gallery one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.labels import named
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import ImageShards
from grappa_dist.retrieval.images import open_images
from grappa_dist.stages.ground_truth import GroundTruth, describe_unreadable, members_of, numbered_members

SPLIT_KEY = "split"  # what images that lie in files have their value of the column under
QUERY, GALLERY, DISTRACTOR = "query", "gallery", "distractor"  # values of the column


@dataclass(frozen=True)
class Given:
    """What a caller names: `images` alone, or `queries` and `gallery`; `distractors` with either."""

    images: Sequence[str] = ()
    queries: Sequence[str] = ()
    gallery: Sequence[str] = ()
    distractors: Sequence[str] = ()


@dataclass(frozen=True)
class Joined:
    """Several inputs as one; a row id is the position in their concatenation."""

    parts: Sequence[Images]
    starts: NDArray[np.int64]

    @staticmethod
    def of(parts: Sequence[Images]) -> Joined:
        return Joined(parts, np.cumsum([0, *map(len, parts)], dtype=np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, row: int) -> tuple[Images, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - int(self.starts[number])

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        return chain.from_iterable(images.images([row]) for images, row in map(self._at, rows))

    def where(self, row: int) -> str:
        images, row = self._at(row)
        return images.where(row)

    def name(self, row: int) -> str:
        images, row = self._at(row)
        return images.name(row)

    def key(self, row: int) -> str:
        images, row = self._at(row)
        return images.key(row)

    def labels(self, row: int) -> dict[str, Any] | None:
        images, row = self._at(row)
        return images.labels(row)


@dataclass(frozen=True)
class Hashed:
    """Images whose files are hashed when they are read, so that none is read twice."""

    of: Images
    hashes: NDArray[np.uint64] = field(repr=False)  # (n,), 0 where the image was not read

    @staticmethod
    def over(images: Images) -> Hashed:
        return Hashed(images, np.zeros(len(images), np.uint64))

    def __len__(self) -> int:
        return len(self.of)

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        numbers = list(rows)
        for row, data in zip(numbers, self.of.images(numbers), strict=True):
            if not isinstance(data, BadImage):
                self.hashes[row] = xxh3_64_intdigest(data)
            yield data

    def where(self, row: int) -> str:
        return self.of.where(row)

    def name(self, row: int) -> str:
        return self.of.name(row)

    def key(self, row: int) -> str:
        return self.of.key(row)

    def labels(self, row: int) -> dict[str, Any] | None:
        return self.of.labels(row)


@dataclass(frozen=True)
class Split:
    """The images of an evaluation."""

    images: Hashed
    ground_truth: GroundTruth
    is_query: NDArray[np.bool_]  # (n,) and with a label
    is_searched: NDArray[np.bool_]  # (n,)
    leave_one_out: bool
    distractors: Images | None
    remarks: Sequence[str]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Of the images that are embedded."""
        return np.flatnonzero(self.is_query | self.is_searched)


def open_split(
    given: Given,
    *,
    label_column: str | None = None,
    split_column: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Split:
    """The images that are given: `images` may be divided by a column.

    Raises:
        ValueError: something else is given, there are no images, none has a label, or there is no query or no gallery.
    """
    _check_given(given, split_column)
    how: dict[str, Any] = {"labelled": True, "label_column": label_column, "log": log}
    parts = [
        open_images(places, **how, split_column=split_column)
        for places in (given.images, given.queries, given.gallery)
        if places
    ]
    joined = parts[0] if len(parts) == 1 else Joined.of(parts)
    unreadable = list[str]()
    members = [_members(part, label_column, split_column, unreadable) for part in parts]
    if len(parts) == 2:
        _same_task(members)
    notes = [note for of_part in members for note in of_part]
    ground_truth, remarks = numbered_members(notes, len(joined))
    if unreadable:
        remarks.append(describe_unreadable(len(unreadable), unreadable[0]))
    _refuse_no_label(parts, ground_truth, label_column)
    sides = _sides(parts, notes, split_column, remarks)
    labelled = ground_truth.labels >= 0
    known, distract = _divided(sides, labelled, parts, split_column is not None)
    if without := int((~labelled & ~distract).sum()):
        remarks.append(f"{pluralize(without, 'image')} without a label: neither query nor searched")
    others: list[Images] = [open_images(given.distractors, log=log)] if given.distractors else []
    if distract.any():
        others.append(_Some(joined, np.flatnonzero(distract)))
    alone = len(parts) == 1 and split_column is None
    distractors = None if not others else others[0] if len(others) == 1 else Joined.of(others)
    return Split(Hashed.over(joined), ground_truth, *known, alone, distractors, remarks)


def _check_given(given: Given, split_column: str | None) -> None:
    images, queries, gallery = given.images, given.queries, given.gallery
    if images and (queries or gallery):
        raise ValueError(
            "--images makes every image a query among the others; expected --images alone, or --queries and --gallery "
            "(the task whose weights a model of the variant gallery uses is named by --gallery-weights)"
        )
    if not images and bool(queries) != bool(gallery):
        missing, there = ("--gallery", "--queries") if queries else ("--queries", "--gallery")
        raise ValueError(f"{missing} is missing: {there} is given; expected both, or --images")
    if not images and not queries:
        raise ValueError("no images are given; expected --images, or --queries and --gallery")
    if split_column is not None and queries:
        raise ValueError("--split-column divides --images; --queries and --gallery are divided already")


@dataclass(frozen=True)
class _Some:
    """Some of the images of an input."""

    of: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        return self.of.images([int(self.rows[row]) for row in rows])

    def where(self, row: int) -> str:
        return self.of.where(int(self.rows[row]))

    def name(self, row: int) -> str:
        return self.of.name(int(self.rows[row]))

    def key(self, row: int) -> str:
        return self.of.key(int(self.rows[row]))

    def labels(self, row: int) -> dict[str, Any] | None:
        return self.of.labels(int(self.rows[row]))


def _members(
    images: Images, label_column: str | None, split_column: str | None, unreadable: list[str]
) -> list[dict[str, Any]]:
    """What is noted of the images, with what the column says under SPLIT_KEY."""
    of_shards = isinstance(images, ImageShards)
    key = label_column if of_shards else None  # a list's items have theirs from its column
    found = list(members_of(images, key, None, unreadable))
    if of_shards and split_column is not None:
        found = [{**member, SPLIT_KEY: member.get(split_column)} for member in found]
    return found


def _same_task(members: Sequence[list[dict[str, Any]]]) -> None:
    """Makes the only task of the queries that of the gallery, where both have one: folders are named otherwise."""
    tasks = [{named(member.get("task")).name for member in part} for part in members]
    if all(len(of_part) == 1 for of_part in tasks):
        (task,) = tasks[1]
        for part in members:
            for member in part:
                member["task"] = task


def _refuse_no_label(parts: Sequence[Images], ground_truth: GroundTruth, column: str | None) -> None:
    if (ground_truth.labels >= 0).any():
        return
    of_shards = any(isinstance(part, ImageShards) for part in parts)
    noted = [key for key in ground_truth.other_keys if column is not None or key not in ("label", "task")]
    keys = f"; their JSON members have {', '.join(noted)}" if noted and of_shards else ""
    asked = "" if column is None else f" under {column!r}"
    raise ValueError(
        f"none of {pluralize(len(ground_truth.labels), 'image')} has a label{asked}{keys}; expected class folders, or "
        "a CSV or shards with labels (--label-column names them)"
    )


def _sides(
    parts: Sequence[Images], notes: Sequence[Mapping[str, Any]], split_column: str | None, remarks: list[str]
) -> list[str]:
    """query, gallery, distractor, both or "" (left out) of every image."""
    if len(parts) == 2:
        return [QUERY] * len(parts[0]) + [GALLERY] * len(parts[1])
    if split_column is None:
        return ["both"] * len(notes)
    found = [named(member.get(SPLIT_KEY)).name or "" for member in notes]
    others = Counter(value for value in found if value not in (QUERY, GALLERY, DISTRACTOR))
    if others:
        what = ", ".join(f"{value!r:.40} ({count:,})" for value, count in others.most_common(5))
        remarks.append(
            f"{pluralize(others.total(), 'image')} left out, as {split_column!r} is none of {QUERY}, {GALLERY} and "
            f"{DISTRACTOR}: {what}"
        )
    return [value if value in (QUERY, GALLERY, DISTRACTOR) else "" for value in found]


def _divided(
    sides: Sequence[str], labelled: NDArray[np.bool_], parts: Sequence[Images], by_column: bool
) -> tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]:
    """Which images are queries and which are searched; and which distract."""
    side = np.array(sides)
    is_query, is_searched = (np.isin(side, [name, "both"]) for name in (QUERY, GALLERY))
    distract = side == DISTRACTOR
    for what, found in ((QUERY, is_query), (GALLERY, is_searched)):
        if not (found & labelled).any():
            values = ", ".join(sorted({f"{value or 'others'}" for value in sides}))
            where = f"the column has {values}; expected {QUERY} and {GALLERY}" if by_column else "expected some"
            raise ValueError(f"no image with a label is of the {what} side: {where}")
    return (is_query & labelled, is_searched & labelled), distract
