"""Trains the demo's backbone to name the parameters of doodles: python -m grappa_dist.demo.pretrain --out FILE

Shapes: B images of one step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from grappa_dist.demo.backbone import DATA_CONFIG, EMBED_DIM, architecture
from grappa_dist.demo.doodles import CLASSES, example

WEIGHTS = {"kind": 1.0, "count": 1.0, "hue": 0.4, "second": 0.2}  # of the heads in the loss
PEAK_LR = 2e-3
POOLS = ("token", "mean")  # the class token learns late on its own: the mean of the patches leads the way


def draw_doodles(seed: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`number` doodles, (number, 3, 48, 48) uint8, and their labels by head, (number,) each."""
    examples = [example(seed, index) for index in range(number)]
    pixels = torch.from_numpy(np.stack([np.asarray(one.image) for one in examples])).permute(0, 3, 1, 2)
    return pixels.contiguous(), {head: torch.tensor([one.labels[head] for one in examples]) for head in CLASSES}


def normalise(pixels: Tensor) -> Tensor:
    """Backbone input of images in 0..255, (B, 3, 48, 48)."""
    mean, std = (torch.tensor(DATA_CONFIG[key])[:, None, None] for key in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def jiggle(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Each image turned, stretched, moved and perhaps mirrored a little, (B, 3, 48, 48) float of the same range."""

    def uniform(low: float, high: float) -> Tensor:  # (B,)
        return low + (high - low) * torch.rand(len(pixels), generator=rng)

    angle, mirror = uniform(-0.3, 0.3), uniform(-1, 1).sign()
    size = uniform(0.8, 1.15)
    top = torch.stack([angle.cos() * size * mirror, -angle.sin() * size, uniform(-0.15, 0.15)], 1)
    bottom = torch.stack([angle.sin() * size * mirror, angle.cos() * size, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)


def pretrain(out_path: Path, *, steps: int, batch: int = 64, doodles: int = 16_000, seed: int = 0) -> dict[str, float]:
    """Trains, writes the backbone's weights in float16, and gives the accuracy on unseen doodles by head."""
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
            model, heads, jiggle(pixels[chosen], rows), {head: label[chosen] for head, label in labels.items()}
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
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain_demo_backbone", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="doodles per step (default %(default)s)")
    parser.add_argument("--doodles", type=int, default=16_000, help="doodles to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the doodles and the training (default %(default)s)")
    given = parser.parse_args(arguments)
    pretrain(given.out, steps=given.steps, batch=given.batch, doodles=given.doodles, seed=given.seed)


if __name__ == "__main__":
    main()
