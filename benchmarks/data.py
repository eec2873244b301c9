"""Reading images against a plain webdataset + DataLoader loop, and against decoding alone.

All sides read the same images, draw the same crops, and have the same number of threads (ours, decoding alone) or
processes (the DataLoader). Every side reads all images once before its clock starts. The images are drawn ones that
are as hard to decode as photographs, or a user's shards.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Log, Timing, add_run, aligned, aligned_header, check_least, machine, turns
from grappa_dist.data.decoding import BadImage, Picture, Pixels, decode, open_picture
from grappa_dist.data.index import IMAGE_SUFFIXES
from grappa_dist.data.loader import load_or_skip, read_batches
from grappa_dist.data.rng import view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess, draw_crop
from grappa_dist.data.writer import ShardWriter

OURS, PLAIN, SAME, ALONE, JPEG = (
    "ours",
    "webdataset + DataLoader, Pillow",
    "webdataset + DataLoader, our decoding",
    "decoding alone",
    "decoding alone, full scale, not resized",
)
AUGMENTED, TEST = "augmented", "test"
MIN_CROP_AREA = 0.25
PHOTO_PX = (500, 375)  # width and height of a drawn image
_DISTINCT = 32  # drawn images; more rows repeat them
_QUALITY = 90  # of their JPEG encoding
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of /proc/<pid>/stat in a second


def images_to_measure(
    folder: Path, shards: Sequence[str] | None, rows: int, size_px: tuple[int, int], seed: int
) -> tuple[ImageShards, str]:
    """The user's shards, else `rows` drawn images in `folder`, and a line about them."""
    return drawn_shards(folder, rows, size_px, seed) if shards is None else users_shards(shards)


