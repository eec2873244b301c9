"""What a long command prints: on a terminal a progress line that renews itself, elsewhere one now and then; tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from grappa_dist.console import pluralize
from grappa_dist.output import printable_line, without_secrets
from grappa_dist.progress import about

Log = Callable[[str], None]  # takes a line


class Terminal:
    """Lines that stay (`log`), and one line at the bottom of a terminal that is replaced (`renew`)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_interactive = stream.isatty()
        self._renewed = False

    def log(self, line: str) -> None:
        """A line that stays; control characters, as names of files may have, are shown and not obeyed."""
        self._write(f"{printable_line(without_secrets(line))}\n")
        self._renewed = False

    def renew(self, line: str) -> None:
        """Shows a line until the next one; only for an interactive stream."""
        self._write(line)
        self._renewed = True

    def _write(self, text: str) -> None:
        self.stream.write(f"\r\x1b[K{text}" if self._renewed else text)
        self.stream.flush()


@dataclass
class Progress:
    """Logs how far the writing of shards is, every `interval_s` at most."""

    images: int  # in all
    shards: int
    log: Log
    interval_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    had_images: int = 0  # finished before this run
    done_shards: int = 0
    made_images: int = 0
    count: Callable[[int], None] | None = None  # gets the number of images that are done, in place of lines
    _began: float = field(init=False)
    _logged: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self._logged = self.clock()

    def add_images(self, number: int) -> None:
        """Counts images that were written, and tells of it if it is time."""
        self.made_images += number
        if self.count is not None:
            self.count(self.had_images + self.made_images)
            return
        now = self.clock()
        if now - self._logged >= self.interval_s:
            self._logged = now
            done = (self.had_images + self.made_images, self.images)
            self.log(progress_line(done, (self.done_shards, self.shards), now - self._began, self.made_images))


def progress_line(images: tuple[int, int], shards: tuple[int, int], seconds: float, made: int) -> str:
    """How far it is, how fast, and how long it will take; `made` images took the seconds, the others were there."""
    rate = made / seconds if seconds > 0 else 0.0
    left = f", {about((images[1] - images[0]) / rate)} left" if rate > 0 else ""
    done = f"{images[0]:,} of {pluralize(images[1], 'image')}, {shards[0]:,} of {pluralize(shards[1], 'shard')}"
    return f"{done}, {rate:,.0f} images/s{left}"


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column aligned to the left, the others to the right."""
    lines = [[printable_line(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
