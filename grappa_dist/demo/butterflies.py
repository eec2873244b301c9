"""The fine task: butterflies. A species is a wing shape, a spot pattern, a band and a leaning to a hue."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from grappa_dist.demo.canvas import DARK, WHITE, Canvas, Colour, backdrop, ellipse, hsv, stream


class Traits(NamedTuple):
    """What tells one species from another."""

    hue: float  # about; one in six
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
HUES = 6
BANDS = ("none", "edge", "slant")
EPITHETS = (
    "alba", "aurora", "bruma", "candida", "corona", "diva", "elegans", "flora", "gloria", "hera", "iris", "juno",
    "lucina", "luna", "mira", "nympha", "ombra", "pallida", "rosa", "selene", "stella", "thalia", "umbra", "vesta",
)  # fmt: skip


def _species() -> dict[str, Traits]:
    """One combination of traits per name, in a fixed shuffle, so both halves of the alphabet see every trait."""
    combinations = list(product(FOREWINGS, HINDWINGS, SPOTS, BANDS))
    order = stream("butterflies", "traits").permutation(len(combinations))
    return {name: Traits(i % HUES / HUES, *combinations[order[i]]) for i, name in enumerate(EPITHETS)}


SPECIES = _species()


def render_butterfly(traits: Traits, rng: Generator) -> Image.Image:
    """One butterfly of the species: shade, pose, openness of the wings and the ground it sits on are its own."""
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


def _wings(half: Canvas, traits: Traits, colours: tuple[Colour, Colour, Colour]) -> None:
    """One side of the butterfly, its hind wing first."""
    wing, second, dark = colours
    for outline, fill in ((HINDWINGS[traits.hindwing], second), (FOREWINGS[traits.forewing], wing)):
        curve = _rounded(outline)
        half.shape(curve, dark)
        if traits.band == "edge":  # the dark margin is the wing below a smaller one
            half.shape(curve * 0.76 + curve.mean(0) * 0.2, fill)
        else:
            half.shape(curve * 0.93 + curve.mean(0) * 0.06, fill)
    if traits.band == "slant":
        half.stroke([(0.2, -0.42), (0.62, -0.14)], 0.13, dark)
        half.stroke([(0.18, 0.36), (0.55, 0.2)], 0.13, dark)
    if traits.spots == "fore":
        _eye(half, 0.56, -0.5, dark)
    elif traits.spots == "hind":
        _eye(half, 0.42, 0.3, dark)
    elif traits.spots == "row":
        for x, y in ((0.36, -0.62), (0.6, -0.58), (0.64, -0.3), (0.52, 0.14), (0.5, 0.38), (0.3, 0.48)):
            half.disc(x, y, 0.075, WHITE)


def _eye(half: Canvas, x: float, y: float, dark: Colour) -> None:
    half.disc(x, y, 0.19, dark)
    half.disc(x, y, 0.115, WHITE)
    half.disc(x, y, 0.05, DARK)


def _body(pose: Canvas, rng: Generator) -> None:
    reach = rng.uniform(0.16, 0.3)
    for side in (-1, 1):
        pose.stroke([(0, -0.3), (side * reach * 0.6, -0.6), (side * reach, -0.85)], 0.045, DARK)
        pose.disc(side * reach, -0.85, 0.05, DARK)
    pose.shape(ellipse(0, 0.08, (0.075, 0.42)), DARK)
    pose.disc(0, -0.34, 0.1, DARK)


def _rounded(corners: list[tuple[float, float]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A closed curve that follows the corners without touching them, (8 * corners, 2): a uniform quadratic B-spline."""
    points = np.asarray(corners)
    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    pieces = [
        0.5 * (1 - t) ** 2 * a + (0.5 + t - t**2) * b + 0.5 * t**2 * c
        for a, b, c in zip(points, np.roll(points, -1, 0), np.roll(points, -2, 0), strict=True)
    ]
    return np.concatenate(pieces)


assert math.prod(map(len, (FOREWINGS, HINDWINGS, SPOTS, BANDS))) >= len(EPITHETS)
