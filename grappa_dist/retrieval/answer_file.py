"""The file of answers to "do these two images show the same?".

It has a JSON object a line, `{"images": [NAME, NAME], "xxh3": [SUM, SUM], "answer": "same"}`, oldest first; of two
answers about a pair the later one counts. Answers are about images and not about models, so the file serves the next
comparison too. An image is known by the checksum of its file: other folders have files of the same names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grappa_dist.files import lock_file, make_folder, parse_json, read_bytes, write_utf8

VALUES = {"same": 1.0, "different": 0.0, "unsure": 0.5}


@dataclass
class AnswerFile:
    """The answers in a file; every new one is in it, whole and synced, when `add` returns."""

    path: Path
    lines: list[str] = field(default_factory=list, repr=False)
    found: dict[frozenset[str], str] = field(default_factory=dict, repr=False)  # by the checksums of two images

    def add(self, names: Sequence[str], sums: Sequence[str], answer: str) -> None:
        """Appends an answer about two images; a kill at any moment leaves the file with it or without it."""
        line = json.dumps({"images": list(names), "xxh3": list(sums), "answer": answer})
        write_utf8(self.path, "".join(f"{each}\n" for each in (*self.lines, line)))
        self.lines.append(line)
        self.found[frozenset(sums)] = answer


@contextmanager
def open_answers(path: Path) -> Iterator[AnswerFile]:
    """The answers in a file, none where it is not there; held by this process alone.

    Raises:
        ValueError: a line is no answer, or another process writes answers there.
    """
    make_folder(path.parent)
    try:
        lock = lock_file(path.with_name(f".{path.name}.lock"))
    except BlockingIOError as held:
        raise ValueError(f"{path}: another process writes answers there{held}; end it, or name another file") from None
    with lock:
        text = read_bytes(path).decode("utf-8", "surrogateescape") if path.exists() else ""
        lines = [line for line in text.split("\n") if line]
        answers = AnswerFile(path, lines)
        for number, line in enumerate(lines, 1):
            pair, answer = _parsed(line, f"{path}, line {number}")
            answers.found[pair] = answer
        yield answers


def _parsed(line: str, where: str) -> tuple[frozenset[str], str]:
    value = parse_json(line.encode("utf-8", "surrogateescape"), where)
    match value:
        case {"xxh3": [str(one), str(other)], "answer": str(answer)} if answer in VALUES:
            return frozenset((one, other)), answer
    expected = '{"images": [NAME, NAME], "xxh3": [SUM, SUM], "answer": "same", "different" or "unsure"}'
    raise ValueError(f"{where}: {line:.120}: expected {expected}")
