"""Lists of images that take no part, by the names of their files: CSVs as `grappa-dist duplicates` writes them.

Columns: `name` (or `file`, as other lists of this program have it); `drop`, 1 or 0; `group`, of images that are nearly
the same; `side`, train or test, where it matters; `reason`. Without `drop`, all that is listed goes, but of each group
the first stays. Shapes: m rows that are excluded.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import pluralize

NAMES, COLUMNS = ("name", "file"), ("drop", "group", "side", "reason")
_YES, _NO = ("1", "yes", "true"), ("0", "no", "false", "")
_SIDES = ("train", "test", "")


class Line(NamedTuple):
    """What one line says of an image."""

    name: str
    drop: bool
    group: str  # "": none
    side: str  # "": both
    reason: str


@dataclass(frozen=True)
class Excluded:
    """What a list comes to on some images.

    Attributes:
        rows: (m,) row ids, ascending.
        firsts: (m,) of a near-duplicate, the row that stays of its group; -1 for others.
        reasons: why, of each.
        matched: (lines,) whether a line names an image here.
    """

    rows: NDArray[np.int64]
    firsts: NDArray[np.int64]
    reasons: tuple[str, ...]
    matched: NDArray[np.bool_]


@dataclass(frozen=True)
class Exclusions:
    """The lines of one list or of several."""

    lines: tuple[Line, ...]
    paths: tuple[str, ...] = ()  # of the lists, for messages

    def lines_of(self, side: str) -> list[int]:
        """The places of the lines that say something of a side, ascending."""
        return [number for number, line in enumerate(self.lines) if line.side in ("", side)]

    def digest(self, side: str) -> str:
        """One name for what the lists say of a side, wherever they lie; "" where they say nothing."""
        lines = [self.lines[number] for number in self.lines_of(side)]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest() if lines else ""

    def among(self, names: Iterable[Sequence[str]], side: str) -> Excluded:
        """Which of the images of a side go: those that a line drops, unless the same group keeps what is called so.

        Args:
            names: of each row, one or several; a name of several images means all of them.
        """
        rows_of = self._rows_of(names, side)
        kept: dict[str, list[int]] = defaultdict(list)
        for number, rows in rows_of.items():
            if (line := self.lines[number]).group and not line.drop:
                kept[line.group] += rows
        reasons, firsts = dict[int, str](), dict[int, int]()
        for number, rows in rows_of.items():
            line = self.lines[number]
            stay = kept.get(line.group, [])
            for row in rows if line.drop else ():
                if not line.group:
                    firsts.pop(row, None)  # it goes whatever its group says
                if row not in reasons and row not in stay:
                    reasons[row] = line.reason
                    firsts |= {row: stay[0]} if stay else {}
        excluded = sorted(reasons)
        matched = np.zeros(len(self.lines), bool)
        matched[list(rows_of)] = True
        return Excluded(
            np.array(excluded, np.int64),
            np.array([_stands_for(row, firsts, reasons) for row in excluded], np.int64),
            tuple(reasons[row] for row in excluded),
            matched,
        )

    def _rows_of(self, names: Iterable[Sequence[str]], side: str) -> dict[int, list[int]]:
        """The rows that each line names, of the lines that name any, in their order."""
        wanted: dict[str, list[int]] = defaultdict(list)
        for number in self.lines_of(side):
            wanted[self.lines[number].name].append(number)
        found: dict[int, list[int]] = defaultdict(list)
        for row, aliases in enumerate(names):
            for number in {number for alias in aliases for number in wanted.get(alias, ())}:
                found[number].append(row)
        return dict(sorted(found.items()))

    def check_matched(self, matched: NDArray[np.bool_], example: str) -> str:
        """What to tell of names that no image has; "" where there are none.

        Args:
            matched: (lines,) whether a line names an image, on any side.
            example: the name of an image.

        Raises:
            ValueError: no line names an image.
        """
        unknown = [line.name for line, there in zip(self.lines, matched.tolist(), strict=True) if not there]
        if not unknown:
            return ""
        of = f"{len(unknown):,} of {pluralize(len(self.lines), 'name')} in {', '.join(self.paths)}"
        text = f"{of}: no image is called so; the first is {unknown[0]!r:.200}, names are as in {example!r:.200}"
        if len(unknown) == len(self.lines):
            raise ValueError(text)
        return text


def _stands_for(row: int, firsts: Mapping[int, int], gone: Mapping[int, str]) -> int:
    """The row that stays in place of another one, -1: none; the first of its group may have gone with another group."""
    seen = set[int]()
    while row in firsts and row not in seen:
        seen.add(row)
        row = firsts[row]
    return -1 if row in gone else row


def read_exclusions(paths: Sequence[str]) -> Exclusions:
    """The lines of some lists, in order.

    Raises:
        ValueError: a list is not there, is no CSV, or has no names; or a value in it is none that can be used.
    """
    lines = list[Line]()
    for number, path in enumerate(paths):  # groups of two lists are never one
        lines += (line._replace(group=line.group and f"{number} {line.group}") for line in _lines_of(path))
    return Exclusions(tuple(lines), tuple(paths))


def _lines_of(path: str) -> list[Line]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: does not exist; expected a CSV with a column 'name', as `duplicates` writes it")
    found, seen = list[Line](), set[str]()
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            has = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = has
            names = next((name for name in NAMES if name in has), None)
            if names is None:
                raise ValueError(f"{path}: no column 'name'; it has {', '.join(has) or 'none'}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path} line {reader.line_num}: expected {pluralize(len(has), 'field')}")
                found.append(_line(row, names, f"{path} line {reader.line_num}", seen))
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV: {error}") from None
    return found


def _line(row: Mapping[str, str], names: str, where: str, seen: set[str]) -> Line:
    """What a line says.

    Args:
        seen: the groups so far.
    """
    group, side, asked = (row.get(column, "").strip() for column in ("group", "side", "drop"))
    if side not in _SIDES:
        raise ValueError(f"{where}: side is {side!r}; expected train, test or nothing")
    if asked.lower() not in (*_YES, *_NO):
        raise ValueError(f"{where}: drop is {asked!r}; expected 1 or 0")
    if not row[names]:
        raise ValueError(f"{where}: column {names!r} is empty")
    drop = asked.lower() in _YES if "drop" in row else not group or group in seen
    seen.add(group)
    reason = row.get("reason", "").strip() or ("near-duplicate" if group else "listed")
    return Line(row[names], drop, group, side, reason)
