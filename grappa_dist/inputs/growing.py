"""Shards of what may grow: each time that images are new, a further folder of shards is added; others keep their bytes.

The folder of an entry holds folders `000`, `001`, ..., each a finished folder of shards, and beside each the keys of
its images in the order of rows, `000.npy`. A key stands for the name of a file, its state (size and time of change),
its class and its task. A shard is used while all its images are there unchanged; what lies in no used shard becomes
the next folder. So a file that is gone or changed makes its shard, and no other, be made anew without it. Who passes
over rows uses a shard while a share of its images is there (`used_from`): then new and changed images alone are made
into shards, until fewer are left.

Shapes: n images that are there now.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from grappa_dist.console import pluralize
from grappa_dist.data.discovery import committed_index
from grappa_dist.data.loader import read_batches
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import lock_file, map_array, save_array
from grappa_dist.make_shards.building import build, partial_of
from grappa_dist.make_shards.collection import in_order
from grappa_dist.make_shards.planning import Limits, plan_folder, prefixes_of
from grappa_dist.make_shards.progress import Log, Progress
from grappa_dist.make_shards.sources import Item

MOST_PER_SHARD, LEAST_PER_SHARD, SHARDS = 1000, 32, 8  # images; shards of few images, which workers share
WHOLE = 16  # images of a batch in which few are embedded, which is padded (defaults.py)
_GENERATION = re.compile(r"\d{3,}")
_MADE = re.compile(r"\.?(?P<number>\d{3,})(\.npy|\.partial)?")
_CHUNK, _THREADS = 1024, 16  # files whose state a thread asks for at a time, as for sizes in planning.py
_PROGRESS_S = 5.0  # between two lines


@dataclass(frozen=True)
class Made:
    """The shards that hold images of now: paths in the order of rows, and which images they hold, (n,) bool."""

    paths: tuple[str, ...]
    holds: NDArray[np.bool_]
    gone: Mapping[str, list[int]] = field(default_factory=dict)  # by tar: rows whose images are no longer there


@dataclass(frozen=True)
class Growing:
    """The images that an entry names now, and the folder that gets their shards."""

    entry: str
    folder: Path
    side: str  # train or test: training images are shuffled
    items: Sequence[Item] = field(repr=False)
    base: Path  # the folder from which the names of files count
    is_ordered: bool = False  # whether the images keep their order even where they train
    used_from: float = 1.0  # the share of a shard's images that have to be there for it to be used

    @cached_property
    def prefixes(self) -> Mapping[Path, str]:
        return prefixes_of({item.source.path for item in self.items}, self.base)

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """Of every image, (n,)."""
        chunks = [self.items[at : at + _CHUNK] for at in range(0, len(self.items), _CHUNK)]
        found = read_batches(chunks, self._keys_of, threads=_THREADS)
        return np.concatenate([np.zeros(0, np.uint64), *found])

    def _keys_of(self, items: Sequence[Item]) -> NDArray[np.uint64]:
        return np.array([xxh3_64_intdigest(self._text_of(item)) for item in items], np.uint64)

    def _text_of(self, item: Item) -> bytes:
        name = self.prefixes[item.source.path] + item.name
        text = "\0".join((name, item.source.stamp(item.name), str(item.label), item.task))
        return text.encode("utf-8", "surrogateescape")

    def made(self) -> Made:
        """What earlier calls have made of the images of now. Writes nothing."""
        order = np.argsort(self.keys, kind="stable")
        ordered = self.keys[order]
        holds = np.zeros(len(self.items), bool)
        paths, gone = list[str](), dict[str, list[int]]()
        for folder in _generations(self.folder):
            shards, used = list(_shards_of(folder)), list[str]()
            for tar, keys in shards:
                there = _there(keys, ordered, order, holds)
                if len(keys) and there.sum() >= max(1, self.used_from * len(keys)):
                    holds[order[np.searchsorted(ordered, keys[there])]] = True
                    used.append(str(tar))
                    gone |= {} if there.all() else {str(tar): np.flatnonzero(~there).tolist()}
            paths += [str(folder)] if len(used) == len(shards) > 0 else used
        return Made(tuple(paths), holds, gone)

    def unneeded(self) -> list[Path]:
        """What lies in the folder and holds no image of now: folders of shards, and unfinished ones."""
        used = {path if Path(path).name.isdigit() else os.path.dirname(path) for path in self.made().paths}
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        mine = ((path, _MADE.fullmatch(path.name)) for path in files)
        return sorted(path for path, name in mine if name and str(self.folder / name["number"]) not in used)

    def make(self, log: Log, count: Callable[[int], None] | None = None) -> Made:
        """The shards of all images; those of images that have none yet are made.

        Args:
            count: gets how many images of new shards are done, in place of lines about it.

        Raises:
            ValueError: an image cannot be read, or another process is making them.
        """
        made = self.made()
        if made.holds.all():
            return made
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(self.folder / "lock")
        except BlockingIOError as held:
            raise ValueError(
                f"{self.folder}: another run is making the shards of {self.entry}{held}; wait for it"
            ) from None
        with lock:
            made = self.made()  # again: another run may have made them before the lock was taken
            if not made.holds.all():
                self._add(np.flatnonzero(~made.holds), log, count, before=int(made.holds.sum()))
                made = self.made()
        return made

    def _add(self, missing: NDArray[np.int64], log: Log, count: Callable[[int], None] | None, *, before: int) -> None:
        """Makes a folder of shards of the images at these places."""
        log(
            f"{self.entry}: makes shards of {pluralize(len(missing), 'image')}, once, in {self.folder}"
            + (f"; {before:,} of {len(self.items):,} were there" if before else "")
        )
        order = list(missing.tolist())
        if not self.is_ordered:
            order = list(in_order(order, self.side, 0))
        folder = self.folder / f"{_next_number(self.folder):03d}"
        plan = plan_folder(
            folder,
            [self.items[place] for place in order],
            Limits(images_per_shard(len(missing)), None),
            None,
            prefixes=self.prefixes,
        )
        keys, partial = folder.with_name(f"{folder.name}.npy"), partial_of(folder)
        if partial.exists() and not (keys.is_file() and np.array_equal(map_array(keys), self.keys[order])):
            shutil.rmtree(partial)  # what was begun was of other images
        save_array(keys, self.keys[order])
        build([plan], 1, log=log, progress=_progress(log, count), threads=len(os.sched_getaffinity(0)))


def images_per_shard(count: int) -> int:
    """Of so many images: a shard is embedded by one worker, so that few images are of several shards, too."""
    return max(LEAST_PER_SHARD, min(MOST_PER_SHARD, count // SHARDS // WHOLE * WHOLE))


def _progress(log: Log, count: Callable[[int], None] | None) -> Callable[[int, int], Progress]:
    return lambda images, shards: Progress(images, shards, log, interval_s=_PROGRESS_S, count=count)


def _there(
    keys: NDArray[np.uint64], ordered: NDArray[np.uint64], order: NDArray[np.int64], holds: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which images of a shard are there, and in no shard that is used already."""
    if not len(ordered):
        return np.zeros(len(keys), bool)
    places = np.searchsorted(ordered, keys).clip(max=len(ordered) - 1)
    return (ordered[places] == keys) & ~holds[order[places]]


def _generations(folder: Path) -> list[Path]:
    """The finished folders of shards of an entry, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _GENERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _next_number(folder: Path) -> int:
    found = _generations(folder)
    return int(found[-1].name) + 1 if found else 0


def _shards_of(folder: Path) -> Iterator[tuple[Path, NDArray[np.uint64]]]:
    """The shards of a finished folder with the keys of their images; none where it is damaged."""
    try:
        index = committed_index(folder)
        keys = map_array(folder.with_name(f"{folder.name}.npy"))
    except (ValueError, OSError):
        return
    shards = [shard for shard, _ in (index or {}).values()]
    if sum(shard.rows for shard in shards) != len(keys):
        return
    start = 0
    for shard in shards:
        yield Path(shard.path), keys[start : start + shard.rows]
        start += shard.rows


def count_rows(paths: Sequence[str], index_dir: Path) -> int:
    """How many images shards hold. Writes nothing."""
    return len(ImageShards.open(paths, index_dir, write=False)) if paths else 0
