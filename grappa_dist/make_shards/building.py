"""Folders of shards, written side by side, taken up again after a kill, and complete once they have their name.

What a long command says on stderr: a line that renews itself on a terminal, a line now and then elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from grappa_dist.data.discovery import committed_index
from grappa_dist.data.index import COMMITTED, INDEX_VERSION, entry
from grappa_dist.files import read_json, write_json
from grappa_dist.make_shards.filling import MAKING, Filled, ShardJob, already_filled, fill_all
from grappa_dist.make_shards.planning import FolderPlan

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


_PLAN = "plan.json"
_TOLD_BAD = 20  # undecodable files that are named while they are met


@dataclass
class Building:
    """A folder in the making, held by a lock, or one that was finished before."""

    plan: FolderPlan
    partial: Path
    filled: dict[int, Filled] = field(default_factory=dict)
    finished: bool = False
    reused: bool = False
    lock: int = -1  # descriptor

    @property
    def is_full(self) -> bool:
        return len(self.filled) == self.plan.shards

    def jobs(self) -> Iterator[ShardJob]:
        """The shards that no earlier run finished."""
        missing = [number for number in range(self.plan.shards) if number not in self.filled]
        return (self.plan.job(number, self.partial) for number in missing)

    def finish(self) -> None:
        """Gives the folder its name: from then on it is complete."""
        shards = [self.filled[number].shard for number in range(self.plan.shards)]
        lines = [entry(shard) for shard in shards]
        write_json(self.partial / COMMITTED, {"version": INDEX_VERSION, "plan": self.plan.fingerprint, "shards": lines})
        shutil.rmtree(self.partial / MAKING)
        self.partial.rename(self.plan.folder)
        self.finished = True

    def close(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def open_building(plan: FolderPlan) -> Building:
    """The folder as earlier runs left it.

    Raises:
        ValueError: it, or its part in the making, was made by another plan, or another run is at it.
    """
    partial = plan.folder.with_name(f".{plan.folder.name}.partial")
    building = Building(plan, partial)
    if committed_index(plan.folder) is not None:
        if read_json(plan.folder / COMMITTED).get("plan") != plan.fingerprint:
            raise ValueError(
                f"{plan.folder}: finished, with other shards than these; remove it or write to another folder"
            )
        building.finished = building.reused = True
    elif plan.folder.is_dir() and any(plan.folder.iterdir()):
        raise ValueError(f"{plan.folder}: not empty and without {COMMITTED}; expected a new or a finished folder")
    elif partial.is_dir():
        _compare(plan, partial)
    return building


def _compare(plan: FolderPlan, partial: Path) -> None:
    """Refuses what another plan began."""
    for where in (partial / COMMITTED, partial / MAKING / _PLAN):
        if where.is_file():
            began: dict[str, Any] = read_json(where)
            if began.get("plan") == plan.fingerprint:
                return
            before, now = began.get("settings", {}), plan.settings
            other = [
                f"{key} was {before[key]}, now {now[key]}" for key in now if key in before and before[key] != now[key]
            ]
            raise ValueError(
                f"{partial}: begun with another plan ({'; '.join(other) or 'other files, labels or order'}); "
                "run that again to go on, or remove the folder to start over"
            )


def begin(building: Building) -> None:
    """Takes a folder into hand: the lock, the plan, what an earlier run finished."""
    plan, partial = building.plan, building.partial
    making = partial / MAKING
    making.mkdir(parents=True, exist_ok=True)
    building.lock = os.open(making / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(building.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{partial}: another run is writing here; expected one at a time") from None
    _compare(plan, partial)  # again: another run may have begun, and ended, before the lock was ours
    if not (partial / COMMITTED).is_file():
        write_json(making / _PLAN, {"plan": plan.fingerprint, "settings": plan.settings})
    for left in making.glob("unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
    if (partial / COMMITTED).is_file():  # killed while it was given its name
        shutil.rmtree(making)
        partial.rename(plan.folder)
        building.finished = True
        return
    found = {number: already_filled(partial, number) for number in range(plan.shards)}
    building.filled = {number: filled for number, filled in found.items() if filled is not None}


def build(
    plans: Sequence[FolderPlan], workers: int, *, tell: Tell, progress: Callable[[int, int], Progress]
) -> list[Building]:
    """Writes what is missing of the folders; each is complete when it has its name.

    Args:
        progress: given the numbers of images and shards.
    """
    buildings = [open_building(plan) for plan in plans]  # all are looked at before any is touched
    try:
        for building in buildings:
            if not building.finished:
                begin(building)
        _fill_missing(buildings, workers, tell, progress)
    finally:
        for building in buildings:
            building.close()
    return buildings


def _fill_missing(
    buildings: Sequence[Building], workers: int, tell: Tell, progress: Callable[[int, int], Progress]
) -> None:
    open_ones = [building for building in buildings if not building.finished]
    shown = progress(sum(len(b.plan.items) for b in open_ones), sum(b.plan.shards for b in open_ones))
    for building in open_ones:
        shown.had_images += sum(filled.shard.rows for filled in building.filled.values())
        shown.done_shards += len(building.filled)
        if building.filled:
            tell(f"{building.plan.folder}: {len(building.filled):,} of {building.plan.shards:,} shards were there")
    by_folder = {str(building.partial): building for building in open_ones}
    jobs = (job for building in open_ones for job in building.jobs())
    told = 0
    with closing(fill_all(jobs, max(1, min(workers, shown.shards - shown.done_shards)), shown.add_images)) as filling:
        for filled in filling:
            building = by_folder[filled.folder]
            building.filled[filled.number] = filled
            shown.done_shards += 1
            for line in filled.named[: max(0, _TOLD_BAD - told)]:
                tell(f"{building.plan.folder.name}: {line}")
                told += 1
            if building.is_full:
                building.finish()
    for building in open_ones:
        if not building.finished:  # all its shards were there already
            building.finish()


def bad_files(buildings: Sequence[Building]) -> Counter[str]:
    """Files that do not decode, by reason, where that was tried."""
    return sum((filled.bad for building in buildings for filled in building.filled.values()), Counter())
