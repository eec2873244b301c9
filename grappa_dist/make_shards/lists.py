"""Lists of images with labels, CSV or JSONL: read as programs write them, refused by line where they do not fit."""

from __future__ import annotations

import codecs
import csv
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import IO

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import TAKEN, describe_missing_decoder
from grappa_dist.data.labels import named
from grappa_dist.files import parse_json
from grappa_dist.make_shards.progress import Log
from grappa_dist.make_shards.sources import Item, Source, image_suffix

FILE_COLUMN = "file"
LINES = ".jsonl"  # ends the name of a list with a JSON object in each line
_DELIMITERS = ",;\t|"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a list hold what; None: not read."""

    file: str = FILE_COLUMN
    label: str | None = "fine"
    label_required: bool = True  # in every row
    label_named: bool = False  # by the user, or needed: it must be there, and name a label in some row
    task: str = "dataset"
    split: str | None = None
    hint: str = ""  # for messages: how to name another label
    task_name: str | None = None  # one task for all rows, instead of the column


def csv_items(path: str, source: Source, columns: Columns, log: Log, *, elsewhere: Source | None = None) -> list[Item]:
    """The images that a CSV or JSONL file lists, in its order.

    Args:
        log: gets a line where images have no label.
        elsewhere: the source of absolute paths outside of the other one; None: these are refused.

    Raises:
        ValueError: a column or an image is not there, or a value is none that can be used; the message has the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: does not exist; expected a list with a column {columns.file!r}")
    items: list[Item] = []
    names: set[tuple[Source, str]] = set()
    has: Sequence[str] = ()
    for line, row in _rows(path, columns):
        where, has = f"{path} line {line}", list(row)
        of, name = _found(row[columns.file], source, where, elsewhere)
        if (of, name) in names:
            raise ValueError(f"{where}: {name!r} is listed twice")
        names.add((of, name))
        if missing := describe_missing_decoder(image_suffix(name) or ""):
            of.left_out.add(name, missing)
            continue
        label = _name_in(row, columns.label, where, required=columns.label_required) if columns.label in row else None
        task = columns.task_name or _name_in(row, columns.task, where, required=True)
        split = intern(row[columns.split].strip()) if columns.split else None
        items.append(Item(of, name, label and intern(label), intern(task or ""), split, path, line))
    if not items:
        raise ValueError(f"{path}: no rows")
    _tell_labels(path, has, items, columns, log)
    return items


def _tell_labels(path: str, has: Sequence[str], items: Sequence[Item], columns: Columns, log: Log) -> None:
    """Logs where images have no label; raises ValueError where none has and the column was asked for."""
    unlabelled = sum(item.label is None for item in items)
    if columns.label is None:
        return
    if columns.label_named and unlabelled == len(items):
        raise ValueError(f"{path}: column {columns.label!r} names no label in any of {pluralize(len(items), 'row')}")
    if columns.label not in has:
        log(
            f"warning: {path}: no column {columns.label!r}, so its images get no labels; it has {', '.join(has)} "
            "(--label-column names another)"
        )
    elif unlabelled:
        of = pluralize(len(items), "image")
        log(f"warning: {path}: column {columns.label!r} names no label for {unlabelled:,} of {of}")


def _name_in(row: dict[str, str], column: str, where: str, *, required: bool) -> str | None:
    """The label or task in a column, by the rule that evaluation has (data/labels.py)."""
    found = named(row[column])
    if found.name is None and required:
        raise ValueError(
            f"{where}: column {column!r} is empty"
            if not row[column].strip()
            else f"{where}: column {column!r} is {row[column]!r:.80}, which counts as none ({found.remark})"
        )
    return found.name


