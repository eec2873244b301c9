"""Images without a CSV: what the names of their folders say, which is a class or, at the top, what trains and tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Literal

from grappa_dist.data.decoding import TAKEN
from grappa_dist.data.labels import named
from grappa_dist.make_shards.left_out import described
from grappa_dist.make_shards.progress import Log
from grappa_dist.make_shards.sources import Item, Source, as_utf8, image_suffix, is_taken

Part = Literal["train", "val", "test"]
ONE_SIDE = ("none", "test")  # splits by which all images train, or all test: labels are optional
_MORE = r"([-_ ]?(set|split|data|images|\d+))?"
_PARTS: Mapping[Part, re.Pattern[str]] = {
    "train": re.compile(rf"train(ing)?{_MORE}", re.IGNORECASE),
    "val": re.compile(rf"(val(id(ation)?)?|dev){_MORE}", re.IGNORECASE),
    "test": re.compile(rf"(test(ing)?|eval(uation)?){_MORE}", re.IGNORECASE),
}


def task_name(path: Path) -> str:
    """The task of the images of a folder or tar that nothing else names."""
    return as_utf8(path.name).removesuffix(".tar")


def part_of(folder: str) -> Part | None:
    """Which part of a data set a folder of that name usually holds."""
    return next((part for part, name in _PARTS.items() if name.fullmatch(folder)), None)


def sides_of(parts: Sequence[Part]) -> list[Literal["train", "test"] | None]:
    """Whether each image trains or tests; what is called val tests where nothing is called test, else it is left."""
    sides: dict[Part, Literal["train", "test"] | None] = {"train": "train", "test": "test"}
    sides["val"] = None if "test" in parts else "test"
    return [sides[part] for part in parts]


@dataclass(frozen=True)
class FolderSplit:
    """Folders at the top of a data set that say which images train and which test."""

    sides: Mapping[str, Literal["train", "test"]]  # by folder
    left_out: tuple[str, ...] = ()  # val/ where there is a test/, and with --split folders all other folders

    def describe(self, where: Path, *, labelled: bool) -> str:
        trains, tests = (
            [f"{name}/" for name, side in self.sides.items() if side == part] for part in ("train", "test")
        )
        labels = "the folders below are the classes" if labelled else "there are no class folders below, so no labels"
        out = f"; left out: {', '.join(f'{name}/' for name in self.left_out)}" if self.left_out else ""
        return (
            f"{where}: taken as a split: {' and '.join(trains)} train, {' and '.join(tests)} test; {labels}{out} "
            "(--split classes takes them for classes)"
        )


def folder_items(
    source: Source, task: str | None, split: str | None, log: Log, *, labelled: bool | None = None
) -> list[Item]:
    """The images in class folders, in folders of a split, or, where no label is needed, anywhere; sorted by name.

    Args:
        task: by default the name of the folder or tar.
        split: as in CollectionConfig.
        labelled: whether every image must have a label; by default where the split needs it.

    Raises:
        ValueError: there are none, or the folders leave open what they say.
    """
    names = [name for name in source.names() if is_taken(name, source.left_out)]
    if not names:
        others = "".join(f"; {line}" for line in described(source.left_out))
        raise ValueError(f"{source.path}: no images; expected files ending in {', '.join(TAKEN)}{others}")
    task = task or task_name(source.path)
    labelled = split not in ONE_SIDE if labelled is None else labelled
    found = None if split == "classes" else _find_split(source, names, split)
    if found is None:
        if split not in ONE_SIDE and (parts := _split_below(names)):
            log(
                f"warning: {source.path}: in the class folders lie {_shown(parts)}, which is not taken as a split; "
                "a CSV that lists the images can have one (--split column)"
            )
        labels = _named(source, _classes(source, names, labelled=labelled), log, labelled=labelled)
        return [Item(source, name, labels[name], task) for name in names]
    taken = [name for name in names if _top(name) in found.sides]
    if found.left_out:
        for name in names:
            if _top(name) not in found.sides:
                source.left_out.add(name, f"in {_shown([_top(name)])}, which neither trains nor tests")
    labels = _named(source, _classes_below(source, taken, labelled=labelled), log, labelled=labelled)
    if split in ONE_SIDE:
        return [Item(source, name, labels[name], task) for name in taken]
    log(found.describe(source.path, labelled=any(label is not None for label in labels.values())))
    return [Item(source, name, labels[name], task, found.sides[_top(name)]) for name in taken]


def _named(source: Source, folders: Mapping[str, str | None], log: Log, *, labelled: bool) -> dict[str, str | None]:
    """The label of every image, by the rule that evaluation has for what is written (data/labels.py).

    Args:
        folders: the class folder of every image, by its name.
    """
    labels: dict[str | None, str | None] = {None: None}
    written = dict[str, str]()  # by label
    for folder in dict.fromkeys(folder for folder in folders.values() if folder is not None):
        found = named(folder)
        if found.name is None and labelled:
            raise ValueError(f"{source.path}: class folder {folder!r} counts as no label ({found.remark}); rename it")
        labels[folder] = None if found.name is None else intern(found.name)
        other = written.setdefault(found.name or "", folder)
        if found.name is not None and other != folder:
            log(f"warning: {source.path}: the folders {other!r} and {folder!r} are one class, {found.name!r}")
    return {name: labels[folder] for name, folder in folders.items()}


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def parts_of_split(source: Source) -> tuple[str, ...]:
    """The folders at the top if they are the parts of a split, train/ and val/ or test/, and there is nothing else."""
    tops = {_top(name) for name in source.names() if image_suffix(name) and not name.startswith(".")}
    parts = {part_of(top) for top in tops}
    return tuple(sorted(tops)) if "train" in parts and len(parts) > 1 and None not in parts else ()


def _find_split(source: Source, names: Sequence[str], split: str | None) -> FolderSplit | None:
    """The split that folders at the top make; None where they are classes."""
    tops = sorted({_top(name) for name in names})
    parts = {top: part_of(top) for top in tops}
    others = [top for top in tops if parts[top] is None]
    train, val, test = ([top for top in tops if parts[top] == part] for part in _PARTS)
    where = source.path
    is_split = bool(train and (val or test))
    if split in ONE_SIDE:
        return FolderSplit(dict.fromkeys(tops, "train")) if is_split or not others else None
    if split == "folders" and not is_split:
        raise ValueError(
            f"{where}: --split folders expects a folder train and one of val, valid, validation and test, "
            f"found {_shown(tops) or 'none'}"
        )
    if is_split and (split == "folders" or not others):
        left_out = (*(val if test else ()), *others)
        return FolderSplit({top: "train" if top in train else "test" for top in [*train, *(test or val)]}, left_out)
    nested = any(name.count("/") > 1 and _top(name) in train for name in names)
    if is_split or (nested and others):
        raise ValueError(
            f"{where}: holds {_shown([*train, *val, *test])} and also {_shown(others)}; give --split folders to take "
            "the former as a split and leave out the others, or --split classes to take all of them for classes"
        )
    if (train or val or test) and not others:
        raise ValueError(
            f"{where}: holds only {_shown(tops)}, which looks like one part of a split; name {where / tops[0]} to "
            "divide its classes, or give --split classes where these are classes, or --split none to train on all"
        )
    return None


def _split_below(names: Sequence[str]) -> list[str]:
    """The folders in class folders that are called as parts of a split are; [] unless there are two such parts."""
    below = sorted({_top(name.partition("/")[2]) for name in names})
    parts = {folder: part_of(folder) for folder in below}
    found = [folder for folder, part in parts.items() if part is not None]
    return found if "train" in parts.values() and len({parts[folder] for folder in found}) > 1 else []


def _shown(folders: Sequence[str]) -> str:
    names = [f"{name}/" if name else "images in no folder" for name in folders]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _classes(source: Source, names: Sequence[str], *, labelled: bool) -> dict[str, str | None]:
    """The class of every image: the folder at the top."""
    labels: dict[str, str | None] = {name: _top(name) or None for name in names}
    flat = [name for name, label in labels.items() if label is None]
    if flat and labelled:
        raise ValueError(
            f"{source.path}: {flat[0]!r} lies in no class folder; expected CLASS/FILE, or a CSV, or --split none"
        )
    if labelled and len(set(labels.values())) < 2:
        below = " (name that folder if the classes are below it)" if all(name.count("/") > 1 for name in names) else ""
        raise ValueError(
            f"{source.path}: one class folder, {labels[names[0]]!r}; expected two or more{below}, a CSV, "
            "or --split none"
        )
    return dict.fromkeys(names) if flat else labels  # a pile with subfolders, whose names need not be classes


def _classes_below(source: Source, names: Sequence[str], *, labelled: bool) -> dict[str, str | None]:
    """The class of every image: the folder below that of the split; no class where a part has images without one."""
    below = {name: _top(name.partition("/")[2]) for name in names}
    for top in {_top(name) for name in names}:
        inside = [name for name in names if _top(name) == top]
        flat = [name for name in inside if not below[name]]
        if flat and labelled and len(flat) < len(inside):
            raise ValueError(
                f"{source.path}: {flat[0]!r} lies in no class folder, others in {top}/ do; expected {top}/CLASS/FILE, "
                f"or no folders in {top}/, or --split none"
            )
        if flat:
            below |= dict.fromkeys(inside, "")
    if len(set(below.values())) < 2:  # such as train/images and val/images: no class
        return dict.fromkeys(names)
    return {name: label or None for name, label in below.items()}
