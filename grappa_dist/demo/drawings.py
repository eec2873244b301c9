"""The demo data set: images that the program draws, in three retrieval tasks of differing granularity.

`kinds`      sixteen kinds of things with large variation within each: any boat is a boat
`species`    butterflies: a species is a wing shape, a spot pattern, a band and an approximate hue
`instances`  monsters: a class is one monster, seen in several poses, lights and places

Shapes: P points of a curve, (P, 2).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.data.rng import stream
from grappa_dist.demo.canvas import (
    DARK,
    WHITE,
    Canvas,
    Colour,
    Inks,
    arc,
    backdrop,
    box,
    ellipse,
    hsv,
    pick_inks,
)

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Drawing:
    """One image of the data set; `task` and `label` are for evaluation alone."""

    split: str  # "train" or "test"; the classes of the two are disjoint
    task: str
    label: str
    encoded: bytes
    suffix: str  # "jpg" or "png"


@dataclass(frozen=True)
class Task:
    """One task at a given scale: its sorted classes and the number of images of each."""

    name: str
    labels: list[str]
    per_class: dict[str, int]  # by split
    suffix: str

    def classes(self, split: str) -> list[str]:
        """The first half of the sorted classes trains, the second half tests."""
        half = (len(self.labels) + 1) // 2
        return self.labels[:half] if split == "train" else self.labels[half:]


def tasks(scale: float = 1.0) -> list[Task]:
    """The tasks at `scale`: kinds and species grow by images per class, instances by classes."""
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")

    def times(number: int) -> int:
        return max(2, round(number * scale))  # a single image would have no other to retrieve

    return [
        Task("kinds", sorted(SKETCHES), {"train": times(60), "test": times(37)}, "jpg"),
        Task("species", sorted(SPECIES), {"train": times(40), "test": times(25)}, "png"),
        Task("instances", sorted(map(monster_name, range(times(150)))), {"train": 6, "test": 4}, "png"),
    ]


def sizes(scale: float = 1.0) -> dict[str, int]:
    """The number of images of each split that `draw` yields."""
    return {split: sum(len(task.classes(split)) * task.per_class[split] for task in tasks(scale)) for split in SPLITS}


def draw(scale: float = 1.0, seed: int = 0) -> Iterator[Drawing]:
    """Draws the data set: train first; within a split task by task, class by class."""
    for split in SPLITS:
        for task in tasks(scale):
            for label in task.classes(split):
                for instance in range(task.per_class[split]):
                    image = picture(seed, task.name, label, instance)
                    yield Drawing(split, task.name, label, _encode(image, task.suffix), task.suffix)


def picture(seed: int, task: str, label: str, instance: int) -> Image.Image:
    """Image `instance` of a class, RGB; a pure function of the arguments."""
    rng = stream(seed, task, label, instance)
    if task == "instances":
        return render_monster(random_monster(stream(seed, "monster", label)), rng)
    if task == "species" and label in SPECIES:
        return render_butterfly(SPECIES[label], rng)
    if task == "kinds" and label in SKETCHES:
        return render_sketch(SKETCHES[label], rng)
    raise ValueError(f"there is no class {label!r} in task {task!r}; see tasks() for those there are")


def _encode(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()


# kinds: sixteen sketches, each drawn in as many ways as its few lines allow

Sketch = Callable[[Canvas, Generator, Inks], None]


def balloons(c: Canvas, rng: Generator, ink: Inks) -> None:
    for i in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, -0.1)
        c.stroke([(x, y), (x * 0.5 + 0.1, y + 0.7), (0, 0.95)], 0.05, ink.line)
        c.disc(x, y, (0.32, 0.4), (ink.main, ink.second, ink.accent)[i])
        c.disc(x - 0.1, y - 0.15, 0.06, WHITE)


def boats(c: Canvas, rng: Generator, ink: Inks) -> None:
    wide = rng.uniform(0.55, 0.85)
    c.stroke([(0, 0.4), (0, -0.8)], 0.07, ink.line)
    c.shape([(0.06, -0.75), (0.06, 0.25), (wide * 0.9, 0.25)], ink.second)
    if rng.random() < 0.6:
        c.shape([(-0.06, -0.55), (-0.06, 0.25), (-wide * 0.8, 0.25)], ink.accent)
    c.shape([(-wide, 0.35), (wide, 0.35), (wide * 0.6, 0.75), (-wide * 0.6, 0.75)], ink.main)


def cacti(c: Canvas, rng: Generator, ink: Inks) -> None:
    fat = rng.uniform(0.2, 0.32)
    c.stroke([(0, 0.5), (0, -0.6)], fat * 1.5, ink.main)
    for side in (-1, 1)[: int(rng.integers(1, 3))]:
        low, high = rng.uniform(-0.1, 0.2), rng.uniform(-0.55, -0.2)
        c.stroke([(0, low), (side * 0.5, low), (side * 0.5, high)], fat, ink.main)
    c.shape([(-0.4, 0.45), (0.4, 0.45), (0.28, 0.9), (-0.28, 0.9)], ink.second)
    c.disc(0, -0.75, 0.12, ink.accent)


def castles(c: Canvas, rng: Generator, ink: Inks) -> None:
    towers = int(rng.integers(2, 4))
    c.shape(box(-0.7, 0.0, 0.7, 0.75), ink.main)
    for x in np.linspace(-0.65, 0.65, towers):
        top = rng.uniform(-0.55, -0.2)
        c.shape(box(x - 0.19, top, x + 0.19, 0.75), ink.main)
        c.shape([(x - 0.26, top), (x + 0.26, top), (x, top - 0.38)], ink.second)
        c.shape(box(x - 0.05, top + 0.15, x + 0.05, top + 0.35), DARK)
    c.shape(np.concatenate([arc(0, 0.5, 0.18, (math.pi, 2 * math.pi)), [[0.18, 0.75], [-0.18, 0.75]]]), ink.accent)


def cups(c: Canvas, rng: Generator, ink: Inks) -> None:
    wide, tall, foot = rng.uniform(0.4, 0.6), rng.uniform(0.35, 0.55), rng.uniform(0.55, 0.95)
    c.stroke(arc(wide, 0.1, (0.28, tall * 0.55), (-math.pi / 2, math.pi / 2)), 0.12, ink.main)
    c.shape(
        [(-wide, -tall + 0.1), (wide, -tall + 0.1), (wide * foot, tall + 0.1), (-wide * foot, tall + 0.1)], ink.main
    )
    c.disc(0, -tall + 0.1, (wide, 0.13), ink.second)
    if rng.random() < 0.6:
        for x in (-0.2, 0.15):
            t = np.linspace(0, 1, 12)
            c.stroke(np.stack([x + 0.08 * np.sin(7 * t), -tall - 0.05 - 0.35 * t], 1), 0.06, ink.line)
    if rng.random() < 0.5:
        c.shape(box(-wide * 0.9, 0.05, wide * 0.9, 0.25), ink.accent)


def faces(c: Canvas, rng: Generator, ink: Inks) -> None:
    rx, ry, eye = rng.uniform(0.5, 0.75), rng.uniform(0.55, 0.75), rng.uniform(0.08, 0.15)
    if rng.random() < 0.6:
        c.disc(0, -0.15, (rx * 1.12, ry * 1.12), ink.second)  # hair
    c.disc(0, 0.05, (rx, ry), ink.main)
    for x in (-0.38 * rx, 0.38 * rx):
        c.disc(x, -0.1, eye, WHITE)
        c.disc(x + rng.uniform(-0.03, 0.03), -0.1, eye * 0.55, DARK)
    smile = rng.uniform(-0.12, 0.22)
    across = np.linspace(-0.3, 0.3, 12)
    c.stroke(np.stack([across, 0.35 + smile * (1 - (across / 0.3) ** 2)], 1), 0.09, DARK)
    if rng.random() < 0.5:
        c.disc(0, 0.12, 0.08, ink.accent)


def fish(c: Canvas, rng: Generator, ink: Inks) -> None:
    long, tall, tail = rng.uniform(0.5, 0.7), rng.uniform(0.22, 0.45), rng.uniform(0.2, 0.4)
    c.shape([(long * 0.6, 0), (0.95, -tail), (0.85, 0), (0.95, tail)], ink.second)
    c.shape([(-0.1, -tall * 0.8), (0.2, -tall - 0.22), (0.3, -tall * 0.7)], ink.second)
    c.disc(0, 0, (long, tall), ink.main)
    for x in np.linspace(-0.05, 0.35, int(rng.integers(0, 4))):
        c.stroke([(x, -tall * 0.7), (x - 0.05, tall * 0.7)], 0.09, ink.accent)
    c.disc(-long * 0.62, -tall * 0.2, 0.1, WHITE)
    c.disc(-long * 0.65, -tall * 0.2, 0.055, DARK)


def grids(c: Canvas, rng: Generator, ink: Inks) -> None:
    rows, columns = (int(n) for n in rng.integers(2, 6, 2))
    colours = (ink.main, ink.second, ink.accent)
    fill = rng.uniform(0.6, 0.95)
    for i in range(rows):
        for j in range(columns):
            x, y = (2 * j + 1) / columns - 1, (2 * i + 1) / rows - 1
            half = 0.8 * fill / max(rows, columns)
            colour = colours[int(rng.integers(3))]
            if rng.random() < 0.85:
                c.shape(box(0.8 * x - half, 0.8 * y - half, 0.8 * x + half, 0.8 * y + half), colour)


def houses(c: Canvas, rng: Generator, ink: Inks) -> None:
    wide, top = rng.uniform(0.4, 0.75), rng.uniform(-0.3, 0.1)
    if rng.random() < 0.6:
        c.shape(box(wide * 0.4, -0.75, wide * 0.7, top), ink.accent)
    c.shape(box(-wide, top, wide, 0.75), ink.main)
    c.shape(
        [(-wide - 0.15, top), (wide + 0.15, top), (rng.uniform(-0.2, 0.2), top - rng.uniform(0.4, 0.7))], ink.second
    )
    door = rng.uniform(-wide * 0.6, wide * 0.2)
    c.shape(box(door, 0.35, door + 0.24, 0.75), ink.accent)
    for x in (-wide * 0.5, wide * 0.5):
        c.shape(box(x - 0.12, top + 0.1, x + 0.12, top + 0.32), WHITE)


def kites(c: Canvas, rng: Generator, ink: Inks) -> None:
    wide, tall, low = rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.5), rng.uniform(0.45, 0.65)
    t = np.linspace(0, 1, 20)
    tail = np.stack([0.25 * np.sin(6 * t) * t, low - 0.3 + 0.75 * t], 1)
    c.stroke(tail, 0.05, ink.line)
    for x, y in tail[7::6]:
        c.shape([(x - 0.13, y - 0.08), (x + 0.13, y + 0.08), (x + 0.13, y - 0.08), (x - 0.13, y + 0.08)], ink.accent)
    tip, left, foot, right = (0, -tall - 0.4), (-wide, -0.35), (0, low - 0.3), (wide, -0.35)
    c.shape([tip, left, foot, right], ink.main)
    c.shape([tip, (0, -0.35), right], ink.second)
    c.shape([left, (0, -0.35), foot], ink.second)


def mushrooms(c: Canvas, rng: Generator, ink: Inks) -> None:
    for _ in range(int(rng.integers(1, 3))):
        one = c.at(rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(0.6, 1))
        stem, cap = rng.uniform(0.14, 0.26), rng.uniform(0.5, 0.75)
        one.shape([(-stem, -0.1), (stem, -0.1), (stem * 1.3, 0.7), (-stem * 1.3, 0.7)], WHITE)
        one.shape(arc(0, 0, (cap, rng.uniform(0.45, 0.75)), (math.pi, 2 * math.pi)), ink.main)
        for x in np.linspace(-0.6, 0.6, int(rng.integers(2, 5))):
            one.disc(x * cap, -0.12 - 0.25 * (1 - abs(x)), 0.085, ink.accent)


def planets(c: Canvas, rng: Generator, ink: Inks) -> None:
    radius, tilt = rng.uniform(0.35, 0.52), rng.uniform(-0.5, 0.5)
    for x, y in rng.uniform(-0.95, 0.95, (6, 2)):
        c.disc(x, y, 0.04, ink.line)
    ring = c.at(0, 0, tilt)
    size = (radius * 1.75, radius * rng.uniform(0.3, 0.5))
    ring.stroke(arc(0, 0, size, (math.pi, 2 * math.pi)), 0.1, ink.second)
    ring.disc(0, 0, radius, ink.main)
    if rng.random() < 0.6:
        ring.disc(-radius * 0.3, -radius * 0.45, radius * 0.22, ink.accent)
    ring.stroke(arc(0, 0, size, (0, math.pi)), 0.1, ink.second)


def polygons(c: Canvas, rng: Generator, ink: Inks) -> None:
    for colour in (ink.main, ink.second, ink.accent)[: int(rng.integers(1, 4))]:
        corners = int(rng.integers(3, 7))
        x, y, radius = rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.35, 0.65)
        c.at(x, y, rng.uniform(0, 6.3)).shape(ellipse(0, 0, radius, corners), colour)


def snails(c: Canvas, rng: Generator, ink: Inks) -> None:
    shell = rng.uniform(0.36, 0.5)
    c.stroke([(-0.75, -0.15), (-0.65, 0.5), (0.75, 0.55)], 0.26, ink.second)
    for x in (-0.88, -0.62):
        c.stroke([(-0.73, -0.15), (x, -0.5)], 0.06, ink.second)
        c.disc(x, -0.5, 0.06, ink.line)
    c.disc(0.15, 0.08, shell, ink.main)
    t = np.linspace(0.5, rng.uniform(2.0, 2.8) * 2 * math.pi, 50)
    c.stroke(
        np.stack([0.15 + shell * 0.85 * t / t[-1] * np.cos(t), 0.08 + shell * 0.85 * t / t[-1] * np.sin(t)], 1),
        0.07,
        ink.accent,
    )


def spirals(c: Canvas, rng: Generator, ink: Inks) -> None:
    t = np.linspace(0.2, rng.uniform(2.0, 3.6) * 2 * math.pi, 90)
    turn = float(rng.choice((-1, 1)))
    r = 0.85 * (t / t[-1]) ** rng.uniform(0.7, 1.2)
    c.stroke(np.stack([r * np.cos(turn * t), r * np.sin(turn * t)], 1), rng.uniform(0.07, 0.15), ink.main)


def trees(c: Canvas, rng: Generator, ink: Inks) -> None:
    c.shape([(-0.12, 0.1), (0.12, 0.1), (0.18, 0.85), (-0.18, 0.85)], ink.second)
    if rng.random() < 0.5:
        for y, wide in ((0.3, 0.6), (-0.1, 0.48), (-0.45, 0.34)):
            c.shape([(-wide, y), (wide, y), (0, y - 0.55)], ink.main)
        return
    for x, y in ((-0.3, 0.0), (0.3, 0.0), (0.0, -0.35), (0.0, 0.0)):
        c.disc(x + rng.uniform(-0.08, 0.08), y, rng.uniform(0.34, 0.45), ink.main)
    for x, y in rng.uniform(-0.4, 0.3, (int(rng.integers(0, 6)), 2)):
        c.disc(x, y, 0.08, ink.accent)


_SKETCHES = (
    balloons, boats, cacti, castles, cups, faces, fish, grids,
    houses, kites, mushrooms, planets, polygons, snails, spirals, trees,
)  # fmt: skip
SKETCHES: dict[str, Sketch] = {sketch.__name__: sketch for sketch in _SKETCHES}


def render_sketch(sketch: Sketch, rng: Generator, ink: Inks | None = None) -> Image.Image:
    """A sketch in a random style: palette, background, pose, shapes (flat, outlined or hollow), light and noise."""
    ink = ink or pick_inks(rng)
    canvas = backdrop(rng, ink.paper)
    for x, y in rng.uniform(-1, 1, (int(rng.integers(0, 4)), 2)):  # confetti
        canvas.disc(x, y, rng.uniform(0.04, 0.09), (ink.main, ink.second, ink.accent)[int(rng.integers(3))])
    style = rng.random()
    if style < 0.45:
        canvas = canvas.styled(ink.line, ink.paper if style < 0.1 else None)
    mirror = float(rng.choice((-1, 1)))
    size = rng.uniform(0.7, 1.0)
    x, y = rng.uniform(-1, 1, 2) * (1.1 - size) * 0.6
    pose = canvas.at(x, y, rng.uniform(-0.35, 0.35), (mirror * size * rng.uniform(0.85, 1.15), size))
    sketch(pose, rng, ink)
    return canvas.develop(rng, noise=rng.uniform(0, 8), light=rng.uniform(0, 0.25))


# species: butterflies


class Traits(NamedTuple):
    """What distinguishes a species from another."""

    hue: float  # the mean; one of SPECIES_HUES
    forewing: str
    hindwing: str
    spots: str
    band: str


FOREWINGS = {
    "round": [(0.05, -0.05), (0.15, -0.5), (0.45, -0.78), (0.75, -0.72), (0.82, -0.42), (0.6, -0.08), (0.3, 0.08)],
    "pointed": [(0.05, -0.05), (0.3, -0.5), (0.62, -0.78), (0.98, -0.88), (0.8, -0.5), (0.66, -0.15), (0.3, 0.08)],
}
HINDWINGS = {
    "round": [(0.05, 0.0), (0.35, -0.02), (0.66, 0.12), (0.68, 0.42), (0.45, 0.64), (0.2, 0.55), (0.06, 0.3)],
    "tailed": [
        (0.05, 0.0),
        (0.35, -0.02),
        (0.6, 0.12),
        (0.58, 0.4),
        (0.6, 0.92),
        (0.48, 0.94),
        (0.36, 0.55),
        (0.06, 0.3),
    ],
}
SPOTS = ("none", "fore", "hind", "row")
SPECIES_HUES = 6
BANDS = ("none", "edge", "slant")
EPITHETS = (
    "alba", "aurora", "bruma", "candida", "corona", "diva", "elegans", "flora", "gloria", "hera", "iris", "juno",
    "lucina", "luna", "mira", "nympha", "ombra", "pallida", "rosa", "selene", "stella", "thalia", "umbra", "vesta",
)  # fmt: skip


def _species() -> dict[str, Traits]:
    """One combination of traits per name, in a fixed shuffle, so that both splits have every trait."""
    combinations = list(product(FOREWINGS, HINDWINGS, SPOTS, BANDS))
    order = stream("butterflies", "traits").permutation(len(combinations))
    return {name: Traits(i % SPECIES_HUES / SPECIES_HUES, *combinations[order[i]]) for i, name in enumerate(EPITHETS)}


SPECIES = _species()


def render_butterfly(traits: Traits, rng: Generator) -> Image.Image:
    """One image of the species: random shade, pose, opening of the wings and background."""
    hue = traits.hue + rng.normal(0, 0.05)
    paper = hsv(rng.uniform(), rng.uniform(0.05, 0.22), rng.uniform(0.8, 0.98))
    canvas = backdrop(rng, paper, contrast=0.1)
    size = rng.uniform(0.88, 1.08)
    x, y = rng.uniform(-0.08, 0.08, 2)
    pose = canvas.at(x, y, angle=rng.uniform(-0.35, 0.35), scale=size)
    wing = hsv(hue, rng.uniform(0.55, 0.9), rng.uniform(0.75, 1.0))
    second = hsv(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.4, 0.9), rng.uniform(0.7, 1.0))
    dark = hsv(hue + rng.uniform(-0.1, 0.1), 0.6, rng.uniform(0.2, 0.35))
    opening = rng.uniform(0.82, 1.05)
    for side in (-1, 1):
        _wings(pose.at(scale=(side * opening, 1.0)), traits, (wing, second, dark))
    _body(pose, rng)
    return canvas.develop(rng, noise=rng.uniform(0, 8), light=rng.uniform(0, 0.2))


def _wings(pose: Canvas, traits: Traits, colours: tuple[Colour, Colour, Colour]) -> None:
    """Both wings of one side, the hind wing first."""
    wing, second, dark = colours
    for outline, fill in ((HINDWINGS[traits.hindwing], second), (FOREWINGS[traits.forewing], wing)):
        curve = _rounded(outline)
        pose.shape(curve, dark)
        if traits.band == "edge":  # the dark margin is a wing below a smaller one
            pose.shape(curve * 0.76 + curve.mean(0) * 0.2, fill)
        else:
            pose.shape(curve * 0.93 + curve.mean(0) * 0.06, fill)
    if traits.band == "slant":
        pose.stroke([(0.2, -0.42), (0.62, -0.14)], 0.13, dark)
        pose.stroke([(0.18, 0.36), (0.55, 0.2)], 0.13, dark)
    if traits.spots == "fore":
        _eyespot(pose, 0.56, -0.5, dark)
    elif traits.spots == "hind":
        _eyespot(pose, 0.42, 0.3, dark)
    elif traits.spots == "row":
        for x, y in ((0.36, -0.62), (0.6, -0.58), (0.64, -0.3), (0.52, 0.14), (0.5, 0.38), (0.3, 0.48)):
            pose.disc(x, y, 0.075, WHITE)


def _eyespot(pose: Canvas, x: float, y: float, dark: Colour) -> None:
    pose.disc(x, y, 0.19, dark)
    pose.disc(x, y, 0.115, WHITE)
    pose.disc(x, y, 0.05, DARK)


def _body(pose: Canvas, rng: Generator) -> None:
    reach = rng.uniform(0.16, 0.3)
    for side in (-1, 1):
        pose.stroke([(0, -0.3), (side * reach * 0.6, -0.6), (side * reach, -0.85)], 0.045, DARK)
        pose.disc(side * reach, -0.85, 0.05, DARK)
    pose.shape(ellipse(0, 0.08, (0.075, 0.42)), DARK)
    pose.disc(0, -0.34, 0.1, DARK)


def _rounded(corners: list[tuple[float, float]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A closed curve near the corners, (8 * corners, 2): a uniform quadratic B-spline."""
    points = np.asarray(corners)
    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    pieces = [
        0.5 * (1 - t) ** 2 * a + (0.5 + t - t**2) * b + 0.5 * t**2 * c
        for a, b, c in zip(points, np.roll(points, -1, 0), np.roll(points, -2, 0), strict=True)
    ]
    return np.concatenate(pieces)


