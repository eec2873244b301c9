"""MRT, the paper's benchmark: six data sets that train and test, three more that only test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.data.making.benchmarks import readers
from grappa_dist.data.making.benchmarks.listing import Listed

Counts = tuple[int, int, int, int]  # train classes, train images, test classes, test images
COUNTED = ("train classes", "train images", "test classes", "test images")


@dataclass(frozen=True)
class DataSet:
    """A data set in its original layout."""

    name: str  # the task
    folder: str  # as its archive calls it
    layouts: tuple[tuple[str, ...], ...]  # what must be there, one layout or another
    read: Callable[[Path], list[Listed]]
    expected: Counts

    @property
    def layout(self) -> str:
        """The layouts in words."""
        return ", or ".join(" and ".join(layout) for layout in self.layouts)


_DEVKIT = ("devkit/cars_train_annos.mat", "cars_train", "cars_test")
_TEST = "cars_test_annos_withlabels.mat"
MRT = (  # the counts are those of the paper's table
    DataSet(
        "aircraft",
        "fgvc-aircraft-2013b",
        (("data/images_variant_trainval.txt", "data/images_variant_test.txt", "data/images"),),
        readers.aircraft,
        (50, 5_000, 50, 5_000),
    ),
    DataSet(
        "cars",
        "stanford_cars",
        (("cars_annos.mat", "car_ims"), (*_DEVKIT, _TEST), (*_DEVKIT, f"devkit/{_TEST}")),
        readers.cars,
        (98, 8_054, 98, 8_131),
    ),
    DataSet(
        "cub",
        "CUB_200_2011",
        (("images.txt", "image_class_labels.txt", "classes.txt", "images"),),
        readers.cub,
        (100, 5_864, 100, 5_924),
    ),
    DataSet("flowers", "flowers-102", (("imagelabels.mat", "jpg"),), readers.flowers, (51, 3_870, 51, 4_319)),
    DataSet("food101", "food-101", (("meta/classes.txt", "images"),), readers.food101, (51, 51_000, 50, 50_000)),
    DataSet(
        "products",
        "Stanford_Online_Products",
        (("Ebay_train.txt", "Ebay_test.txt"),),
        readers.products,
        (11_318, 59_551, 11_316, 60_502),
    ),
)
ZEROSHOT = (  # the counts are those that the data sets state of themselves
    DataSet("dtd", "dtd", (("labels/train1.txt", "images"),), readers.dtd, (0, 0, 47, 5_640)),
    DataSet("eurosat", "eurosat", (("2750",), ("EuroSAT_RGB",)), readers.eurosat, (0, 0, 10, 27_000)),
    DataSet("pets", "oxford-iiit-pet", (("annotations/list.txt", "images"),), readers.pets, (0, 0, 37, 7_349)),
)
PARTS = {"mrt": MRT, "zeroshot": ZEROSHOT}


def chosen(part: str, only: Sequence[str] | None) -> list[DataSet]:
    """The data sets of a part, or those of them that `only` names."""
    if part not in PARTS:
        raise ValueError(f"part must be {' or '.join(PARTS)}, got {part!r}")
    names = [data_set.name for data_set in PARTS[part]]
    for name in only or ():
        if name not in names:
            raise ValueError(f"only: {name!r} is no data set of {part}; expected some of {', '.join(names)}")
    return [data_set for data_set in PARTS[part] if only is None or data_set.name in only]


def counts(listed: Sequence[Listed]) -> Counts:
    """Classes and images that train, and those that test."""
    train, test = ([image.label for image in listed if image.side == side] for side in ("train", "test"))
    return len(set(train)), len(train), len(set(test)), len(test)


def differences(found: Sequence[tuple[DataSet, Counts]]) -> list[str]:
    """Each count that is not the expected one, in words."""
    return [
        f"{data_set.name}: {has:,} {what}, expected {should:,}"
        for data_set, numbers in found
        for what, has, should in zip(COUNTED, numbers, data_set.expected, strict=True)
        if has != should
    ]


def comparison(found: Sequence[tuple[DataSet, Counts]]) -> list[str]:
    """A table of found and expected counts, a line per data set; what differs has a star."""
    lines: list[tuple[str, ...]] = [("", *COUNTED)]
    for data_set, numbers in found:
        pairs = zip(numbers, data_set.expected, strict=True)
        cells = [f"{has:,} of {should:,}{' ' if has == should else '*'}" for has, should in pairs]
        lines.append((data_set.name, *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
