"""Reading images against a plain webdataset + DataLoader loop, and against decoding alone.

All sides see the same images, draw the same crops, and have as many threads (ours, decoding alone) or processes (the
DataLoader) as the others. Every side has gone through all images once before its clock runs.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Timing, add_run, turns
from grappa_dist.bench.arguments import check_least
from grappa_dist.bench.photos import drawn_shards, image_of, users_shards
from grappa_dist.data.decoding import BadImage, Picture, Pixels, decode, open_picture
from grappa_dist.data.loader import load_or_skip, read_batches
from grappa_dist.data.progress import Tell
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess, draw_crop, view_generator

OURS, PLAIN, SAME, ALONE, JPEG = (
    "ours",
    "webdataset + DataLoader, Pillow",
    "webdataset + DataLoader, our decoding",
    "decoding alone",
    "decoding alone, full scale, not resized",
)
AUGMENTED, TEST = "augmented", "test"
MIN_CROP_AREA = 0.25
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class DataSettings:
    """What `bench.py data` was asked for."""

    shards: tuple[str, ...] | None = None
    rows: int = 1024
    width: int = 500
    height: int = 375
    image_size: int = 224
    batch: int = 64
    threads: int = 2
    repeats: int = 3
    views: tuple[str, ...] = (AUGMENTED, TEST)
    seed: int = 0

    def check(self) -> None:
        check_least(self, rows=1, width=1, height=1, image_size=1, batch=1, threads=1, repeats=1, seed=0)


@dataclass(frozen=True)
class Speed:
    """How one side went through all rows, so many times."""

    name: str
    rows: int
    timing: Timing

    @property
    def images_per_s(self) -> float:
        return self.rows / self.timing.seconds

    @property
    def images_per_cpu_s(self) -> float:
        return self.rows / self.timing.cpu


@dataclass(frozen=True)
class ViewFindings:
    """All sides on one kind of view."""

    view: str
    speeds: dict[str, Speed]

    def ratio(self, judge: str) -> float:
        return self.speeds[OURS].images_per_s / self.speeds[judge].images_per_s

    def cpu_ratio(self, judge: str) -> float:
        return self.speeds[OURS].images_per_cpu_s / self.speeds[judge].images_per_cpu_s

    @property
    def verdict(self) -> str:
        shares = ", ".join(f"{self.ratio(j):.2f}x {j} ({self.cpu_ratio(j):.2f}x by CPU)" for j in (PLAIN, SAME, ALONE))
        return f"{self.view}: ours {shares}"


@dataclass(frozen=True)
class DataFindings:
    """All that was measured."""

    source: str
    settings: DataSettings
    views: list[ViewFindings]


def measure_data(settings: DataSettings, tell: Tell) -> DataFindings:
    settings.check()
    torch.set_num_threads(1)  # sides are compared by their own threads or processes
    with tempfile.TemporaryDirectory() as folder:
        tell("images")
        if settings.shards is None:
            images, source = drawn_shards(Path(folder), settings.rows, (settings.width, settings.height), settings.seed)
        else:
            images, source = users_shards(settings.shards)
        return DataFindings(source, settings, [_compare(images, view, settings, tell) for view in settings.views])


def _compare(images: ImageShards, view: str, settings: DataSettings, tell: Tell) -> ViewFindings:
    work = _Work(images, view, settings)
    sides: dict[str, Callable[[], int]] = {
        OURS: work.ours,
        PLAIN: work.loop(work.by_pillow),
        SAME: work.loop(work.by_ours),
        ALONE: work.alone,
        JPEG: work.jpeg,
    }
    runs: dict[str, Timing] = {}
    for repeat, order in enumerate(turns(list(sides), settings.repeats + 1)):
        for name in order:
            tell(f"{view}, {'warm-up' if repeat == 0 else f'run {repeat} of {settings.repeats}'}: {name}")
            timing = _timed(sides[name], work.rows)
            if repeat:
                add_run(runs, name, timing)
    work.close()
    return ViewFindings(view, {name: Speed(name, work.rows, runs[name]) for name in sides})


def _timed(work: Callable[[], int], rows: int) -> Timing:
    wall, cpu = time.perf_counter(), _cpu_s()
    seen = work()
    timing = Timing((time.perf_counter() - wall,), (_cpu_s() - cpu,))
    assert seen == rows, f"{seen} of {rows} rows were seen"
    return timing


def _cpu_s() -> float:
    """CPU seconds of this process and of the workers that it has started."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime
    return total


