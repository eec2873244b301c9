"""What a long command says on stderr: a line that renews itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and ends of lines

Tell = Callable[[str], None]


class Console:
    """Lines that stay (`tell`), and one line at the bottom of a terminal that is replaced (`renew`)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._renewed = False

    def tell(self, line: str) -> None:
        """A line that stays; control characters, as names of files may have, are shown and not obeyed."""
        self._write(f"{_CONTROLS.sub(lambda found: repr(found[0])[1:-1], line)}\n")
        self._renewed = False

    def renew(self, line: str) -> None:
        """Shows a line until the next one; only for a terminal."""
        self._write(line)
        self._renewed = True

    def _write(self, text: str) -> None:
        self.stream.write(f"\r\x1b[K{text}" if self._renewed else text)
        self.stream.flush()


def progress_line(images: tuple[int, int], shards: tuple[int, int], seconds: float, made: int) -> str:
    """How far it is, how fast, and how long it will take; `made` images took the seconds, the others were there."""
    rate = made / seconds if seconds > 0 else 0.0
    left = duration((images[1] - images[0]) / rate) if rate > 0 else "unknown"
    done = f"{images[0]:,} of {images[1]:,} images, {shards[0]:,} of {shards[1]:,} shards"
    return f"{done}, {rate:,.0f} images/s, {left} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 7:05 min, 3:20 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


@dataclass
class Progress:
    """Tells how far the writing of shards is, not too often."""

    images: int  # in all
    shards: int
    tell: Tell  # used every `interval_s`
    interval_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    had_images: int = 0  # finished before this run
    done_shards: int = 0
    made_images: int = 0
    _began: float = field(init=False)
    _told: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self._told = self.clock()

    def tick(self) -> None:
        """Tells, if it is time."""
        now = self.clock()
        if now - self._told >= self.interval_s:
            self._told = now
            done = (self.had_images + self.made_images, self.images)
            self.tell(progress_line(done, (self.done_shards, self.shards), now - self._began, self.made_images))

    def add_images(self, number: int) -> None:
        self.made_images += number
        self.tick()

    @property
    def seconds(self) -> float:
        return self.clock() - self._began
