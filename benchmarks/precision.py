"""What bfloat16 saves and changes: a frozen ViT forward, a training step of adaptors, and each of their operators.

Seconds are of the CPU, over all threads, the fewest of some runs: on a busy machine they differ least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.adapt import AdaptSettings, learning_model, random_images
from benchmarks.harness import Log, Timing, aligned, aligned_header, check_positive, in_turns, machine
from grappa_dist.models import Backbone
from grappa_dist.models.precision import Precision

KINDS: tuple[Precision, ...] = ("fp32", "bf16")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, STEP = "frozen ViT, forward", "adaptor set, forward and backward"
HEAD = 64  # channels of a head of attention


@dataclass(frozen=True)
class PrecisionSettings:
    """Options of `bench.py precision`."""

    backbone: str
    image_size: int
    images: int
    threads: int
    repeats: int

    def check(self) -> None:
        check_positive(self, "image_size", "images", "threads", "repeats")

    def of(self, precision: Precision) -> AdaptSettings:
        """One adaptor set on this backbone."""
        return AdaptSettings(
            1, self.backbone, self.image_size, self.images, self.threads, 1, self.repeats, precision=precision
        )


@dataclass(frozen=True)
class Compared:
    """One piece of work in both precisions."""

    timings: dict[str, Timing]
    cosine: float | None = None  # the least of a feature, or that of all gradients; None: not compared

    @property
    def ratio(self) -> float:
        """How many times as fast bf16 is, by CPU seconds."""
        return self.timings["fp32"].fastest_cpu / self.timings["bf16"].fastest_cpu


def measure_precision(settings: PrecisionSettings, log: Log) -> dict[str, Compared]:
    """By piece of work."""
    settings.check()
    torch.set_num_threads(settings.threads)
    models = {precision: learning_model(settings.of(precision)) for precision in KINDS}
    bare = {precision: _bare(settings, precision) for precision in KINDS}
    images = random_images(settings.of("fp32"))
    forward = {p: partial(_features, bare[p], images) for p in KINDS}
    step = {p: partial(_gradients, models[p], images) for p in KINDS}
    found = {FORWARD: _compared(forward, settings, log), STEP: _compared(step, settings, log)}
    size = models["fp32"].backbone.preprocess.image_size
    tokens, width = (size // 16) ** 2 + 1, models["fp32"].embed_dim
    for name, sides in _operators(settings.images, tokens, width).items():
        found[name] = _compared(sides, settings, log)
    return found


def _bare(settings: PrecisionSettings, precision: Precision) -> Backbone:
    backbone = learning_model(settings.of(precision), class_token_only=False).backbone
    for place, layer in enumerate(list(backbone.blocks)):
        backbone.blocks[place] = layer.block
    return backbone


@torch.inference_mode()
def _features(model: Backbone, images: Tensor) -> Tensor:
    return F.normalize(model(images), dim=1)


def _gradients(model: Any, images: Tensor) -> Tensor:
    learning = [p for p in model.parameters() if p.requires_grad]
    z = model(images)
    loss = (z * torch.linspace(-1, 1, z.shape[-1])).mean()
    return F.normalize(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learning)]), dim=0).unsqueeze(0)


def _operators(images: int, tokens: int, width: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Forward and backward of the operators of a block and of an adaptor of 64 channels."""
    heads = width // HEAD
    shape = (images, heads, tokens, HEAD)
    found: dict[str, dict[str, Callable[[], Any]]] = {}

    def add(name: str, function: Callable[..., Tensor], *shapes: Sequence[int]) -> None:
        for precision, dtype in DTYPES.items():
            given = [torch.randn(*s).to(dtype).requires_grad_() for s in shapes]
            out = function(*given)
            grad = torch.randn_like(out)

            def forward(given: Any = given) -> Tensor:
                with torch.no_grad():
                    return function(*given)

            def backward(out: Tensor = out, given: Any = given, grad: Tensor = grad) -> Any:
                return torch.autograd.grad(out, given, grad, retain_graph=True)

            found.setdefault(f"{name}, forward", {})[precision] = forward
            found.setdefault(f"{name}, backward", {})[precision] = backward

    add("attention", F.scaled_dot_product_attention, shape, shape, shape)
    for inner, outer in ((width, 4 * width), (width, 64), (64, width)):
        add(f"linear {inner} to {outer}", F.linear, (images, tokens, inner), (outer, inner))
    add("GELU", F.gelu, (images, tokens, 4 * width))
    return found


def _compared(sides: Mapping[Any, Callable[[], Any]], settings: PrecisionSettings, log: Log) -> Compared:
    for work in sides.values():
        work()  # loads what it needs
    results, timings = in_turns(sides, settings.repeats, log)
    right, found = results["fp32"], results["bf16"]
    is_compared = isinstance(right, Tensor) and right.ndim == 2
    return Compared(timings, float((right * found).sum(1).min()) if is_compared else None)


def as_text(header: dict[str, str], settings: PrecisionSettings, found: dict[str, Compared]) -> str:
    about = (
        f"{settings.backbone} at {settings.image_size} px, {settings.images} images at a time; CPU ms of all of them"
    )
    lines: list[Sequence[str]] = [["", "fp32", "bf16", "times as fast", "least cosine"]]
    for name, one in found.items():
        times = [f"{1e3 * one.timings[precision].fastest_cpu:.2f}" for precision in KINDS]
        lines.append([name, *times, f"{one.ratio:.2f}", "-" if one.cosine is None else f"{one.cosine:.6f}"])
    return f"{aligned_header({**header, 'model': about})}\n\n{aligned(lines)}"


def as_json(header: dict[str, str], settings: PrecisionSettings, found: dict[str, Compared]) -> dict[str, Any]:
    sides = {
        name: {
            **{f"{p}_cpu_runs_s": one.timings[p].cpu_runs for p in KINDS},
            "ratio": one.ratio,
            "least_cosine": one.cosine,
        }
        for name, one in found.items()
    }
    return {"machine": header, "settings": vars(settings), "work": sides}


SHORT = "bf16 against fp32"
DESCRIPTION = """\
A frozen ViT of timm and a training step of one adaptor set on it, in bf16 and in fp32 on this CPU, and each of their
operators: CPU milliseconds, the ratio (above 1, bf16 is faster), and how near the features and gradients are."""
EXAMPLE = """example, some seconds:
  python launch/bench.py precision --backbone vit_tiny_patch16_224 --image-size 128 --threads 1"""


def arguments(add: Callable[..., Any]) -> None:
    add("--backbone", default="vit_small_patch16_224", metavar="TIMM", help="patches of 16 px; default: %(default)s")
    add("--image-size", type=int, default=224, metavar="PX", help="default: %(default)s")
    add("--images", type=int, default=8, metavar="N", help="at a time; default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, the fewest; default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = PrecisionSettings(**options)
    header = machine(settings.threads, "timm")
    found = measure_precision(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
