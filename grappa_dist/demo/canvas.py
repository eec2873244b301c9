"""The canvas of the demo's drawings, in unit coordinates, with palettes and backgrounds.

The visible square is [-1, 1] x [-1, 1], y points down.

Shapes: P points of a curve, (P, 2).
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE_PX = 48
OVERSAMPLE = 4  # drawn at 4 times the size, then averaged: Pillow's shapes have hard edges
Colour = tuple[int, int, int]
Points = NDArray[np.float64] | Sequence[tuple[float, float]]

DARK: Colour = (44, 42, 60)
WHITE: Colour = (252, 250, 244)
PALETTES: tuple[tuple[str, str, str, str], ...] = (  # paper, then three colours that contrast with it
    ("#f6e9d2", "#d1495b", "#2e6f95", "#edae49"),
    ("#dfeee6", "#2a9d8f", "#e76f51", "#264653"),
    ("#fdf0f0", "#8e5572", "#f2a65a", "#4f8a8b"),
    ("#22314f", "#f4d35e", "#ee964b", "#9ad1d4"),
    ("#e8e4f3", "#6a4c93", "#ff924c", "#1982c4"),
    ("#fff6d6", "#588157", "#bc4749", "#344e41"),
    ("#3b2f4a", "#f28482", "#84dcc6", "#f6bd60"),
    ("#d7ecf7", "#1d5c96", "#f25f5c", "#70ae6e"),
    ("#f3dccb", "#7f5539", "#386641", "#c8553d"),
    ("#20453f", "#f7b267", "#e5e8b6", "#f4845f"),
)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour; the hue wraps around, the others are clipped to [0, 1]."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


@dataclass(frozen=True)
class Inks:
    """The colours of one drawing."""

    paper: Colour
    main: Colour
    second: Colour
    accent: Colour
    line: Colour  # dark on a light paper, light on a dark one


def pick_inks(rng: Generator) -> Inks:
    """The inks of a random palette, in random roles."""
    paper, *others = (_rgb(code) for code in PALETTES[int(rng.integers(len(PALETTES)))])
    first, second, third = (others[i] for i in rng.permutation(3))
    return Inks(paper, first, second, third, DARK if sum(paper) > 384 else WHITE)


def _rgb(code: str) -> Colour:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


@dataclass(frozen=True)
class Canvas:
    """A square image seen through a pose; `at` gives the same image with another pose."""

    image: Image.Image
    linear: NDArray[np.float64]  # (2, 2) of the pose
    shift: NDArray[np.float64]  # (2,)
    outline: Colour | None = None  # every shape gets a line of this colour
    hollow: Colour | None = None  # every shape is filled with this colour instead of its own

    @staticmethod
    def blank(colour: Colour) -> Canvas:
        side = SIZE_PX * OVERSAMPLE
        return Canvas(Image.new("RGB", (side, side), colour), np.eye(2), np.zeros(2))

    def at(
        self, x: float = 0.0, y: float = 0.0, angle: float = 0.0, scale: float | tuple[float, float] = 1.0
    ) -> Canvas:
        """The same image in coordinates that are scaled, turned clockwise by `angle` (radians) and moved to (x, y)."""
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) * np.array(scale)
        return replace(self, linear=self.linear @ turn, shift=self.shift + self.linear @ np.array([x, y]))

    def styled(self, outline: Colour | None, hollow: Colour | None) -> Canvas:
        return replace(self, outline=outline, hollow=hollow)

    def shape(self, points: Points, fill: Colour) -> None:
        """Fills the polygon through `points`."""
        corners = self._pixels(points)
        pen = ImageDraw.Draw(self.image)
        pen.polygon(corners, fill=self.hollow or fill)
        if self.outline is not None:
            pen.line([*corners, corners[0], corners[1]], fill=self.outline, width=OVERSAMPLE, joint="curve")

    def disc(self, x: float, y: float, radius: float | tuple[float, float], fill: Colour) -> None:
        """Fills a circle, or an ellipse of two radii."""
        self.shape(ellipse(x, y, radius), fill)

    def stroke(self, points: Points, width: float, fill: Colour) -> None:
        """Draws a line of `width` with round ends through `points`."""
        corners = self._pixels(points)
        (a, b), (c, d) = self.linear.tolist()
        pixels = max(1.0, width * math.sqrt(abs(a * d - b * c)) * self.image.width / 2)
        pen = ImageDraw.Draw(self.image)
        pen.line(corners, fill=fill, width=round(pixels), joint="curve")
        for x, y in (corners[0], corners[-1]):
            half = pixels / 2 - 0.5
            pen.ellipse((x - half, y - half, x + half, y + half), fill=fill)

    def _pixels(self, points: Points) -> list[tuple[float, float]]:
        placed = np.asarray(points, dtype=float) @ self.linear.T + self.shift
        return [(x, y) for x, y in ((placed + 1) * (self.image.width / 2)).tolist()]

    def develop(self, rng: Generator, noise: float, light: float) -> Image.Image:
        """The finished picture, (SIZE_PX, SIZE_PX) RGB, with noise and light from a random side."""
        small = self.image.reduce(OVERSAMPLE)
        pixels = np.asarray(small, dtype=np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        ramp = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
        slope = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
        pixels = pixels * (1 + light * slope[..., None]) + noise * rng.standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def ellipse(x: float, y: float, radius: float | tuple[float, float], points: int = 32) -> NDArray[np.float64]:
    """Points on an ellipse, (points, 2)."""
    placed: NDArray[np.float64] = np.array([x, y]) + _circle(points) * np.array(radius)
    return placed


@lru_cache
def _circle(points: int) -> NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1)


def arc(x: float, y: float, radius: float | tuple[float, float], span: tuple[float, float]) -> NDArray[np.float64]:
    """Points on a part of an ellipse, from angle span[0] to span[1] in radians, (24, 2)."""
    t = np.linspace(*span, 24)
    placed: NDArray[np.float64] = np.array([x, y]) + np.stack([np.cos(t), np.sin(t)], 1) * np.array(radius)
    return placed


def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


BACKGROUNDS = ("plain", "hill", "stripes", "dots", "split", "blobs")


def backdrop(rng: Generator, paper: Colour, contrast: float = 0.16) -> Canvas:
    """A canvas of `paper` with a faint pattern on it, one of BACKGROUNDS."""
    canvas = Canvas.blank(paper)
    style = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    tone = rng.uniform(0.4, 1.0) * contrast * (1 if sum(paper) < 384 else -1)
    red, green, blue = (np.asarray(paper) + 255 * tone * rng.uniform(0.4, 1, 3)).clip(0, 255).round().tolist()
    shade = (int(red), int(green), int(blue))
    turned = canvas.at(angle=rng.uniform(0, math.pi))
    if style == "hill":
        canvas.disc(rng.uniform(-0.8, 0.8), 2.2, (rng.uniform(1.8, 3.0), rng.uniform(1.6, 2.0)), shade)
    elif style == "stripes":
        period = rng.uniform(0.3, 0.6)
        for y in np.arange(-1.6, 1.6, period):
            turned.shape(box(-2, y, 2, y + period / 2), shade)
    elif style == "dots":
        period = rng.uniform(0.35, 0.6)
        for x in np.arange(-1.6, 1.6, period):
            for y in np.arange(-1.6, 1.6, period):
                turned.shape(ellipse(x, y, period / 4.5, points=12), shade)
    elif style == "split":
        turned.shape(box(-2, rng.uniform(-0.4, 0.4), 2, 2), shade)
    elif style == "blobs":
        for _ in range(5):
            canvas.disc(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.15, 0.5), shade)
    return canvas
