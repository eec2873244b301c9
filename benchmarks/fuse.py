"""The Grappa layer against a literal Algorithm 1: time of both directions, and what the backward pass keeps.

On a GPU all sides run under autocast to bfloat16, as training does there.

Shapes: B images, T tokens, D channels, N adaptor sets, H bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import Timing, timed, turns
from grappa_dist.bench.arguments import check_device, check_positive
from grappa_dist.bench.literal import LiteralAdaptors, LiteralLayer
from grappa_dist.data.progress import Tell
from grappa_dist.models import Adaptors, Attention, GrappaLayer, create_backbone
from grappa_dist.ops.precision import forward_precision

OURS, STACKED, LISTED = "ours", "literal, stacked", "literal, set by set"
SIDES = (OURS, STACKED, LISTED)


@dataclass(frozen=True)
class FuseSettings:
    """What to measure; the defaults are ViT-S/16 and eight sets."""

    batch: int = 16
    tokens: int = 197
    dim: int = 384
    sets: int = 8
    bottleneck: int = 64
    depth: int = 2  # blocks of the whole model
    repeats: int = 5
    threads: int = 2
    device: str = "cpu"

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, *(name for name in vars(self) if name != "device"))
        check_device(self.device)
        if self.dim % 64:
            raise ValueError(f"--dim must be a multiple of 64, the width of a head, got {self.dim}")


@dataclass(frozen=True)
class Found:
    """One side."""

    name: str
    forward: Timing
    both: Timing  # forward and backward
    kept: int  # bytes that the backward pass needs, weights left out


@dataclass(frozen=True)
class FuseFindings:
    layer: list[Found]  # adaptors and fusion alone, the block's output given
    model: list[Found]  # whole blocks in a row
    apart: float  # largest difference of ours from the literal layer in output and gradients, over the largest value


def measure_fuse(settings: FuseSettings, tell: Tell) -> FuseFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    draws = torch.Generator().manual_seed(0)
    adaptors, attention = drawn_layer(settings, draws)
    alone = _alone(settings, adaptors, attention, draws)
    tell("the layer")
    layer = _measure(alone, settings.repeats)
    tell(f"a model of {settings.depth} blocks")
    model = _measure(_model(settings, adaptors, attention, draws), settings.repeats)
    return FuseFindings(layer, model, _apart(alone))


def drawn_layer(settings: FuseSettings, draws: torch.Generator) -> tuple[Adaptors, Attention]:
    """Frozen adaptors that do something, and an attention that learns."""
    adaptors = Adaptors(settings.sets, settings.dim, settings.bottleneck)
    adaptors.initialise(draws)
    attention = Attention(settings.dim)
    attention.initialise(draws)
    with torch.no_grad():
        adaptors.up_weight.normal_(0, 1 / math.sqrt(settings.bottleneck), generator=draws)
        adaptors.up_bias.normal_(0, 0.1, generator=draws)
    return adaptors.requires_grad_(False).to(settings.device), attention.to(settings.device)


@dataclass(frozen=True)
class _Side:
    """A forward pass, what it is a function of, and the gradient of its output."""

    module: Callable[..., Tensor]
    given: Sequence[Tensor]  # fresh leaves are made of them for every run
    learning: Sequence[Tensor]
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in self.given]

    def forward(self, *leaves: Tensor) -> Tensor:
        """As it is measured."""
        with forward_precision(self.grad.device):
            return self.module(*leaves)


def _alone(
    settings: FuseSettings, adaptors: Adaptors, attention: Attention, draws: torch.Generator
) -> dict[str, _Side]:
    shape = (settings.batch, settings.tokens, settings.dim)
    x, y, grad = (torch.randn(shape, generator=draws).to(settings.device) for _ in range(3))
    learning = list(attention.parameters())
    literal = LiteralAdaptors(adaptors, attention)
    return {
        OURS: _Side(GrappaLayer(nn.Identity(), adaptors, attention), [x + y], learning, grad),
        STACKED: _Side(literal.stacked, [x + y, x, y], learning, grad),
        LISTED: _Side(literal.listed, [x + y, x, y], learning, grad),
    }


def _model(
    settings: FuseSettings, adaptors: Adaptors, attention: Attention, draws: torch.Generator
) -> dict[str, _Side]:
    """Pre-norm ViT blocks with the same layer after each."""
    shape = {"embed_dim": settings.dim, "num_heads": settings.dim // 64, "depth": settings.depth}
    blocks = create_backbone("timm:vit_small_patch16_224", shape, {}, pretrained=False).blocks.to(settings.device)
    sizes = (settings.batch, settings.tokens, settings.dim)
    tokens, grad = (torch.randn(sizes, generator=draws).to(settings.device) for _ in range(2))
    literal = LiteralAdaptors(adaptors, attention)
    stacks = {
        OURS: nn.Sequential(*(GrappaLayer(block, adaptors, attention) for block in blocks)),
        STACKED: nn.Sequential(*(LiteralLayer(block, literal.stacked) for block in blocks)),
        LISTED: nn.Sequential(*(LiteralLayer(block, literal.listed) for block in blocks)),
    }
    return {name: _Side(stack, [tokens], list(attention.parameters()), grad) for name, stack in stacks.items()}


def _measure(sides: dict[str, _Side], repeats: int) -> list[Found]:
    """All sides in turn, one round first that is not counted."""
    runs: dict[tuple[str, bool], Timing] = {}
    for number, order in enumerate(turns(list(sides), repeats + 1)):
        for name in order:
            for backward in (False, True):
                took = _run(sides[name], backward)
                if number:
                    runs[name, backward] = runs[name, backward].and_then(took) if number > 1 else took
    return [Found(name, runs[name, False], runs[name, True], kept_bytes(side)) for name, side in sides.items()]


def _run(side: _Side, backward: bool) -> Timing:
    leaves = side.leaves()

    def work() -> None:
        out = side.forward(*leaves)
        if backward:
            torch.autograd.grad(out, [*leaves, *side.learning], side.grad.to(out.dtype))
        if side.grad.is_cuda:
            torch.cuda.synchronize()

    return timed(work)[1]


def kept_bytes(side: _Side) -> int:
    """Bytes of distinct memory that the forward pass keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {p.untyped_storage().data_ptr() for p in side.learning}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = side.forward(*side.leaves())
    del out
    return sum(size for pointer, size in kept.items() if pointer not in owned)


def _apart(sides: dict[str, _Side]) -> float:
    """Of ours and a literal layer, both in float32."""
    results = []
    for name in (OURS, LISTED):
        side, leaves = sides[name], sides[name].leaves()
        out = side.module(*leaves)
        grads = torch.autograd.grad(out, [*leaves, *side.learning], side.grad)
        of_x, of_y = (grads[0], grads[0]) if name == OURS else (grads[0] + grads[1], grads[0] + grads[2])  # h = x + y
        results.append([out.detach(), of_x, of_y, *grads[len(leaves) :]])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
