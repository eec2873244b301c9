"""What a data set says of its images, and the text and MATLAB files that say it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.make_shards.sources import image_suffix


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


def class_id(text: str, digits: int, said: str) -> str:
    """A class number as a label that sorts as the number does."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{said}: class {text!r} is no number")
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
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            f"{path}: a MATLAB file, and reading it needs scipy, which is not installed; "
            "pip install 'grappa-dist[benchmarks]', or scipy itself"
        ) from None
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # of a damaged file, whatever scipy stumbles over: zlib.error, IndexError, ...
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
