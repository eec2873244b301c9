"""Files that become no rows, or whose rows a run will leave out: counted by reason, and listed by name in a file."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grappa_dist.console import pluralize
from grappa_dist.files import read_bytes, write_utf8
from grappa_dist.output import printable_line

FILE = "left_out.csv"
BAD_LIST = "bad_images.csv"  # likewise, of images that are in shards and could not be read
_REASONS, _NAMES = 8, 3  # that a message names
_LONGEST = 60  # characters of a name in a message, its last ones


@dataclass
class LeftOut:
    """Names of files, each with the reason why it is left out."""

    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.files.append((name, reason))

    @property
    def counts(self) -> Counter[str]:
        """By reason."""
        return Counter(reason for _, reason in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def below(self, prefix: str) -> LeftOut:
        """The same with something before each name."""
        return LeftOut([(f"{prefix}{name}", reason) for name, reason in self.files])


def joined(parts: Iterable[LeftOut]) -> LeftOut:
    return LeftOut([file for part in parts for file in part.files])


def described(left_out: LeftOut) -> list[str]:
    """A line for each of the most frequent reasons, with the first names."""
    counts, names = left_out.counts, dict[str, list[str]]()
    for name, reason in left_out.files:
        first = names.setdefault(reason, [])
        if len(first) < _NAMES:
            first.append(name if len(name) <= _LONGEST else f"...{name[-_LONGEST:]}")
    lines = [
        f"left out: {pluralize(number, 'file')}, {reason} ({', '.join(names[reason])}{', ...' * (number > _NAMES)})"
        for reason, number in counts.most_common(_REASONS)
    ]
    if len(counts) > _REASONS:
        lines.append(f"left out: {pluralize(counts.total(), 'file')} in all, for {len(counts):,} reasons")
    return lines


def write_list(path: Path, files: Sequence[tuple[str, str]]) -> bool:
    """As `write_rows`, but for no files there is no CSV: one that is there is removed, so it must be the caller's own.

    Returns:
        Whether there is such a file.
    """
    if not files:
        path.unlink(missing_ok=True)
        return False
    write_rows(path, files)
    return True


def write_rows(path: Path, files: Iterable[tuple[str, str]]) -> None:
    """Writes a CSV with the columns file and reason, unless it is there with this content."""
    write_table(path, ("file", "reason"), [(name, printable_line(reason)) for name, reason in files])


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a CSV, unless it is there with this content."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    content = text.getvalue()
    if not path.is_file() or read_bytes(path) != content.encode("utf-8", "surrogateescape"):
        write_utf8(path, content)
