"""What `grappa-dist duplicates` finds: as text, as lists that `--drop` and `data.exclude` read, on a contact sheet.

Of a run it looks at the training and the test images, by the features of the backbone that the run has kept.

Every list has the columns name, drop, side and reason (make_shards/exclusions.py) beside its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.artifacts import Artifact
from grappa_dist.checksums import load_json, map_rows
from grappa_dist.console import pluralize
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_utf8
from grappa_dist.retrieval.collection import Collection, Part, names_of
from grappa_dist.retrieval.duplicates import Group, Groups, Leak
from grappa_dist.retrieval.map_images import flow_of
from grappa_dist.retrieval.neighbours import Graph, Outliers
from grappa_dist.retrieval.sheet import Strip, Tile, draw_sheet, thumbnail
from grappa_dist.stages.bad_rows import BAD_FILE
from grappa_dist.stages.embed import ROWS_FILE
from grappa_dist.variants import BACKBONE

MOST_STRIPS, MOST_TILES = 40, 8  # of a sheet: groups, leaks; images of a group
_ROW = 8  # outliers side by side


@dataclass(frozen=True)
class Outlier:
    """An image that is far from all others: its name, its score, and the nearest other."""

    row: int
    name: str
    score: float
    nearest: str
    cosine: float


def named_outliers(collection: Collection, graph: Graph, found: Outliers) -> list[Outlier]:
    rows, nearest = graph.ids[found.places].tolist(), graph.ids[found.nearest].tolist()
    figures = zip(rows, found.scores.tolist(), nearest, found.cosines.tolist(), strict=True)
    return [
        Outlier(row, collection.name(row), score, collection.name(of), cosine) for row, score, of, cosine in figures
    ]


def describe_groups(found: Groups, collection: Collection, threshold: float) -> str:
    """How many images could go, for a terminal; and how many were missed, where not all pairs were compared."""
    compared = len(collection) - len(collection.bad)
    how = f"\nthrough lists of near images: {found.recall}" if found.recall else ""
    if not found.groups:
        none = f"no near-duplicates among {pluralize(compared, 'image')}: no two have a cosine of {threshold:g} or more"
        return none + how
    more = sum(len(group.names) - 1 for group in found.groups)
    return (
        f"{pluralize(len(found.groups), 'group')} of near-duplicates among {pluralize(compared, 'image')}; without "
        f"them, {pluralize(compared - more, 'image')} are left (cosine {threshold:g} or more){how}"
    )


def describe_leaks(leaks: Sequence[Leak], train: Collection, test: Collection, threshold: float) -> str:
    tested = len({leak.test_row for leak in leaks})
    of = pluralize(len(train) - len(train.bad), "image")
    if not leaks:
        return f"no leaks: none of {of} has a cosine of {threshold:g} or more with a test image"
    return (
        f"{len(leaks):,} of {of} nearly {'is a test image' if len(leaks) == 1 else 'are test images'}: "
        f"{tested:,} of {pluralize(len(test) - len(test.bad), 'test image')} (cosine {threshold:g} or more)"
    )


def describe_outliers(outliers: Sequence[Outlier], found: Outliers) -> str:
    if not outliers:
        return "no outliers: there are no two images to compare"
    certain = "" if found.are_certain else "; there may be others that are as far, see the recall"
    return (
        f"{pluralize(len(outliers), 'outlier')}: 1 - the mean cosine with the nearest others is "
        f"{outliers[-1].score:.3f} to {outliers[0].score:.3f}{certain}"
    )


def write_groups(path: Path, groups: Sequence[Group], side: str = "") -> None:
    """A CSV with a line for each image: its group from 1, its name, its cosine with the first, which alone stays."""
    lines = [
        (number, name, f"{cosine:.6f}", int(place > 0), side, "near-duplicate")
        for number, group in enumerate(groups, start=1)
        for place, (name, cosine) in enumerate(zip(group.names, group.cosines, strict=True))
    ]
    _write(path, ("group", "name", "cosine", "drop", "side", "reason"), lines)


def write_leaks(path: Path, leaks: Sequence[Leak]) -> None:
    """A CSV with a line for each image that trains, its nearest test image, and their cosine."""
    lines = [(leak.name, leak.test_name, f"{leak.cosine:.6f}", 1, "train", "near a test image") for leak in leaks]
    _write(path, ("name", "test_name", "cosine", "drop", "side", "reason"), lines)


def write_outliers(path: Path, outliers: Sequence[Outlier], side: str = "") -> None:
    """A CSV with a line for each image: its score, the nearest other, and their cosine."""
    lines = [(one.name, f"{one.score:.6f}", one.nearest, f"{one.cosine:.6f}", 1, side, "outlier") for one in outliers]
    _write(path, ("name", "score", "nearest", "cosine", "drop", "side", "reason"), lines)


def _write(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(lines)
    write_utf8(path, text.getvalue())


@dataclass(frozen=True)
class Sheet:
    """What a contact sheet shows."""

    collection: Collection
    groups: Sequence[Group] = ()
    test: Collection | None = None
    leaks: Sequence[Leak] = ()
    outliers: Sequence[Outlier] = ()

    def draw(self, path: Path) -> bool:
        """Draws the largest groups, the nearest leaks and the farthest outliers; whether there is any of them.

        Raises:
            ValueError: the name of the file says no kind of sheet.
        """
        strips = [*self._of_groups(), *self._of_leaks(), *self._of_outliers()]
        if strips:
            draw_sheet(path, "Duplicates and odd ones", strips)
        return bool(strips)

    def _of_groups(self) -> Iterator[Strip]:
        numbers = sorted(
            range(len(self.groups)), key=lambda i: (-len(self.groups[i].rows), -min(self.groups[i].cosines))
        )
        for place, number in enumerate(numbers[:MOST_STRIPS]):
            group = self.groups[number]
            pairs = list(zip(group.rows, group.names, group.cosines, strict=True))[:MOST_TILES]
            tiles = [
                Tile(thumbnail(self.collection.image(row)), "first" if not i else f"{cosine:.3f}", name, marked=not i)
                for i, (row, name, cosine) in enumerate(pairs)
            ]
            shown = "" if len(tiles) == len(group.rows) else f", {len(tiles)} of them shown"
            heading = f"group {number + 1}: {pluralize(len(group.rows), 'image')}{shown}"
            yield Strip(tiles, heading + self._more(place, len(self.groups), "groups, the largest first"))

    def _of_leaks(self) -> Iterator[Strip]:
        assert self.test is not None or not self.leaks
        for place, leak in enumerate(self.leaks[:MOST_STRIPS]):
            assert self.test is not None
            tiles = [
                Tile(thumbnail(self.collection.image(leak.row)), f"{leak.cosine:.3f}", leak.name),
                Tile(thumbnail(self.test.image(leak.test_row)), "tests", leak.test_name, marked=True),
            ]
            yield Strip(tiles, f"leak {place + 1}" + self._more(place, len(self.leaks), "leaks, the nearest first"))

    def _of_outliers(self) -> Iterator[Strip]:
        shown = self.outliers[: MOST_STRIPS * 2]
        for start in range(0, len(shown), _ROW):
            tiles = [
                Tile(thumbnail(self.collection.image(one.row)), f"{one.score:.3f}", one.name)
                for one in shown[start : start + _ROW]
            ]
            more = f"; {len(shown)} of {len(self.outliers)} are shown" if len(shown) < len(self.outliers) else ""
            yield Strip(tiles, f"outliers, the farthest first{more}" if not start else "")

    @staticmethod
    def _more(place: int, count: int, what: str) -> str:
        """On the first strip of a kind, how many of how many there are."""
        return f" (the first {MOST_STRIPS} of {count:,} {what}, are shown)" if not place and count > MOST_STRIPS else ""


def collections_of_run(root: Path) -> tuple[Collection, Collection | None]:
    """The images that train, and those that test; None where there are none.

    Raises:
        ValueError: there is no such run, or it has not embedded them yet.
    """
    config, flow = flow_of(root)
    train = _collection(root, flow.train, flow.features)
    return train, _collection(root, flow.test, flow.test_features[BACKBONE]) if config.has_test else None


def _collection(root: Path, images: ImageShards, features: Sequence[Artifact]) -> Collection:
    if not all(artifact.complete for artifact in features):
        raise ValueError(f"{root}: the run has not embedded all of its images yet; run it first")
    parts = []
    for number, artifact in enumerate(features):
        bad = {int(place): str(why) for place, why in load_json(artifact.path / BAD_FILE).items()}
        shard = images.part(number)

        def names(of: ImageShards = shard) -> list[str]:
            return names_of(of)

        def image(place: int, of: ImageShards = shard) -> bytes | BadImage:
            return next(iter(of.images([place])))

        parts.append(Part(map_rows(str(artifact.path / ROWS_FILE), None), bad, names, image))
    return Collection(tuple(parts))
