"""Finds the data sets of a benchmark below a folder and makes one collection of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from sys import intern

from grappa_dist.data.making.benchmarks.listing import Listed
from grappa_dist.data.making.benchmarks.mrt import DataSet, chosen, comparison, counts, differences
from grappa_dist.data.progress import Tell
from grappa_dist.make_shards.sources import FolderSource, Item, image_suffix

_DEPTH = 2  # levels below the root at which a data set may lie


def gather(
    root: Path, part: str, only: Sequence[str] | None, *, strict: bool, tell: Tell
) -> tuple[list[Item], Counter[str]]:
    """The images of all data sets, with task, label and side; and how many listed files were not there.

    Args:
        strict: a count that is not the expected one is an error, not a warning.

    Raises:
        ValueError: naming each data set that is not below the root.
    """
    data_sets = chosen(part, only)
    folders = find(root, data_sets)
    items: list[Item] = []
    absent: Counter[str] = Counter()
    found = []
    for data_set in data_sets:
        there, missing = _present(data_set.read(folders[data_set.name]), folders[data_set.name])
        if missing:
            absent[f"{data_set.name}: listed but not there, such as {missing[0]}"] = len(missing)
        found.append((data_set, counts(there)))
        items += _items(data_set.name, folders[data_set.name], there)
    for line in comparison(found):
        tell(line)
    wrong = differences(found)
    if strict and wrong:
        raise ValueError(f"{root}: {'; '.join(wrong)}")
    for line in [*wrong, *(f"{number:,} files, {reason}" for reason, number in absent.items())]:
        tell(f"warning: {line}")
    if not items:
        raise ValueError(f"{root}: none of the listed images is there")
    return items, absent


def _present(listed: Sequence[Listed], folder: Path) -> tuple[list[Listed], list[str]]:
    """The images that are there, and the files that are not."""
    names = set(FolderSource(folder).names())
    usable = [image.file in names and image_suffix(image.file) is not None for image in listed]
    missing = [image.file for image, is_there in zip(listed, usable, strict=True) if not is_there]
    return [image for image, is_there in zip(listed, usable, strict=True) if is_there], missing


def _items(task: str, folder: Path, listed: Sequence[Listed]) -> list[Item]:
    source = FolderSource(folder)
    return [Item(source, image.file, intern(image.label), task, image.side) for image in listed]


def find(root: Path, data_sets: Sequence[DataSet]) -> dict[str, Path]:
    """The folder of each data set: the root, or one up to two levels below it that has what a layout needs."""
    if not root.is_dir():
        raise ValueError(f"{root}: is no folder; expected one that holds the data sets")
    folders = list(_folders(root.absolute(), _DEPTH))
    places: dict[str, Path] = {}
    missing = []
    for data_set in data_sets:
        at = [folder for folder in folders if any(_has(folder, layout) for layout in data_set.layouts)]
        nearest = [folder for folder in at if len(folder.parts) == min(len(f.parts) for f in at)]
        if len(nearest) > 1:
            raise ValueError(f"{data_set.name}: in {nearest[0]} and in {nearest[1]}; expected one of them below {root}")
        if nearest:
            places[data_set.name] = nearest[0]
        else:
            expected = f"expected {root / data_set.folder} with {data_set.layout}"
            missing.append(f"{data_set.name} ({expected}{_part(folders, data_set)})")
    if missing:
        raise ValueError(
            f"{root}: not there, nor in a folder up to {_DEPTH} levels below: {'; '.join(missing)}; "
            "--only takes those that are there"
        )
    return places


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """A folder and those below it, nearer ones first at every level, without hidden ones."""
    yield folder
    if depth:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.is_dir():
                yield from _folders(Path(entry.path), depth - 1)


def _has(folder: Path, layout: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in layout)


def _part(folders: Sequence[Path], data_set: DataSet) -> str:
    """Where a layout is there in part, and what it lacks."""
    for folder in folders:
        for layout in data_set.layouts:
            if len(layout) > 1 and (folder / layout[0]).exists():
                lacks = [name for name in layout if not (folder / name).exists()]
                return f"; {folder} lacks {' and '.join(lacks)}"
    return ""