def drawn_shards(folder: Path, rows: int, size_px: tuple[int, int], seed: int) -> tuple[ImageShards, str]:
    """Shards of drawn images, and a line about them."""
    width, height = size_px
    photos = [drawn_photo(width, height, seed * _DISTINCT + i) for i in range(min(rows, _DISTINCT))]
    with ShardWriter(folder / "drawn", rows_per_shard=max(1, rows // 16)) as writer:
        for row in range(rows):
            writer.write(photos[row % len(photos)], "jpg")
    kib = sum(map(len, photos)) / len(photos) / 1024
    about = f"{rows} JPEGs of {width} x {height} pixels, {kib:.0f} KiB each, {len(photos)} different, seed {seed}"
    return ImageShards.open([folder / "drawn"], None), f"drawn: {about}"


def drawn_photo(width: int, height: int, seed: int) -> bytes:
    """A random JPEG with a spectrum of 1/f, like a photograph: about 0.6 bytes a pixel."""
    rng = np.random.default_rng(seed)
    noises = rng.standard_normal((2, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    fields = [np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width)) for noise in noises]
    light, hue = (field / field.std() for field in fields)
    pixels = 120 + 45 * np.stack([light + 0.3 * hue, light, light - 0.3 * hue], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def users_shards(paths: Sequence[str]) -> tuple[ImageShards, str]:
    """The shards at `paths`, indexed in memory, and a line about them."""
    shards = ImageShards.open(list(paths), None)
    total = sum(int(shards.index(i)["size"].sum()) for i in range(len(shards.shards)))
    return shards, f"real: {len(shards)} images of {total / len(shards) / 1024:.0f} KiB in {len(shards.shards)} tars"


def image_of(sample: Mapping[str, Any]) -> bytes:
    """The encoded image of a sample of webdataset."""
    return next(bytes(sample[suffix]) for suffix in IMAGE_SUFFIXES if suffix in sample)


@dataclass(frozen=True)
class DataSettings:
    """Options of `bench.py data`."""

    shards: tuple[str, ...] | None = None
    rows: int = 1024
    width: int = PHOTO_PX[0]
    height: int = PHOTO_PX[1]
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
    """Runs of one side over all rows."""

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

    def ratio(self, baseline: str) -> float:
        return self.speeds[OURS].images_per_s / self.speeds[baseline].images_per_s

    def cpu_ratio(self, baseline: str) -> float:
        return self.speeds[OURS].images_per_cpu_s / self.speeds[baseline].images_per_cpu_s

    @property
    def verdict(self) -> str:
        ratios = [f"{self.ratio(b):.2f}x {b} ({self.cpu_ratio(b):.2f}x by CPU)" for b in (PLAIN, SAME, ALONE)]
        return f"{self.view}: ours {', '.join(ratios)}"


@dataclass(frozen=True)
class DataFindings:
    """Results of `bench.py data`."""

    source: str
    settings: DataSettings
    views: list[ViewFindings]


def measure_data(settings: DataSettings, log: Log) -> DataFindings:
    settings.check()
    torch.set_num_threads(1)  # sides are compared by their own threads or processes
    with tempfile.TemporaryDirectory() as folder:
        log("images")
        size_px = settings.width, settings.height
        images, source = images_to_measure(Path(folder), settings.shards, settings.rows, size_px, settings.seed)
        return DataFindings(source, settings, [_compare(images, view, settings, log) for view in settings.views])


def _compare(images: ImageShards, view: str, settings: DataSettings, log: Log) -> ViewFindings:
    work = Sides(images, view, settings)
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
            log(f"{view}, {'warm-up' if repeat == 0 else f'run {repeat} of {settings.repeats}'}: {name}")
            timing = _timed(sides[name], work.rows)
            if repeat:
                add_run(runs, name, timing)
    work.close()
    return ViewFindings(view, {name: Speed(name, work.rows, runs[name]) for name in sides})


def _timed(work: Callable[[], int], rows: int) -> Timing:
    wall, cpu = time.perf_counter(), _cpu_s()
    seen = work()
    timing = Timing((time.perf_counter() - wall,), (_cpu_s() - cpu,))
    assert seen == rows, f"{seen} of {rows} rows were read"
    return timing


def _cpu_s() -> float:
    """CPU seconds of this process and of its running worker processes."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime
    return total


class Sides:
    """One method per side that reads all rows and returns their number; bad rows are black for all sides."""

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

    def loop(self, make_view: Callable[[bytes, int], Pixels]) -> Callable[[], int]:
        """The usual loop: tars by webdataset, worker processes by DataLoader."""
        import webdataset

        paths = [shard.path for shard in self._images.shards]
        dataset = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).map(
            lambda sample: make_view(image_of(sample), self._row_of[sample["__key__"]])
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
        """The same view by Pillow alone."""
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
        crop = draw_crop(image.width, image.height, MIN_CROP_AREA, self._rng(row))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        resized = image.resize((side, side), method, box=box)
        return np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else resized)

    def close(self) -> None:
        """Ends the DataLoaders' processes."""
        self._loaders.clear()

    def _make(self, picture: Picture, row: int) -> Pixels:
        if self._view == TEST:
            return self._preprocess.test(picture)
        return self._preprocess.augment(picture, self._rng(row), MIN_CROP_AREA)

    def _rng(self, row: int) -> np.random.Generator:
        return view_generator(self._settings.seed, 0, row, 0)

    def _spread(self, work: Callable[[bytes, int], object]) -> int:
        """Calls `work` with the bytes of every row, in threads; files are in memory, results are dropped."""

        def all_of(rows: range) -> int:
            for row in rows:
                work(self._files[row], row)
            return len(rows)

        threads = self._settings.threads
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(all_of, [range(first, self.rows, threads) for first in range(threads)]))


def as_text(header: dict[str, str], findings: DataFindings) -> str:
    settings = findings.settings
    about = f"{settings.image_size} px, batches of {settings.batch}, medians of {settings.repeats} runs"
    blocks = [aligned_header({**header, "images": findings.source, "views": about})]
    return "\n\n".join([*blocks, *map(_view_text, findings.views)])


def _view_text(found: ViewFindings) -> str:
    lines = [[f"{found.view} views", "images/s", "images/CPU s", "ours/baseline", "by CPU"]]
    for name, speed in found.speeds.items():
        own = name == OURS
        ratios = ["-", "-"] if own else [f"{found.ratio(name):.2f}", f"{found.cpu_ratio(name):.2f}"]
        lines.append([name, f"{speed.images_per_s:.0f}", f"{speed.images_per_cpu_s:.0f}", *ratios])
    return f"{aligned(lines)}\n{found.verdict}"


def as_json(header: dict[str, str], findings: DataFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "images": findings.source,
        "views": [
            {
                "view": found.view,
                "sides": [
                    {
                        "name": speed.name,
                        "images": speed.rows,
                        "runs_s": speed.timing.runs,
                        "cpu_runs_s": speed.timing.cpu_runs,
                        "images_per_s": speed.images_per_s,
                        "images_per_cpu_s": speed.images_per_cpu_s,
                    }
                    for speed in found.speeds.values()
                ],
                "ratio": {name: found.ratio(name) for name in found.speeds if name != OURS},
                "cpu_ratio": {name: found.cpu_ratio(name) for name in found.speeds if name != OURS},
            }
            for found in findings.views
        ],
    }


SHORT = "against webdataset + DataLoader"
DESCRIPTION = """\
Reading, decoding and cropping images: ours against a plain webdataset + DataLoader loop (by Pillow, and by
our own decoding) and against decoding alone, from memory. The same images, crops and number of threads or processes.
Prints images/s and ratios (ours / baseline: above 1, ours is faster), for the augmented crops of training and for test
views."""
EXAMPLE = """example, half a minute:
  python launch/bench.py data --rows 512 --repeats 1 --json data.json

`images/CPU s` is the speed of one core, whatever else the machine does."""


def arguments(add: Callable[..., Any]) -> None:
    add("--shards", nargs="+", metavar="DIR_OR_TAR", help="real images; default: drawn ones")
    add("--rows", type=int, default=1024, metavar="N", help="drawn images; default: %(default)s")
    add("--width", type=int, default=PHOTO_PX[0], metavar="PX", help="of drawn images; default: %(default)s")
    add("--height", type=int, default=PHOTO_PX[1], metavar="PX", help="of drawn images; default: %(default)s")
    add("--image-size", type=int, default=224, metavar="PX", help="side of a view; default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="threads or processes of a side; default: %(default)s")
    add("--views", nargs="+", choices=(AUGMENTED, TEST), default=[AUGMENTED, TEST])
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    options["views"] = tuple(options["views"])
    options["shards"] = tuple(options["shards"]) if options["shards"] else None
    settings = DataSettings(**options)
    header = machine(settings.threads, "pillow", "simplejpeg", "webdataset")
    findings = measure_data(settings, log)
    return as_text(header, findings), as_json(header, findings)