assert math.prod(map(len, (FOREWINGS, HINDWINGS, SPOTS, BANDS))) >= len(EPITHETS)


# instances: monsters

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprtz" for vowel in "aeiou"]
MAX_MONSTERS = len(_SYLLABLES) ** 3  # names of three syllables
MOUTHS = ("smile", "teeth", "oh", "zigzag", "fang")
HEADGEAR = ("none", "horns", "ears", "antennae", "tuft")
COATS = ("plain", "belly", "spots", "stripes")


def monster_name(index: int) -> str:
    """The name of monster `index`; no two have the same."""
    if not 0 <= index < MAX_MONSTERS:
        raise ValueError(f"a monster's index must be from 0 to {MAX_MONSTERS - 1}, got {index}")
    scattered = index * 77_773 % MAX_MONSTERS  # coprime to MAX_MONSTERS: no order of indices in the alphabet
    base = len(_SYLLABLES)
    digits = scattered // base**2, scattered // base % base, scattered % base
    return "".join(_SYLLABLES[digit] for digit in digits).capitalize()


@dataclass(frozen=True)
class Monster:
    """What all images of a monster have in common."""

    body: NDArray[np.float64]  # (P, 2) closed curve
    hue: float
    saturation: float
    second_hue: float
    eyes: int
    eye_size: float
    eye_height: float
    mouth: str
    headgear: str
    coat: str
    legs: int
    arm_angle: float


