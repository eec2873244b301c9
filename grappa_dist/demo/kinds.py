"""The coarse task: sixteen kinds of things, each drawn in as many ways as its few lines allow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image

from grappa_dist.demo.canvas import DARK, WHITE, Canvas, Inks, arc, backdrop, box, ellipse, pick_inks

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
    """A sketch in a random style: palette, background, pose, flat or inked or hollow shapes, light and grain."""
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
