"""Small labelled images of several granularities, as many as are asked for, drawn by processes side by side.

`kinds`      eight classes: the pattern is the class's, all colours are the image's
`species`    a class for 40 images: pattern and main colour are the class's
`instances`  a class for 8 images: all but small changes is the class's

Images are arithmetic on arrays, many at once, so that a million takes minutes: a drawing of the demo takes 2 ms, one of
these some 0.2 ms. Shapes: B images drawn at once, S = SIZE_PX.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.data.rng import stream
from grappa_dist.files import replace

SIZE_PX = 32
PART_IMAGES = 10_000  # of a tar, which one process draws
BAD_EVERY = 1000  # one of so many images is cut short and does not decode
KINDS, PER_SPECIES, PER_INSTANCE = 8, 40, 8
WAVES = 3  # of a pattern
_AT_ONCE = 500
_COLUMNS = ("file", "fine", "dataset", "split")


@dataclass(frozen=True)
class Part:
    """Consecutive images of one task and split, which one process writes as a tar and a CSV."""

    split: str
    task: str
    first: int  # of the task's images in this split
    count: int
    num_classes: int  # of the task in this split

    @property
    def name(self) -> str:
        return f"{self.split}-{self.task}-{self.first:09d}"


def parts_of(num_train: int, num_test: int) -> list[Part]:
    """All parts: a quarter of the images are kinds and a quarter instances; half are species, one large test task."""
    parts = list[Part]()
    for split, count in (("train", num_train), ("test", num_test)):
        quarter = count // 4
        sizes = {"kinds": quarter, "species": count - 2 * quarter, "instances": quarter}
        classes = {
            "kinds": KINDS,
            "species": -(-sizes["species"] // PER_SPECIES),
            "instances": -(-quarter // PER_INSTANCE),
        }
        for task, size in sizes.items():
            for first in range(0, size, PART_IMAGES):
                parts.append(Part(split, task, first, min(PART_IMAGES, size - first), classes[task]))
    return parts


def draw(folder: Path, parts: list[Part], processes: int, log: Callable[[str], None]) -> None:
    """Draws the parts that are not there yet, each into a tar with a CSV beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [part for part in parts if not (folder / f"{part.name}.csv").exists()]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for number, part in enumerate(pool.map(_write, [folder] * len(left), left)):
                log(f"{number + 1} of {len(left)} parts drawn ({part})")
        except BaseException:  # SIGTERM and Ctrl-C as well: those that are not begun are left
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write(folder: Path, part: Part) -> str:
    rows = list[tuple[str, str, str, str]]()

    def write_tar(path: Path) -> None:
        rows.clear()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (label, encoded) in enumerate(encoded_images(part)):
                member = tarfile.TarInfo(f"{part.first + number:09d}.jpg")
                member.size = len(encoded)
                tar.addfile(member, io.BytesIO(encoded))
                rows.append((member.name, label, part.task, part.split))

    def write_list(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])

    replace(folder / f"{part.name}.tar", write_tar)
    replace(folder / f"{part.name}.csv", write_list)  # the last of a part: where it is, the part is there
    return part.name


def encoded_images(part: Part) -> Iterator[tuple[str, bytes]]:
    """Label and JPEG of every image of a part: a pure function of it. One of BAD_EVERY is cut after 20 bytes."""
    for start in range(part.first, part.first + part.count, _AT_ONCE):
        places = np.arange(start, min(start + _AT_ONCE, part.first + part.count))
        each = {"kinds": 1, "species": PER_SPECIES, "instances": PER_INSTANCE}[part.task]
        classes = places // each % part.num_classes
        pixels = _pixels(part, classes, start)
        for place, number, image in zip(places.tolist(), classes.tolist(), pixels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=90)
            bad = place % BAD_EVERY == BAD_EVERY - 1
            yield f"{part.split}-{number:06d}", buffer.getvalue()[: 20 if bad else None]


def _pixels(part: Part, classes: NDArray[np.int64], start: int) -> NDArray[np.uint8]:
    """Images of these classes, (B, S, S, 3)."""
    of_class = {number: _traits(stream("scale", part.split, part.task, number)) for number in set(classes.tolist())}
    angles, waves, colours, places = (np.stack(x) for x in zip(*(of_class[n] for n in classes.tolist()), strict=True))
    rng, count = stream("scale", part.split, part.task, "images", start), len(classes)
    if part.task == "kinds":
        colours = rng.uniform(0, 1, colours.shape)
    if part.task == "species":
        colours[:, 1:] = rng.uniform(0, 1, colours[:, 1:].shape)
    if part.task != "instances":
        places = rng.uniform(-1, 1, places.shape)
    angles = angles + rng.normal(0, 0.06, angles.shape)
    phases = places[:, :, 0] * np.pi + rng.normal(0, 0.3, angles.shape)
    ramp = np.linspace(-1, 1, SIZE_PX)
    turned = (
        np.cos(angles)[..., None, None] * ramp + np.sin(angles)[..., None, None] * ramp[:, None]
    )  # (B, WAVES, S, S)
    pattern = np.cos(waves[..., None, None] * turned + phases[..., None, None]) / WAVES
    found = np.einsum("bwyx,bwc->byxc", pattern, colours[:, 1:] - 0.5) * 1.6 + colours[:, None, None, 0]
    near = (
        np.square(ramp - places[:, :1, 0, None])[:, 0, None] + np.square(ramp - places[:, :1, 1, None])[:, 0, :, None]
    )
    found += np.exp(-8 * near)[..., None] * (colours[:, None, None, -1] - found)  # a spot
    found = found * rng.uniform(0.8, 1.2, (count, 1, 1, 1)) + rng.normal(0, 0.03, found.shape)
    pixels: NDArray[np.uint8] = (found * 255).clip(0, 255).astype(np.uint8)
    return pixels


def _traits(rng: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    """A class: angles and frequencies of waves (WAVES,), colours (1 + WAVES, 3), places (WAVES, 2)."""
    return (
        rng.uniform(0, np.pi, WAVES),
        rng.uniform(2, 14, WAVES),
        rng.uniform(0, 1, (1 + WAVES, 3)),
        rng.uniform(-1, 1, (WAVES, 2)),
    )