def random_monster(rng: Generator) -> Monster:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    wobble = sum(rng.uniform(-0.13, 0.13) * np.cos(k * t + rng.uniform(0, 1) * math.pi) for k in (2, 3, 4))
    width, height = rng.uniform(0.38, 0.6), rng.uniform(0.42, 0.62)
    return Monster(
        body=np.stack([width * (1 + wobble) * np.cos(t), height * (1 + wobble) * np.sin(t)], 1),
        hue=rng.uniform(),
        saturation=rng.uniform(0.45, 0.85),
        second_hue=rng.uniform(),
        eyes=int(rng.integers(1, 4)),
        eye_size=rng.uniform(0.13, 0.22),
        eye_height=rng.uniform(-0.25, -0.1),
        mouth=MOUTHS[int(rng.integers(len(MOUTHS)))],
        headgear=HEADGEAR[int(rng.integers(len(HEADGEAR)))],
        coat=COATS[int(rng.integers(len(COATS)))],
        legs=int(rng.integers(2, 5)),
        arm_angle=rng.uniform(-0.9, 0.9),
    )


def render_monster(monster: Monster, rng: Generator) -> Image.Image:
    """One image of the monster: random place, pose, gaze, light and, within limits, colour."""
    canvas = backdrop(rng, hsv(rng.uniform(), rng.uniform(0.03, 0.25), rng.uniform(0.65, 0.98)))
    turn = rng.normal(0, 0.045)  # of all hues, by the light
    skin = hsv(monster.hue + turn, monster.saturation * rng.uniform(0.8, 1.15), rng.uniform(0.65, 0.95))
    second = hsv(monster.second_hue + turn, 0.6 * rng.uniform(0.8, 1.2), rng.uniform(0.75, 1.0))
    size = rng.uniform(0.8, 1.08)
    wide = size * rng.uniform(0.88, 1.12) * float(rng.choice((-1, 1)))
    x, y = rng.uniform(-0.12, 0.12, 2)
    pose = canvas.at(x, y, angle=rng.uniform(-0.35, 0.35), scale=(wide, size))
    _limbs(pose, monster, rng, skin)
    _headgear(pose, monster, second)
    pose.shape(monster.body, skin)
    _coat(pose, monster, second)
    _face(pose, monster, rng)
    return canvas.develop(rng, noise=rng.uniform(0, 8), light=rng.uniform(0, 0.25))


