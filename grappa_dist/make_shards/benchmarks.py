"""Published benchmarks: finds their data sets below a folder, in the original layouts, and lists the images.

MRT, the benchmark of the paper: six data sets that train and test, three more that only test. A reader for each data
set says which text or MATLAB files name its images, with what label.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import pluralize
from grappa_dist.extras import require
from grappa_dist.make_shards.left_out import LeftOut
from grappa_dist.make_shards.progress import Log, align
from grappa_dist.make_shards.sources import FolderSource, Item, image_suffix

_NOT_THERE = "listed but not there"
_DEPTH = 2  # levels below the root at which a data set may lie


@dataclass(frozen=True, slots=True)
class Listed:
    """One image of a data set."""

    file: str  # below the data set's folder
    label: str  # class ids are padded with zeros, so the order of labels is that of ids
    side: str | None = None  # train or test; None: not decided yet


def halved(listed: Sequence[Listed]) -> list[Listed]:
    """The first half of the sorted classes, rounded up, trains; the others test."""
    classes = sorted({image.label for image in listed})
    train = set(classes[: (len(classes) + 1) // 2])
    return [replace(image, side="train" if image.label in train else "test") for image in listed]


def all_test(listed: Sequence[Listed]) -> list[Listed]:
    return [replace(image, side="test") for image in listed]


def fields_of(path: Path, number: int, what: str, skip: int = 0) -> list[list[str]]:
    """The lines of a text file, each split at white space into `number` fields; the last may hold spaces.

    Args:
        what: the fields, for messages.
        skip: lines at the top that say something else.
    """
    return list(split_lines(path.read_text(encoding="utf-8", errors="replace"), number, (str(path), what), skip))


def split_lines(text: str, number: int, names: tuple[str, str], skip: int = 0) -> Iterator[list[str]]:
    """The fields of every line that is not empty or a comment (#)."""
    for line_number, line in enumerate(text.splitlines(), start=1):
        if line_number <= skip or not line.strip() or line.startswith("#"):
            continue
        fields = line.split(maxsplit=number - 1)
        if len(fields) != number:
            raise ValueError(f"{names[0]} line {line_number}: {line.strip()!r}; expected {names[1]}")
        yield [field.strip() for field in fields]


def class_id(text: str, digits: int, where: str) -> str:
    """A class number as a label that sorts as the number does."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{where}: class {text!r} is no number")
    return text.zfill(digits)


def in_class_folders(folder: Path, below: str) -> list[Listed]:
    """The images in BELOW/CLASS/*, sorted; hidden files and other kinds do not count."""
    listed = []
    classes = sorted(entry.name for entry in os.scandir(folder / below) if entry.is_dir() and entry.name[0] != ".")
    for label in classes:
        for name in sorted(os.listdir(folder / below / label)):
            if image_suffix(name) and name[0] != ".":
                listed.append(Listed(f"{below}/{label}/{name}", label))
    return listed


def mat_variable(path: Path, name: str) -> NDArray[Any]:
    """A variable of a MATLAB file, as an array of one dimension."""
    require("scipy", what=f"{path}, a MATLAB file")
    from scipy.io import loadmat

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # of a damaged file scipy raises many kinds: zlib.error, IndexError, ...
        raise ValueError(f"{path}: not a MATLAB file that scipy reads: {' '.join(str(error).split())}") from None
    if name not in content:
        has = ", ".join(key for key in content if not key.startswith("__"))
        raise ValueError(f"{path}: no variable {name!r}; it has {has or 'none'}")
    return np.atleast_1d(content[name])


def columns_of(records: NDArray[Any], columns: Sequence[str], path: Path) -> list[list[Any]]:
    """Columns of a MATLAB struct array."""
    has = records.dtype.names or ()
    for column in columns:
        if column not in has:
            raise ValueError(f"{path}: annotations without the field {column!r}; they have {', '.join(has) or 'none'}")
    return [[value.item() if hasattr(value, "item") else value for value in records[column]] for column in columns]


def aircraft(folder: Path) -> list[Listed]:
    """FGVC-Aircraft: `<image> <variant>` per line, in two lists; variants by name."""
    listed = []
    for part in ("trainval", "test"):
        for image, variant in fields_of(folder / f"data/images_variant_{part}.txt", 2, "<image> <variant>"):
            listed.append(Listed(f"data/images/{image}.jpg", variant))
    return halved(listed)


def cars(folder: Path) -> list[Listed]:
    """Stanford Cars: one folder with cars_annos.mat, or two with the devkit; classes by id."""
    if (folder / "cars_annos.mat").is_file():
        return halved(_cars_in(folder / "cars_annos.mat", "relative_im_path", ""))
    test = next(path for path in (folder, folder / "devkit") if (path / "cars_test_annos_withlabels.mat").is_file())
    train = _cars_in(folder / "devkit/cars_train_annos.mat", "fname", "cars_train/")
    return halved(train + _cars_in(test / "cars_test_annos_withlabels.mat", "fname", "cars_test/"))


def _cars_in(path: Path, name: str, below: str) -> list[Listed]:
    files, labels = columns_of(mat_variable(path, "annotations"), (name, "class"), path)
    return [
        Listed(f"{below}{file}", class_id(str(label), 3, str(path))) for file, label in zip(files, labels, strict=True)
    ]


def cub(folder: Path) -> list[Listed]:
    """CUB-200-2011: images, their classes and the classes' names in three lists; classes by id."""
    names = dict(fields_of(folder / "classes.txt", 2, "<class id> <name>"))
    labels = dict(fields_of(folder / "image_class_labels.txt", 2, "<image id> <class id>"))
    listed = []
    for image, file in fields_of(folder / "images.txt", 2, "<image id> <file>"):
        number = labels.get(image)
        if number not in names:
            raise ValueError(
                f"{folder}: image {image} of images.txt has no class; expected it in image_class_labels.txt"
            )
        # the names begin with the id already: 001.Black_footed_Albatross
        name = names[number].partition(".")[2] or names[number]
        listed.append(Listed(f"images/{file}", f"{class_id(number, 3, str(folder / 'classes.txt'))}.{name}"))
    return halved(listed)


def flowers(folder: Path) -> list[Listed]:
    """Oxford Flowers 102: the class of image i at place i of imagelabels.mat; classes by id."""
    path = folder / "imagelabels.mat"
    labels = [class_id(str(label), 3, str(path)) for label in mat_variable(path, "labels").tolist()]
    return halved([Listed(f"jpg/image_{image:05d}.jpg", label) for image, label in enumerate(labels, start=1)])


def food101(folder: Path) -> list[Listed]:
    """Food-101: class folders; classes by name."""
    return halved(in_class_folders(folder, "images"))


def products(folder: Path) -> list[Listed]:
    """Stanford Online Products: `image_id class_id super_class_id path`, in two official lists."""
    listed = []
    for side in ("train", "test"):
        path = folder / f"Ebay_{side}.txt"
        for _, label, _, file in fields_of(path, 4, "image_id class_id super_class_id path", skip=1):
            listed.append(Listed(file, class_id(label, 5, str(path)), side))
    return listed


def dtd(folder: Path) -> list[Listed]:
    """Describable Textures: class folders."""
    return all_test(in_class_folders(folder, "images"))


def eurosat(folder: Path) -> list[Listed]:
    """EuroSAT in RGB: class folders in 2750, or, in a later edition, in EuroSAT_RGB."""
    return all_test(in_class_folders(folder, "2750" if (folder / "2750").is_dir() else "EuroSAT_RGB"))


def pets(folder: Path) -> list[Listed]:
    """Oxford-IIIT Pet: `<image> <class id> <species> <breed id>` per line; the class is the name without its number."""
    lines = fields_of(folder / "annotations/list.txt", 4, "<image> <class id> <species> <breed id>")
    return all_test([Listed(f"images/{image}.jpg", image.rpartition("_")[0]) for image, *_ in lines])


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
        """The layouts, for messages."""
        return ", or ".join(" and ".join(layout) for layout in self.layouts)


_DEVKIT = ("devkit/cars_train_annos.mat", "cars_train", "cars_test")
_TEST = "cars_test_annos_withlabels.mat"
MRT = (  # the counts are those of the paper's table
    DataSet(
        "aircraft",
        "fgvc-aircraft-2013b",
        (("data/images_variant_trainval.txt", "data/images_variant_test.txt", "data/images"),),
        aircraft,
        (50, 5_000, 50, 5_000),
    ),
    DataSet(
        "cars",
        "stanford_cars",
        (("cars_annos.mat", "car_ims"), (*_DEVKIT, _TEST), (*_DEVKIT, f"devkit/{_TEST}")),
        cars,
        (98, 8_054, 98, 8_131),
    ),
    DataSet(
        "cub",
        "CUB_200_2011",
        (("images.txt", "image_class_labels.txt", "classes.txt", "images"),),
        cub,
        (100, 5_864, 100, 5_924),
    ),
    DataSet("flowers", "flowers-102", (("imagelabels.mat", "jpg"),), flowers, (51, 3_870, 51, 4_319)),
    DataSet("food101", "food-101", (("meta/classes.txt", "images"),), food101, (51, 51_000, 50, 50_000)),
    DataSet(
        "products",
        "Stanford_Online_Products",
        (("Ebay_train.txt", "Ebay_test.txt"),),
        products,
        (11_318, 59_551, 11_316, 60_502),
    ),
)
ZEROSHOT = (  # the counts are those that the data sets state of themselves
    DataSet("dtd", "dtd", (("labels/train1.txt", "images"),), dtd, (0, 0, 47, 5_640)),
    DataSet("eurosat", "eurosat", (("2750",), ("EuroSAT_RGB",)), eurosat, (0, 0, 10, 27_000)),
    DataSet("pets", "oxford-iiit-pet", (("annotations/list.txt", "images"),), pets, (0, 0, 37, 7_349)),
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
    """A line for each count that is not the expected one."""
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
    return align(lines)


def gather(root: Path, part: str, only: Sequence[str] | None, *, strict: bool, log: Log) -> tuple[list[Item], LeftOut]:
    """The images of all data sets, with task, label and side; and the listed files that were not there.

    Args:
        strict: a count that is not the expected one is an error, not a warning.

    Raises:
        ValueError: naming each data set that is not below the root.
    """
    data_sets = chosen(part, only)
    folders = find(root, data_sets)
    items: list[Item] = []
    absent = LeftOut()
    found, warnings = [], list[str]()
    for data_set in data_sets:
        there, missing = present(data_set.read(folders[data_set.name]), folders[data_set.name])
        for file in missing:
            absent.add(f"{os.path.relpath(folders[data_set.name], root)}/{file}", f"{data_set.name}: {_NOT_THERE}")
        if missing:
            warnings.append(f"{pluralize(len(missing), 'file')}, {data_set.name}: {_NOT_THERE}, such as {missing[0]}")
        found.append((data_set, counts(there)))
        items += _items(data_set.name, folders[data_set.name], there)
    for line in comparison(found):
        log(line)
    wrong = differences(found)
    if strict and wrong:
        raise ValueError(f"{root}: {'; '.join(wrong)}")
    for line in [*wrong, *warnings]:
        log(f"warning: {line}")
    if not items:
        raise ValueError(f"{root}: none of the listed images is there")
    return items, absent


def present(listed: Sequence[Listed], folder: Path) -> tuple[list[Listed], list[str]]:
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
    folders = list(folders_below(root.absolute()))
    places: dict[str, Path] = {}
    missing = []
    for data_set in data_sets:
        at = [folder for folder in folders if any(has(folder, layout) for layout in data_set.layouts)]
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


def folders_below(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """A folder and those below it, nearer ones first at every level, without hidden ones."""
    yield folder
    if depth:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.is_dir():
                yield from folders_below(Path(entry.path), depth - 1)


def has(folder: Path, layout: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in layout)


def _part(folders: Sequence[Path], data_set: DataSet) -> str:
    """Where a layout is there in part, and what it lacks."""
    for folder in folders:
        for layout in data_set.layouts:
            if len(layout) > 1 and (folder / layout[0]).exists():
                lacks = [name for name in layout if not (folder / name).exists()]
                return f"; {folder} lacks {' and '.join(lacks)}"
    return ""
