"""What the folders of a benchmark's data sets lack, file by file, and where to get it. Decodes no image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.console import pluralize
from grappa_dist.make_shards.benchmarks import DataSet, chosen, counts, differences, folders_below, has, present
from grappa_dist.make_shards.left_out import write_rows

NAMED = 3  # files that a line names

# Home pages, and archives as their authors call them
SOURCES = {
    "aircraft": "fgvc-aircraft-2013b.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    "cars": "car_ims.tgz and cars_annos.mat, or cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
    "cars_test_annos_withlabels.mat, of Stanford Cars, whose page at ai.stanford.edu is no longer there",
    "cub": "CUB_200_2011.tgz of https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "flowers": "102flowers.tgz (jpg/) and imagelabels.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    "food101": "food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    "products": "Stanford_Online_Products.zip of https://cvgl.stanford.edu/projects/lifted_struct/",
    "dtd": "dtd-r1.0.1.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    "eurosat": "EuroSAT.zip of https://github.com/phelber/EuroSAT",
    "pets": "images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/",
}


@dataclass(frozen=True)
class Found:
    """What is there of a data set."""

    name: str
    folder: Path  # where it is, or would be
    missing: tuple[str, ...]  # below the folder: what a layout needs, else images that its lists name
    listed: int = 0  # images in its lists
    problems: tuple[str, ...] = ()  # lists that cannot be read, counts that are not the expected ones

    @property
    def complete(self) -> bool:
        return not self.missing and not self.problems


def check(root: Path, parts: Sequence[str]) -> list[Found]:
    """Looks for the data sets of some parts of the benchmark, below a folder.

    Raises:
        ValueError: there is no such folder, or no such part.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: is no folder; expected one that holds the data sets")
    folders = list(folders_below(root.absolute()))
    return [_look_at(data_set, folders) for part in parts for data_set in chosen(part, None)]


def _look_at(data_set: DataSet, folders: Sequence[Path]) -> Found:
    whole = [folder for folder in folders if any(has(folder, layout) for layout in data_set.layouts)]
    if not whole:
        folder, layout = _nearest(data_set, folders)
        return Found(data_set.name, folder, tuple(name for name in layout if not (folder / name).exists()))
    folder = min(whole, key=lambda path: len(path.parts))
    others = [path for path in whole if path != folder and len(path.parts) == len(folder.parts)]
    if others:
        return Found(data_set.name, folder, (), problems=(f"is in {others[0]} as well; expected one of them",))
    try:
        listed = data_set.read(folder)
    except (ValueError, OSError) as error:
        return Found(data_set.name, folder, (), problems=(" ".join(str(error).split()),))
    there, missing = present(listed, folder)
    wrong = () if missing else tuple(differences([(data_set, counts(there))]))
    problems = tuple(line.removeprefix(f"{data_set.name}: ") for line in wrong)
    return Found(data_set.name, folder, tuple(missing), len(listed), problems)


def _nearest(data_set: DataSet, folders: Sequence[Path]) -> tuple[Path, Sequence[str]]:
    """The folder that has most of a layout, and that layout; the place where the archive would be, if none has any.

    Names such as `images` are in many data sets, so a folder counts by its own name or by a layout's first file.
    """
    best, most = (folders[0] / data_set.folder, data_set.layouts[0]), 0
    for folder in folders:
        for layout in data_set.layouts:
            number = sum((folder / name).exists() for name in layout)
            if number > most and (folder.name == data_set.folder or (folder / layout[0]).is_file()):
                best, most = (folder, layout), number
    return best


def describe(found: Sequence[Found]) -> Iterator[str]:
    """Lines for each data set: whether it is complete, what is missing where, and where to get it."""
    width = max(len(one.name) for one in found)
    for one in found:
        head = one.name.ljust(width)
        if one.complete:
            yield f"{head}  complete: {pluralize(one.listed, 'image')} in {one.folder}"
            continue
        if not one.folder.is_dir():
            yield f"{head}  not there: expected {one.folder} with {' and '.join(one.missing)}"
        elif one.listed and one.missing:
            names = ", ".join(one.missing[:NAMED]) + ", ..." * (len(one.missing) > NAMED)
            of = f"{len(one.missing):,} of {pluralize(one.listed, 'listed image')}"
            yield f"{head}  {of} missing in {one.folder}: {names}"
        elif one.missing:
            yield f"{head}  {one.folder} lacks {' and '.join(one.missing)}"
        if one.problems:
            yield f"{head}  {one.folder}: {'; '.join(one.problems)}"
        yield f"{' ' * width}  get {SOURCES[one.name]}"
    lacking = [one.name for one in found if not one.complete]
    yield f"{len(found) - len(lacking)} of {pluralize(len(found), 'data set')} complete" + (
        f"; not: {', '.join(lacking)}" if lacking else ""
    )


def write_missing(path: Path, found: Sequence[Found]) -> None:
    """Writes a CSV of all missing files: the path, and of which data set."""
    write_rows(
        path, [(os.path.join(one.folder, name), f"{one.name}: missing") for one in found for name in one.missing]
    )