def _limbs(pose: Canvas, monster: Monster, rng: Generator, skin: Colour) -> None:
    bottom, right = monster.body[:, 1].max(), monster.body[:, 0].max()
    for x in np.linspace(-0.28, 0.28, monster.legs):
        pose.stroke([(x, 0.1), (x + rng.uniform(-0.06, 0.06), bottom + 0.2)], 0.15, skin)
    for side in (-1, 1):
        angle = monster.arm_angle + rng.uniform(-0.3, 0.3)
        hand = (side * (right + 0.25 * math.cos(angle)), 0.05 + 0.32 * math.sin(angle))
        pose.stroke([(side * right * 0.6, 0.05), hand], 0.13, skin)


def _headgear(pose: Canvas, monster: Monster, colour: Colour) -> None:
    top = monster.body[:, 1].min()
    for side in (-1, 1):
        if monster.headgear == "horns":
            pose.shape([(side * 0.1, top + 0.25), (side * 0.4, top + 0.3), (side * 0.36, top - 0.25)], colour)
        elif monster.headgear == "ears":
            pose.disc(side * 0.3, top + 0.08, 0.2, colour)
        elif monster.headgear == "antennae":
            pose.stroke([(side * 0.1, top + 0.2), (side * 0.26, top - 0.25)], 0.06, DARK)
            pose.disc(side * 0.26, top - 0.25, 0.1, colour)
        elif monster.headgear == "tuft":
            pose.shape([(0, top + 0.25), (side * 0.22, top - 0.2), (side * 0.07, top - 0.05), (0, top - 0.3)], colour)


