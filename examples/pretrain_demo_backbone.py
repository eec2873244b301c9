"""How the demo's backbone was pretrained: it classifies the parameters of doodles.

    python examples/pretrain_demo_backbone.py --out FILE

The doodles are of sixteen kinds, none of which is in the demo data set. Besides its kind a doodle has a count from
0 to 3, which adds points, petals, rungs or rays to it, and two hues.

Shapes: B images of one step, T tokens, D channels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from grappa_dist.data.rng import stream
from grappa_dist.demo.backbone import DATA_CONFIG, EMBED_DIM, architecture
from grappa_dist.demo.canvas import Canvas, Inks, arc, box, ellipse, hsv
from grappa_dist.demo.drawings import render_sketch

Doodle = Callable[[Canvas, Generator, Inks, int], None]
COUNTS = 4
HUES = 8
WEIGHTS = {"kind": 1.0, "count": 1.0, "hue": 0.4, "second": 0.2}  # of each label's cross-entropy in the loss
PEAK_LR = 2e-3
POOLS = ("token", "mean")  # the class token alone learns late, so the mean of the patches is trained as well


def arrows(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    c.stroke([(-0.7, 0), (0.5, 0)], rng.uniform(0.12, 0.2), ink.main)
    c.shape([(0.4, -0.35), (0.9, 0), (0.4, 0.35)], ink.main)
    for i in range(count):
        c.stroke([(-0.8 + 0.22 * i, -0.3), (-0.6 + 0.22 * i, 0), (-0.8 + 0.22 * i, 0.3)], 0.08, ink.second)


def bolts(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    x = np.linspace(-0.8, 0.8, count + 3)
    y = rng.uniform(0.3, 0.5) * (-1.0) ** np.arange(count + 3)
    c.stroke(np.stack([x, y], 1), rng.uniform(0.12, 0.2), ink.main)


def bugs(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    wide, tall = rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.65)
    for y in (-0.15, 0.15, 0.45):
        c.stroke([(-wide - 0.25, y - 0.1), (wide + 0.25, y - 0.1)], 0.06, ink.line)
    c.disc(0, -0.45, 0.25, ink.second)
    c.disc(0, 0.15, (wide, tall), ink.main)
    c.stroke([(0, -0.3), (0, 0.75)], 0.05, ink.line)
    for i in range(count):
        for side in (-1, 1):
            c.disc(side * wide * 0.5, -0.1 + 0.28 * i, 0.11, ink.accent)


def crescents(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    inner = rng.uniform(0.2, 0.45)
    outside, inside = arc(0, 0, 0.7, (0.6, 5.7)), arc(0.25, 0, (inner + 0.1, 0.5), (5.5, 0.8))
    c.shape(np.concatenate([outside, inside]), ink.main)
    for i in range(count):
        c.disc(0.55, -0.4 + 0.35 * i, 0.1, ink.second)


def crosses(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    thick = rng.uniform(0.1, 0.22)
    c.shape(box(-thick, -0.8, thick, 0.8), ink.main)
    for i in range(count + 1):
        y = -0.5 + 0.36 * i
        c.shape(box(-0.6 + 0.1 * i, y - 0.09, 0.6 - 0.1 * i, y + 0.09), ink.main)


def dice(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    half = rng.uniform(0.5, 0.7)
    c.shape(box(-half, -half, half, half), ink.main)
    for x, y in (((0, 0),), ((-1, -1), (1, 1)), ((-1, 1), (0, -1), (1, 1)), ((-1, -1), (1, 1), (-1, 1), (1, -1)))[
        count
    ]:
        c.disc(x * half * 0.5, y * half * 0.5, 0.13, ink.second)


def flowers(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    c.stroke([(0, 0), (0.05, 0.95)], 0.08, ink.second)
    long = rng.uniform(0.22, 0.3)
    for angle in np.linspace(0, 2 * math.pi, 4 + 2 * count, endpoint=False):
        c.at(0, -0.2, angle).shape(ellipse(0.38, 0, (long, 0.34 - 0.05 * count)), ink.main)
    c.disc(0, -0.2, 0.18, ink.accent)


def hearts(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    curve = np.stack(
        [np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15], 1
    )
    for i in range(count + 1):
        colour = (ink.main, ink.second, ink.accent, ink.main)[i]
        c.shape(curve * (0.75 - 0.2 * i) * np.array([rng.uniform(0.9, 1.1), 1]), colour)


def ladders(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    half, top = rng.uniform(0.25, 0.45), rng.uniform(0.15, 0.45)
    for side in (-1, 1):
        c.stroke([(side * half, 0.85), (side * top, -0.85)], 0.11, ink.main)
    for y in np.linspace(-0.6, 0.6, count + 2):
        c.stroke([(-half, y), (half, y)], 0.09, ink.second)


def leaves(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    wide = rng.uniform(0.25, 0.45)
    y = np.linspace(-0.8, 0.6, 20)
    x = wide * np.sin(np.linspace(0, math.pi, 20)) ** 0.8
    c.shape(np.concatenate([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]]), ink.main)
    c.stroke([(0, -0.6), (0, 0.95)], 0.06, ink.second)
    for v in np.linspace(-0.3, 0.4, count):
        c.stroke([(-wide * 0.7, v - 0.15), (0, v), (wide * 0.7, v - 0.15)], 0.05, ink.second)


def robots(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    wide, tall = rng.uniform(0.45, 0.65), rng.uniform(0.4, 0.6)
    c.stroke([(0, -tall), (0, -tall - 0.3)], 0.07, ink.line)
    c.disc(0, -tall - 0.3, 0.09, ink.accent)
    c.shape(box(-wide, -tall, wide, tall), ink.main)
    for x in np.linspace(-0.25 * count * wide, 0.25 * count * wide, count + 1):
        c.disc(x, -0.15, 0.13, ink.second)
    c.shape(box(-wide * 0.6, 0.2, wide * 0.6, 0.36), ink.accent)


def shields(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    wide = rng.uniform(0.5, 0.65)
    curve = np.array(
        [(-wide, -0.7), (wide, -0.7), (wide, 0.1), (wide * 0.6, 0.5), (0, 0.85), (-wide * 0.6, 0.5), (-wide, 0.1)]
    )
    c.shape(curve, ink.second if count == 1 else ink.main)
    if count == 1:
        c.shape(curve * 0.7, ink.main)
    elif count == 2:
        c.stroke([(-wide * 0.8, -0.5), (wide * 0.6, 0.4)], 0.2, ink.second)
    elif count == 3:
        c.stroke([(-wide * 0.9, -0.15), (wide * 0.9, -0.15)], 0.18, ink.second)
        c.stroke([(0, -0.6), (0, 0.7)], 0.18, ink.second)


def stars(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    corners = 4 + count
    tips, dents = ellipse(0, 0, 0.8, 2 * corners), ellipse(0, 0, rng.uniform(0.3, 0.45), 2 * corners)
    tips[1::2] = dents[1::2]
    c.shape(tips, ink.main)


def suns(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    inner = rng.uniform(0.3, 0.42)
    for angle in np.linspace(0, 2 * math.pi, 5 + 2 * count, endpoint=False):
        c.at(0, 0, angle).stroke([(inner + 0.14, 0), (0.85, 0)], 0.1, ink.second)
    c.disc(0, 0, inner, ink.main)


def umbrellas(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    tall = rng.uniform(0.55, 0.8)
    c.stroke([(0, -0.2), (0, 0.7), (0.1, 0.85), (0.22, 0.7)], 0.08, ink.line)
    edges = np.linspace(math.pi, 2 * math.pi, count + 3)
    for i in range(count + 2):
        rim = arc(0, 0, (0.8, tall), (float(edges[i]), float(edges[i + 1])))
        c.shape(np.concatenate([rim, [[0, 0]]]), ink.second if i % 2 else ink.main)


def waves(c: Canvas, rng: Generator, ink: Inks, count: int) -> None:
    x = np.linspace(-0.85, 0.85, 40)
    swing, speed = rng.uniform(0.08, 0.14), rng.uniform(6, 11)
    for i in range(count + 1):
        y = (i - count / 2) * 0.42
        c.stroke(np.stack([x, y + swing * np.sin(speed * x)], 1), 0.12, (ink.main, ink.second)[i % 2])


DOODLES: tuple[Doodle, ...] = (
    arrows, bolts, bugs, crescents, crosses, dice, flowers, hearts,
    ladders, leaves, robots, shields, stars, suns, umbrellas, waves,
)  # fmt: skip
CLASSES = {"kind": len(DOODLES), "count": len(DOODLES) * COUNTS, "hue": HUES, "second": HUES}


@dataclass(frozen=True)
class Example:
    """A doodle and its labels, by the names of CLASSES."""

    image: Image.Image
    labels: dict[str, int]


def example(seed: int, index: int) -> Example:
    """Doodle `index` of a seed, a pure function of both; drawings of the demo data set use other random numbers."""
    rng = stream("doodles", seed, index)
    kind, count = int(rng.integers(len(DOODLES))), int(rng.integers(COUNTS))
    hue, second = (int(value) for value in rng.integers(HUES, size=2))
    light = rng.random() < 0.65
    ink = Inks(
        paper=hsv(rng.uniform(), rng.uniform(0.05, 0.3) if light else 0.5, rng.uniform(0.85, 1) if light else 0.25),
        main=hsv(
            (hue + rng.uniform(0.1, 0.9)) / HUES, rng.uniform(0.55, 0.9), rng.uniform(0.5, 0.8) if light else 0.95
        ),
        second=hsv(
            (second + rng.uniform(0.1, 0.9)) / HUES, rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9) if light else 0.9
        ),
        accent=hsv(rng.uniform(), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9) if light else 0.9),
        line=(40, 40, 56) if light else (250, 248, 242),
    )
    doodle = DOODLES[kind]
    image = render_sketch(lambda c, r, i: doodle(c, r, i, count), rng, ink)
    return Example(image, {"kind": kind, "count": kind * COUNTS + count, "hue": hue, "second": second})


def draw_doodles(seed: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`number` doodles, (number, 3, 48, 48) uint8, and their labels by name, (number,) each."""
    examples = [example(seed, index) for index in range(number)]
    pixels = torch.from_numpy(np.stack([np.asarray(one.image) for one in examples])).permute(0, 3, 1, 2)
    return pixels.contiguous(), {head: torch.tensor([one.labels[head] for one in examples]) for head in CLASSES}


