"""A wall clock that jumps, in the processes of a test; see clock_jump.c."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.injection import preloaded

SOURCE = Path(__file__).with_name("clock_jump.c")


@dataclass(frozen=True)
class Clock:
    """The time of day of all processes started with `environment`, which may be set while they run.

    Args:
        path: a file to write.
    """

    path: Path

    def __post_init__(self) -> None:
        self.jump_to(0.0)

    def jump_to(self, offset_s: float) -> None:
        """Sets the clock so many seconds ahead of the real time, or behind it."""
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.write(struct.pack("<q", int(offset_s * 1e9)))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment; processes that it starts inherit it (Ray's workers included)."""
        return self.environment_after(os.environ)

    def environment_after(self, before: Mapping[str, str]) -> dict[str, str]:
        """The same for processes that also load what `before` does."""
        return preloaded(SOURCE, {"CLOCK_JUMP": str(self.path.resolve())}, before)
