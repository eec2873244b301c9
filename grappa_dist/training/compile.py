"""torch.compile for the layers that learn, where a trial on this GPU shows the same values and less time.

Compiled kernels are chosen by timings, so two runs with them may differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.console import format_number
from grappa_dist.models import PackedGrappa
from grappa_dist.progress import trial_lost
from grappa_dist.search.backends import least_seconds

GAIN, ROUNDS = 1.05, 5  # the least speed-up, by the fastest of as many passes
# The largest distance from float32 that is accepted: a multiple of that of plain bfloat16 or, if that is more, a
# share of the largest value.
FURTHER, ROUNDING = 2.0, 1e-5
COMPARED = 8  # images, in features and gradients
Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class _Pass:
    """Features and gradients of a forward and backward pass."""

    values: list[Tensor]

    def distance(self, other: _Pass) -> float:
        """The largest difference in any of them, as a share of the largest of its values; NaN where any is."""
        pairs = zip(self.values, other.values, strict=True)
        shares = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]
        return float(torch.stack(shares).max())  # Python's max would drop a NaN that is not its first


def seconds(work: Callable[[], object]) -> float:
    """The fastest of a few runs."""
    return least_seconds(work, ROUNDS)


def _too_far(distance: float, allowed: float) -> str:
    return "" if distance <= allowed else f"off by {format_number(distance, 2)}, {format_number(allowed, 2)} allowed"


def compile_if_faster(
    model: PackedGrappa,
    images: int,
    *,
    backend: str = "inductor",
    measure: Measure = seconds,
) -> str:
    """Compiles the layers if that makes a batch of `images` faster; returns what was found, for the log.

    To be called before there is an engine, whose hooks would take the trial's gradients.
    """
    size, device = model.backbone.preprocess.image_size, model.backbone.mean.device
    if device.type != "cuda" and backend == "inductor":
        return "not compiled: no GPU"
    noise = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    few = noise[:COMPARED]  # in float32 they take twice the memory, too much for all images
    torch.compiler.reset()  # graphs of earlier jobs count against a limit, past which nothing is compiled
    try:
        right, plain = _pass_in_fp32(model, few), _pass(model, few)
        plain_s = measure(lambda: _pass(model, noise))
        for layer in model.layers:
            layer.compiled = torch.compile(layer.compute, backend=backend)
        found = _pass(model, few)
        allowed = max(FURTHER * plain.distance(right), ROUNDING)
        why = _too_far(found.distance(right), allowed)
        compiled_s = measure(lambda: _pass(model, noise))
        if not why and GAIN * compiled_s > plain_s:
            why = "not faster"
        times = f"{images} images take {1e3 * compiled_s:.1f} ms compiled, {1e3 * plain_s:.1f} ms plain"
    except Exception as error:  # whatever a compiler may raise
        why, times = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", ""
        trial_lost("torch.compile", error)
    if why:
        for layer in model.layers:
            layer.compiled = None
    return "; ".join(part for part in ("compiled" if not why else f"not compiled: {why}", times) if part)


def _pass_in_fp32(model: PackedGrappa, images: Tensor) -> _Pass:
    precision = model.backbone.precision
    try:
        model.backbone.compute_in("fp32")
        return _pass(model, images)
    finally:
        model.backbone.compute_in(precision)


def _pass(model: PackedGrappa, images: Tensor) -> _Pass:
    """As a step of training, with a loss that weighs every feature of an image differently; leaves no gradients."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        z = model(images).float()
        (z * torch.linspace(-1, 1, z.shape[-1], device=z.device)).sum().backward()
        return _Pass([z.detach(), *(p.grad.clone() for p in learning if p.grad is not None)])
    finally:
        for parameter in learning:
            parameter.grad = None
