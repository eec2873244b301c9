"""A training step of adaptor sets with the last block for the class token alone against the whole block.

Forward, backward and Adam of the adaptors on one batch in memory: no decoding, no classifier, which are the same on
both sides. Both take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.adapt import PackingSettings
from benchmarks.harness import Timing, add_run, timed, turns
from grappa_dist.bench.limit import wait_for
from grappa_dist.bench.step import learning_model, made_up_images
from grappa_dist.bench.table import aligned
from grappa_dist.data.progress import Tell
from grappa_dist.models import PackedGrappa
from grappa_dist.models.packed import activation_bytes
from grappa_dist.ops.adam import adam
from grappa_dist.ops.precision import forward_precision

CLASS_TOKEN, WHOLE = "class token alone", "whole"


@dataclass(frozen=True)
class Side:
    timing: Timing  # of a step
    activation_bytes: int  # kept between forward and backward, of an image and all sets
    difference: float  # of its gradients from those of the whole block, as a share of the largest, in the first step


def measure_last_block(settings: PackingSettings, tell: Tell) -> dict[str, Side]:
    """Raises a ValueError where the last block of that backbone stays whole."""
    tell(f"the last block of {settings.backbone}")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _measured_last_block(settings)
    finally:
        torch.set_num_threads(before)


def _measured_last_block(settings: PackingSettings) -> dict[str, Side]:
    device = torch.device(settings.device)
    sides = (CLASS_TOKEN, WHOLE)  # of the same weights
    models = {name: learning_model(settings, class_token_only=name == CLASS_TOKEN).to(device) for name in sides}
    if models[CLASS_TOKEN].whole_because:
        raise ValueError(f"--backbone {settings.backbone}: {models[CLASS_TOKEN].whole_because}")
    images = made_up_images(settings)
    steps = {name: _step(model, images) for name, model in models.items()}
    gradients = {name: step() for name, step in steps.items()}  # this also warms up
    timings: dict[str, Timing] = {}
    for order in turns(list(steps), settings.repeats):
        for name in order:
            for _ in range(settings.steps):
                _, timing = timed(steps[name])
                add_run(timings, name, timing)
    largest = gradients[WHOLE].abs().max()
    return {
        name: Side(
            timings[name],
            activation_bytes(model, settings.image_size),
            float((gradients[name] - gradients[WHOLE]).abs().max() / largest),
        )
        for name, model in models.items()
    }


def _step(model: PackedGrappa, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step that gives the gradients it went by."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = adam(learning, 1e-3)
    # a norm's output has the same squares whatever the adaptors do
    weights = torch.linspace(-1, 1, model.embed_dim, device=images.device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with forward_precision(images.device):
            z = model(images)
        (z.float() * weights).mean().backward()
        optimizer.step()
        wait_for(images.device)
        return torch.cat([p.grad.flatten() for p in learning if p.grad is not None])

    return step


def last_block_json(settings: PackingSettings, found: dict[str, Side]) -> dict[str, Any]:
    short, whole = found[CLASS_TOKEN], found[WHOLE]
    return {
        "settings": vars(settings),
        "sides": [
            {
                "name": n,
                "runs_s": s.timing.runs,
                "cpu_runs_s": s.timing.cpu_runs,
                "activation_bytes": s.activation_bytes,
            }
            for n, s in found.items()
        ],
        "ratio": min(whole.timing.runs) / min(short.timing.runs),
        "cpu_ratio": min(whole.timing.cpu_runs) / min(short.timing.cpu_runs),
        "activation_ratio": whole.activation_bytes / short.activation_bytes,
        "gradient_difference": short.difference,
    }


def last_block_text(settings: PackingSettings, found: dict[str, Side]) -> str:
    ratios = last_block_json(settings, found)
    lines: list[Sequence[str]] = [["last block", "s a step", "CPU s", "MiB kept of an image"]]
    lines += [
        [n, f"{min(s.timing.runs):.3f}", f"{min(s.timing.cpu_runs):.3f}", f"{s.activation_bytes / 2**20:.1f}"]
        for n, s in found.items()
    ]
    notes = [
        f"{settings.in_words}; the least of {settings.repeats} x {settings.steps} steps",
        f"whole: {ratios['ratio']:.3f}x the class token alone ({ratios['cpu_ratio']:.3f}x by CPU), "
        f"{ratios['activation_ratio']:.3f}x its activations; gradients differ by {ratios['gradient_difference']:.1e}",
    ]
    return "\n".join([aligned(lines), *notes])