def normalise(pixels: Tensor) -> Tensor:
    """Backbone input (B, 3, 48, 48) of pixels from 0 to 255."""
    mean, std = (torch.tensor(DATA_CONFIG[key])[:, None, None] for key in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Each image rotated, scaled, shifted and mirrored at random, (B, 3, 48, 48) float of the same range."""

    def uniform(low: float, high: float) -> Tensor:  # (B,)
        return low + (high - low) * torch.rand(len(pixels), generator=rng)

    angle, mirror = uniform(-0.3, 0.3), uniform(-1, 1).sign()
    size = uniform(0.8, 1.15)
    top = torch.stack([angle.cos() * size * mirror, -angle.sin() * size, uniform(-0.15, 0.15)], 1)
    bottom = torch.stack([angle.sin() * size * mirror, angle.cos() * size, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)


def pretrain(out_path: Path, *, steps: int, batch: int = 64, doodles: int = 16_000, seed: int = 0) -> dict[str, float]:
    """Trains, writes the backbone's weights in float16, and returns the accuracy on unseen doodles by label."""
    if min(steps, batch, doodles) < 1:
        raise ValueError(f"steps, batch and doodles must be at least 1, got {steps}, {batch} and {doodles}")
    torch.manual_seed(seed)
    started = time.monotonic()
    pixels, labels = draw_doodles(seed, doodles)
    print(f"drew {doodles} doodles in {time.monotonic() - started:.0f} s", flush=True)
    model = architecture().train()
    heads = nn.ModuleDict({f"{pool}_{head}": nn.Linear(EMBED_DIM, CLASSES[head]) for pool in POOLS for head in CLASSES})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=max(steps, 2), pct_start=0.1)
    rows = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(doodles, (batch,), generator=rows)
        loss = _loss(
            model, heads, augment(pixels[chosen], rows), {head: label[chosen] for head, label in labels.items()}
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, out_path)
    accuracy = _accuracy(model, heads, seed + 1, min(500, doodles))
    print("accuracy on unseen doodles: " + ", ".join(f"{head} {share:.2f}" for head, share in accuracy.items()))
    return accuracy


def _loss(model: nn.Module, heads: nn.ModuleDict, pixels: Tensor, labels: dict[str, Tensor]) -> Tensor:
    tokens = model.forward_features(normalise(pixels))  # type: ignore[operator]  # (B, T, D)
    losses = [
        WEIGHTS[head] * F.cross_entropy(heads[f"{pool}_{head}"](features), label)
        for pool, features in (("token", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1)))
        for head, label in labels.items()
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def _accuracy(model: nn.Module, heads: nn.ModuleDict, seed: int, number: int) -> dict[str, float]:
    pixels, labels = draw_doodles(seed, number)
    features = model.eval()(normalise(pixels))
    correct = {name: heads[f"token_{name}"](features).argmax(1) == label for name, label in labels.items()}
    return {name: hits.float().mean().item() for name, hits in correct.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="doodles per step (default %(default)s)")
    parser.add_argument("--doodles", type=int, default=16_000, help="doodles to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the doodles and the training (default %(default)s)")
    given = parser.parse_args(arguments)
    pretrain(given.out, steps=given.steps, batch=given.batch, doodles=given.doodles, seed=given.seed)


if __name__ == "__main__":
    main()
