"""Folders of shards, written by several processes, continued after a kill, and complete once they have their name."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from grappa_dist.console import pluralize
from grappa_dist.data.discovery import committed_index, refuse_other_files
from grappa_dist.data.index import COMMITTED, INDEX_VERSION, entry
from grappa_dist.files import lock_file, read_json, write_json
from grappa_dist.make_shards.filling import THREADS, UNFINISHED_DIR, Filled, ShardJob, already_filled, fill_all
from grappa_dist.make_shards.planning import FolderPlan
from grappa_dist.make_shards.progress import Log, Progress

_PLAN = "plan.json"
_LOGGED_BAD = 20  # undecodable files that are logged one by one


@dataclass
class Building:
    """An unfinished folder, held by a lock, or one that was finished before."""

    plan: FolderPlan
    partial: Path
    filled: dict[int, Filled] = field(default_factory=dict)
    finished: bool = False
    reused: bool = False
    lock: IO[str] | None = None

    @property
    def is_full(self) -> bool:
        return len(self.filled) == self.plan.shards

    def jobs(self) -> Iterator[ShardJob]:
        """The shards that are not filled yet."""
        missing = [number for number in range(self.plan.shards) if number not in self.filled]
        return (self.plan.job(number, self.partial) for number in missing)

    def finish(self) -> None:
        """Gives the folder its name: from then on it is complete."""
        shards = [self.filled[number].shard for number in range(self.plan.shards)]
        lines = [entry(shard) for shard in shards]
        write_json(self.partial / COMMITTED, {"version": INDEX_VERSION, "plan": self.plan.fingerprint, "shards": lines})
        shutil.rmtree(self.partial / UNFINISHED_DIR)
        self.partial.rename(self.plan.folder)
        self.finished = True

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def build(
    plans: Sequence[FolderPlan],
    workers: int,
    *,
    log: Log,
    progress: Callable[[int, int], Progress],
    threads: int = THREADS,
) -> list[Building]:
    """Writes what is missing of the folders; each is complete when it has its name.

    Args:
        progress: makes the progress report from the numbers of images and shards.
        threads: that read and decode, with one worker.
    """
    buildings = [open_building(plan) for plan in plans]  # all are checked before any is changed
    try:
        for building in buildings:
            if not building.finished:
                begin(building)
        _fill_missing(buildings, (workers, threads), log, progress)
    finally:
        for building in buildings:
            building.close()
    return buildings


def _fill_missing(
    buildings: Sequence[Building], at_once: tuple[int, int], log: Log, progress: Callable[[int, int], Progress]
) -> None:
    open_ones = [building for building in buildings if not building.finished]
    shown = progress(sum(len(b.plan.items) for b in open_ones), sum(b.plan.shards for b in open_ones))
    for building in open_ones:
        shown.had_images += sum(filled.shard.rows for filled in building.filled.values())
        shown.done_shards += len(building.filled)
        if building.filled:
            shards = pluralize(building.plan.shards, "shard")
            log(f"{building.plan.folder}: {len(building.filled):,} of {shards} were there")
    by_folder = {str(building.partial): building for building in open_ones}
    jobs = (job for building in open_ones for job in building.jobs())
    logged = 0
    workers = max(1, min(at_once[0], shown.shards - shown.done_shards))
    with closing(fill_all(jobs, workers, shown.add_images, threads=at_once[1])) as filling:
        for filled in filling:
            building = by_folder[filled.folder]
            building.filled[filled.number] = filled
            shown.done_shards += 1
            for line in filled.named[: max(0, _LOGGED_BAD - logged)]:
                log(f"{building.plan.folder.name}: {line}")
                logged += 1
            if building.is_full:
                building.finish()
    for building in open_ones:
        if not building.finished:  # all its shards were there already
            building.finish()


def bad_files(buildings: Sequence[Building]) -> list[tuple[str, str]]:
    """Names of files that do not decode, and why, where that was tried."""
    filled = [building.filled[number] for building in buildings for number in sorted(building.filled)]
    return [file for one in filled for file in one.bad_files]


def bad_reasons(buildings: Sequence[Building]) -> Counter[str]:
    """Files that do not decode, by reason, where that was tried."""
    return sum((filled.bad for building in buildings for filled in building.filled.values()), Counter())


def partial_of(folder: Path) -> Path:
    """What a folder is called while it is made."""
    return folder.with_name(f".{folder.name}.partial")


def open_building(plan: FolderPlan) -> Building:
    """The folder as earlier runs left it.

    Raises:
        ValueError: it, or its unfinished part, was made by another plan.
    """
    partial = partial_of(plan.folder)
    building = Building(plan, partial)
    if committed_index(plan.folder) is not None:
        if read_json(plan.folder / COMMITTED).get("plan") != plan.fingerprint:
            raise ValueError(
                f"{plan.folder}: finished, with other shards than these; remove it or write to another folder"
            )
        building.finished = building.reused = True
        return building
    refuse_other_files(plan.folder)
    if partial.is_dir():
        _compare(plan, partial)
    return building


def _compare(plan: FolderPlan, partial: Path) -> None:
    """Raises ValueError where another plan began the folder."""
    for where in (partial / COMMITTED, partial / UNFINISHED_DIR / _PLAN):
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
    """Prepares a folder: takes the lock, writes the plan, finds the shards that an earlier run finished.

    Raises:
        ValueError: another run is writing it.
    """
    plan, partial = building.plan, building.partial
    unfinished = partial / UNFINISHED_DIR
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        building.lock = lock_file(unfinished / "lock")
    except BlockingIOError as held:
        raise ValueError(f"{partial}: another run is writing here{held}; expected one at a time") from None
    _compare(plan, partial)  # again: another run may have begun, and ended, before the lock was taken
    if not (partial / COMMITTED).is_file():
        write_json(unfinished / _PLAN, {"plan": plan.fingerprint, "settings": plan.settings})
    for left in unfinished.glob("unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
    if (partial / COMMITTED).is_file():  # killed while it was given its name
        shutil.rmtree(unfinished)
        partial.rename(plan.folder)
        building.finished = True
        return
    found = {number: already_filled(partial, number) for number in range(plan.shards)}
    building.filled = {number: filled for number, filled in found.items() if filled is not None}