def _found(text: str, source: Source, where: str, elsewhere: Source | None = None) -> tuple[Source, str]:
    """The source that has the file which a list names, and its name there."""
    if "\0" in text:
        raise ValueError(f"{where}: {text!r} has a NUL byte; expected a file's name")
    in_folder = os.path.isabs(text) and source.path.is_dir()
    name = os.path.relpath(text, source.path) if in_folder else text.removeprefix("./")
    if image_suffix(name) is None:
        raise ValueError(f"{where}: {name!r} has no image suffix; expected {', '.join(TAKEN)}")
    plain = os.path.normpath(name)
    if plain.startswith("../"):
        if elsewhere is not None and in_folder:
            return _found(text, elsewhere, where)
        raise ValueError(f"{where}: {text!r} lies outside of {source.path}; expected a file in it")
    forms = (unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))  # as file systems compose letters
    candidates = (plain, name, *forms, plain.replace("\\", "/"))
    for candidate in candidates:
        if ".." not in candidate.split("/") and source.has(candidate):
            return source, candidate
    raise ValueError(f"{where}: {name!r} is not in {source.path}")


def header_of(path: str) -> list[str]:
    """The names of the columns of a list; those of its first row, if it is of JSON objects."""
    if path.endswith(LINES):
        return next((list(row) for _, row in _lines(path)), [])
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, delimiter=_delimiter(file))
            return [name.strip() for name in reader.fieldnames or []]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV in UTF-8: {error}") from None


def _rows(path: str, columns: Columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their lines; the columns that must be there are there and filled."""
    if not path.endswith(LINES):
        yield from _csv_rows(path, columns)
        return
    has = header_of(path)
    needed = _needed(path, has, columns)
    for line, row in _lines(path):
        row = dict.fromkeys(has, "") | row
        for column in needed:
            if not row[column].strip():
                raise ValueError(f"{path} line {line}: {column!r} is missing or empty")
        yield line, row


def _lines(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The JSON objects of a JSONL file with their lines, values as text; empty lines are passed over."""
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            row = parse_json(text.removeprefix(codecs.BOM_UTF8), f"{path} line {line}")
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {line}: {type(row).__name__}; expected an object with {FILE_COLUMN!r}")
            yield (
                line,
                {key: value if isinstance(value, str) else named(value).name or "" for key, value in row.items()},
            )


def _csv_rows(path: str, columns: Columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their lines; the columns that must be there are there and filled."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, delimiter=_delimiter(file))
            has = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = has
            needed = _needed(path, has, columns)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    fields = pluralize(_width(row), "field")
                    raise ValueError(f"{where}: {fields}; expected {len(has)} ({', '.join(has)})")
                for column in needed:
                    if not row[column].strip():
                        raise ValueError(f"{where}: column {column!r} is empty")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV in UTF-8: {error}") from None


def _delimiter(file: IO[str]) -> str:
    """What separates the columns: the first character that makes one of them `file`, else a comma."""
    head = file.readline()
    file.seek(0)
    for delimiter in _DELIMITERS:
        fields = next(csv.reader([head], delimiter=delimiter), [])
        if FILE_COLUMN in (field.strip() for field in fields):
            return delimiter
    return ","


def _width(row: dict[str, str]) -> int:
    extra: Sequence[str] = row.get(None, ())  # type: ignore[call-overload]
    return sum(value is not None for key, value in row.items() if key is not None) + len(extra)


def _needed(path: str, has: Sequence[str], columns: Columns) -> list[str]:
    """The columns that must be there, those of them first that every row must fill."""
    needed = [columns.file]
    if columns.task_name is None:
        needed.append(columns.task)
    if columns.split is not None:
        needed.append(columns.split)
    for column in (
        *needed,
        *([columns.label] if columns.label and (columns.label_required or columns.label_named) else []),
    ):
        if column not in has:
            others = columns.hint if column == columns.label else ""
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(has) or 'none'}{others}")
    for column in (*needed, columns.label or ""):
        if has.count(column) > 1:
            raise ValueError(f"{path}: {has.count(column)} columns are called {column!r}; expected one")
    return needed
