"""The instance task: monsters. A class is one monster; its images show it in other poses, lights and places."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.demo.canvas import DARK, WHITE, Canvas, Colour, backdrop, hsv

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprtz" for vowel in "aeiou"]
MOST = len(_SYLLABLES) ** 3  # names of three syllables
MOUTHS = ("smile", "teeth", "oh", "zigzag", "fang")
HEADGEAR = ("none", "horns", "ears", "antennae", "tuft")
COATS = ("plain", "belly", "spots", "stripes")


def name_of(index: int) -> str:
    """The name of monster `index`, unlike any other's."""
    if not 0 <= index < MOST:
        raise ValueError(f"a monster's index must be from 0 to {MOST - 1}, got {index}")
    scattered = index * 77_773 % MOST  # coprime to MOST: neighbours in index are strangers in the alphabet
    parts = (
        scattered // len(_SYLLABLES) ** 2,
        scattered // len(_SYLLABLES) % len(_SYLLABLES),
        scattered % len(_SYLLABLES),
    )
    return "".join(_SYLLABLES[part] for part in parts).capitalize()


@dataclass(frozen=True)
class Monster:
    """Everything that stays the same from one image of a monster to the next."""

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


def invent(rng: Generator) -> Monster:
    """A monster nobody has seen before."""
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
    """One sighting of the monster: another place, pose, gaze, light and, within limits, colour."""
    canvas = backdrop(rng, hsv(rng.uniform(), rng.uniform(0.03, 0.25), rng.uniform(0.65, 0.98)))
    turn = rng.normal(0, 0.045)  # what the light does to all its colours
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