class _Work:
    """One pass over all rows, by each side; bad rows are black for all of them."""

    def __init__(self, images: ImageShards, view: str, settings: DataSettings) -> None:
        self._images, self._view, self._settings = images, view, settings
        self._preprocess = Preprocess(settings.image_size)
        self._shape = (settings.image_size, settings.image_size, 3)
        self.rows = len(images)
        self._files = [images.image_bytes(row) for row in range(self.rows)]
        self._row_of = {images.key(row): row for row in range(self.rows)}
        self._loaders: list[Any] = []

    def ours(self) -> int:
        def read(start: int) -> Pixels:
            rows = range(start, min(start + self._settings.batch, self.rows))
            return load_or_skip(self._images, rows, self._make, self._shape)[0]

        starts = range(0, self.rows, self._settings.batch)
        return sum(len(batch) for batch in read_batches(starts, read, threads=self._settings.threads))

    def loop(self, one: Callable[[bytes, int], Pixels]) -> Callable[[], int]:
        """A loop as people write it: tars by webdataset, worker processes by DataLoader."""
        import webdataset

        paths = [shard.path for shard in self._images.shards]
        dataset = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).map(
            lambda sample: one(image_of(sample), self._row_of[sample["__key__"]])
        )
        workers = min(self._settings.threads, len(paths))
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=self._settings.batch, num_workers=workers, persistent_workers=True
        )
        self._loaders.append(loader)
        return lambda: sum(len(batch) for batch in loader)

    def alone(self) -> int:
        return self._spread(self.by_ours)

    def jpeg(self) -> int:
        def read(data: bytes, row: int) -> None:
            with suppress(BadImage):
                open_picture(data).pixels()

        return self._spread(read)

    def by_ours(self, data: bytes, row: int) -> Pixels:
        try:
            return self._make(open_picture(data), row)
        except BadImage:
            return np.zeros(self._shape, dtype=np.uint8)

    def by_pillow(self, data: bytes, row: int) -> Pixels:
        """The same view, by Pillow alone."""
        try:
            image = decode(data)
        except BadImage:
            return np.zeros(self._shape, dtype=np.uint8)
        side, method = self._settings.image_size, Image.Resampling.BICUBIC
        if self._view == TEST:
            scale = side / min(image.size)
            wide, high = (max(side, int(edge * scale)) for edge in image.size)
            left, top = (wide - side) // 2, (high - side) // 2
            return np.array(image.resize((wide, high), method).crop((left, top, left + side, top + side)))
        crop = draw_crop(image.width, image.height, MIN_CROP_AREA, self._draws(row))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        resized = image.resize((side, side), method, box=box)
        return np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else resized)

    def close(self) -> None:
        self._loaders.clear()  # ends their processes

    def _make(self, picture: Picture, row: int) -> Pixels:
        if self._view == TEST:
            return self._preprocess.test(picture)
        return self._preprocess.augment(picture, self._draws(row), MIN_CROP_AREA)

    def _draws(self, row: int) -> np.random.Generator:
        return view_generator(self._settings.seed, 0, row, 0)

    def _spread(self, one: Callable[[bytes, int], object]) -> int:
        """`one` of every row, in threads, with nothing kept; files are in memory."""

        def all_of(share: range) -> int:
            for row in share:
                one(self._files[row], row)
            return len(share)

        threads = self._settings.threads
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(all_of, [range(first, self.rows, threads) for first in range(threads)]))