def _coat(pose: Canvas, monster: Monster, colour: Colour) -> None:
    if monster.coat == "belly":
        pose.shape(monster.body * 0.62 + np.array([0, 0.14]), colour)
    elif monster.coat == "spots":
        for corner in monster.body[::7]:
            pose.disc(corner[0] * 0.68, corner[1] * 0.68, 0.085, colour)
    elif monster.coat == "stripes":
        for y in (-0.02, 0.16, 0.34):
            inside = monster.body[np.abs(monster.body[:, 1] - y).argsort()[:6], 0]
            pose.stroke([(inside.min() * 0.85, y), (inside.max() * 0.85, y)], 0.08, colour)


def _face(pose: Canvas, monster: Monster, rng: Generator) -> None:
    gaze = rng.uniform(-0.4, 0.4, 2) * monster.eye_size
    spread = min(0.24, monster.eye_size * 1.15) * (monster.eyes - 1)
    for x in np.linspace(-spread, spread, monster.eyes) if monster.eyes > 1 else (0.0,):
        pose.disc(x, monster.eye_height, monster.eye_size, WHITE)
        pose.disc(x + gaze[0], monster.eye_height + gaze[1], monster.eye_size * 0.5, DARK)
    x = np.linspace(-0.2, 0.2, 9)
    if monster.mouth == "oh":
        pose.disc(0, 0.2, (0.1, 0.13), DARK)
    elif monster.mouth == "zigzag":
        pose.stroke(np.stack([x, 0.2 + 0.06 * (-1.0) ** np.arange(9)], 1), 0.06, DARK)
    elif monster.mouth == "teeth":
        pose.disc(0, 0.2, (0.24, 0.11), DARK)
        for tooth in (-0.11, 0.0, 0.11):
            pose.shape([(tooth - 0.05, 0.1), (tooth + 0.05, 0.1), (tooth, 0.22)], WHITE)
    else:
        pose.stroke(np.stack([x, 0.26 - 2.5 * x**2], 1), 0.07, DARK)
        if monster.mouth == "fang":
            pose.shape([(0.04, 0.24), (0.16, 0.2), (0.1, 0.38)], WHITE)
