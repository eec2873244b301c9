"""The Grappa layer against a literal Algorithm 1: time of both directions, and memory kept for the backward pass.

On a GPU all sides run under autocast to bfloat16, as in training.

Optionally Eq. (4) over several ranks: the correlation matrix by rows, whole on every rank, and whole by plain autograd,
which sums the matrix and its gradient over the ranks. One step is value and gradients of all pairs.

Shapes: B images (or pairs of all ranks), T tokens, D channels, N adaptor sets, H bottleneck, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    CAN_WATCH_MEMORY,
    MIB,
    Log,
    Timing,
    add_run,
    aligned,
    aligned_header,
    check_device,
    check_least,
    check_positive,
    machine,
    memory_growth,
    over_ranks,
    run_workers,
    timed,
    turns,
    wait_for,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import Adaptors, Attention, GrappaLayer, create_backbone
from grappa_dist.models.precision import products_in
from grappa_dist.training.barlow_twins_loss import (
    Penalty,
    barlow_twins,
    by_rows_cost,
    by_rows_penalty,
    whole_cost,
    whole_penalty,
)

OURS, STACKED, LISTED = "ours", "literal, stacked", "literal, set by set"
ROWS, WHOLE, PLAIN = "by rows", "whole", "whole, plain autograd"  # ways of the correlation matrix
BETA = 0.0051


class LiteralAdaptors:
    """U_i = A_i(h) + y, alpha = softmax(Q pool(h) . K pool(U_i) / sqrt(D)), out = sum_i alpha_i U_i + x; (B, T, D)."""

    def __init__(self, adaptors: Adaptors, attention: Attention) -> None:
        self._sets = [adaptors.tensors(i) for i in range(adaptors.num_sets)]
        self._attention = attention

    def _outputs(self, h: Tensor, y: Tensor) -> list[Tensor]:
        return [
            F.linear(F.gelu(F.linear(h, s["down.weight"], s["down.bias"])), s["up.weight"], s["up.bias"]) + y
            for s in self._sets
        ]

    def stacked(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """With all U_i in one (B, N, T, D) tensor."""
        u = torch.stack(self._outputs(h, y), 1)
        query, keys = F.linear(h.mean(1), self._attention.query), F.linear(u.mean(2), self._attention.key)
        alpha = (torch.einsum("bd,bnd->bn", query, keys) / math.sqrt(h.shape[-1])).softmax(1)
        return (alpha[:, :, None, None] * u).sum(1) + x

    def listed(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """With N tensors (B, T, D), added up one by one."""
        outputs = self._outputs(h, y)
        query = F.linear(h.mean(1), self._attention.query)
        logits = [(query * F.linear(u.mean(1), self._attention.key)).sum(1) / math.sqrt(h.shape[-1]) for u in outputs]
        alpha = torch.stack(logits, 1).softmax(1)
        fused = torch.zeros_like(h)
        for i, u in enumerate(outputs):
            fused = fused + alpha[:, i, None, None] * u
        return fused + x


class LiteralLayer(nn.Module):
    """A plain pre-norm ViT block, and fusion by `fuse(h, x, y)` from its inner tensors."""

    def __init__(self, block: Any, fuse: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self._fuse = block, fuse

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = tokens + self.block.attn(self.block.norm1(tokens))
        y: Tensor = self.block.mlp(self.block.norm2(x))
        return self._fuse(x + y, x, y)


@dataclass(frozen=True)
class FuseSettings:
    """Options of `bench.py fuse`; the defaults are ViT-S/16 and eight sets."""

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
class SideFindings:
    """One side: our layer or a literal one."""

    name: str
    forward: Timing
    both: Timing  # forward and backward
    kept: int  # bytes kept for the backward pass, weights left out


@dataclass(frozen=True)
class FuseFindings:
    """Results of `bench.py fuse`."""

    layer: list[SideFindings]  # adaptors and fusion alone, the block's output given
    model: list[SideFindings]  # whole blocks in a row
    difference: float  # largest one of ours to the literal layer in output and gradients, over the largest value


def measure_fuse(settings: FuseSettings, log: Log) -> FuseFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(0)
    adaptors, attention = drawn_layer(settings, generator)
    alone = _alone(settings, adaptors, attention, generator)
    log("the layer")
    layer = _measure(alone, settings.repeats)
    log(f"a model of {settings.depth} blocks")
    model = _measure(_model(settings, adaptors, attention, generator), settings.repeats)
    return FuseFindings(layer, model, _difference(alone))


def drawn_layer(settings: FuseSettings, generator: torch.Generator) -> tuple[Adaptors, Attention]:
    """Frozen adaptors that are no identity, and an attention with gradients."""
    adaptors = Adaptors(settings.sets, settings.dim, settings.bottleneck)
    adaptors.initialise(generator)
    attention = Attention(settings.dim)
    attention.initialise(generator)
    with torch.no_grad():
        adaptors.up_weight.normal_(0, 1 / math.sqrt(settings.bottleneck), generator=generator)
        adaptors.up_bias.normal_(0, 0.1, generator=generator)
    return adaptors.requires_grad_(False).to(settings.device), attention.to(settings.device)


@dataclass(frozen=True)
class Side:
    """A forward pass, its inputs and parameters, and the gradient of its output."""

    module: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    learning: Sequence[Tensor]  # parameters with a gradient
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        """Copies of the inputs for one run, with gradients."""
        return [t.detach().clone().requires_grad_() for t in self.inputs]

    def forward(self, *leaves: Tensor) -> Tensor:
        """In the precision of training."""
        with products_in("bf16" if self.grad.device.type == "cuda" else "fp32", self.grad.device):
            return self.module(*leaves)


def _alone(
    settings: FuseSettings, adaptors: Adaptors, attention: Attention, generator: torch.Generator
) -> dict[str, Side]:
    shape = (settings.batch, settings.tokens, settings.dim)
    x, y, grad = (torch.randn(shape, generator=generator).to(settings.device) for _ in range(3))
    learning = list(attention.parameters())
    literal = LiteralAdaptors(adaptors, attention)
    return {
        OURS: Side(GrappaLayer(nn.Identity(), adaptors, attention), [x + y], learning, grad),
        STACKED: Side(literal.stacked, [x + y, x, y], learning, grad),
        LISTED: Side(literal.listed, [x + y, x, y], learning, grad),
    }


def _model(
    settings: FuseSettings, adaptors: Adaptors, attention: Attention, generator: torch.Generator
) -> dict[str, Side]:
    """Pre-norm ViT blocks with the same layer after each."""
    shape = {"embed_dim": settings.dim, "num_heads": settings.dim // 64, "depth": settings.depth}
    blocks = create_backbone("timm:vit_small_patch16_224", shape, {}, pretrained=False).blocks.to(settings.device)
    sizes = (settings.batch, settings.tokens, settings.dim)
    tokens, grad = (torch.randn(sizes, generator=generator).to(settings.device) for _ in range(2))
    literal = LiteralAdaptors(adaptors, attention)
    stacks = {
        OURS: nn.Sequential(*(GrappaLayer(block, adaptors, attention) for block in blocks)),
        STACKED: nn.Sequential(*(LiteralLayer(block, literal.stacked) for block in blocks)),
        LISTED: nn.Sequential(*(LiteralLayer(block, literal.listed) for block in blocks)),
    }
    return {name: Side(stack, [tokens], list(attention.parameters()), grad) for name, stack in stacks.items()}


def _measure(sides: dict[str, Side], repeats: int) -> list[SideFindings]:
    """All sides in turns; the first round warms up and is not counted."""
    forward, both = dict[str, Timing](), dict[str, Timing]()
    for number, order in enumerate(turns(list(sides), repeats + 1)):
        for name in order:
            for timings, backward in ((forward, False), (both, True)):
                timing = _run_side(sides[name], backward)
                if number:
                    add_run(timings, name, timing)
    return [SideFindings(name, forward[name], both[name], kept_bytes(side)) for name, side in sides.items()]


def _run_side(side: Side, backward: bool) -> Timing:
    leaves = side.leaves()

    def work() -> None:
        out = side.forward(*leaves)
        if backward:
            torch.autograd.grad(out, [*leaves, *side.learning], side.grad.to(out.dtype))
        wait_for(side.grad.device)

    return timed(work)[1]


def kept_bytes(side: Side) -> int:
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


def _difference(sides: dict[str, Side]) -> float:
    """Largest difference of ours to a literal layer, both in float32, over the largest value."""
    results = []
    for name in (OURS, LISTED):
        side, leaves = sides[name], sides[name].leaves()
        out = side.module(*leaves)
        grads = torch.autograd.grad(out, [*leaves, *side.learning], side.grad)
        of_x, of_y = (grads[0], grads[0]) if name == OURS else (grads[0] + grads[1], grads[0] + grads[2])  # h = x + y
        results.append([out.detach(), of_x, of_y, *grads[len(leaves) :]])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def as_text(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> str:
    s = settings
    device = "CPU alone" if s.device == "cpu" else f"{torch.cuda.get_device_name()}, bfloat16 by autocast"
    sizes = f"B={s.batch}, T={s.tokens}, D={s.dim}, N={s.sets}, H={s.bottleneck}"
    titles = {"adaptors and fusion alone": findings.layer, f"{s.depth} whole ViT blocks": findings.model}
    blocks = [aligned_header({**header, "sizes": sizes, "devices": device})]
    blocks += [_side_by_side(title, found) for title, found in titles.items()]
    difference = f"{findings.difference:.1e} of the largest value"
    end = f"ours and literal differ by at most {difference}, in output and gradients (float32)"
    return "\n\n".join([*blocks, end])


def _side_by_side(title: str, found: Sequence[SideFindings]) -> str:
    ratios = ["ratio", "CPU ratio"]
    titles = [title, "forward, ms", *ratios, "forward+backward, ms", *ratios, "kept, MiB", "ratio"]
    lines, ours = [titles], next(f for f in found if f.name == OURS)
    for side in found:
        ratio = {name: "" if side is ours else f"{value:.2f}" for name, value in _ratios(side, ours).items()}
        lines.append(
            [
                side.name,
                f"{1000 * side.forward.fastest:.1f}",
                ratio["forward"],
                ratio["forward_cpu"],
                f"{1000 * side.both.fastest:.1f}",
                ratio["forward_backward"],
                ratio["forward_backward_cpu"],
                f"{side.kept / MIB:.1f}",
                ratio["kept"],
            ]
        )
    return aligned(lines)


def _ratios(side: SideFindings, ours: SideFindings) -> dict[str, float]:
    """A baseline over ours: above 1, ours is faster or keeps less."""
    return {
        "forward": side.forward.fastest / ours.forward.fastest,
        "forward_cpu": side.forward.fastest_cpu / ours.forward.fastest_cpu,
        "forward_backward": side.both.fastest / ours.both.fastest,
        "forward_backward_cpu": side.both.fastest_cpu / ours.both.fastest_cpu,
        "kept": side.kept / max(1, ours.kept),
    }


def as_json(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> dict[str, Any]:
    def plain(found: Sequence[SideFindings]) -> list[dict[str, Any]]:
        ours = next(f for f in found if f.name == OURS)
        return [
            {
                "name": f.name,
                "forward_s": f.forward.runs,
                "forward_backward_s": f.both.runs,
                "forward_cpu_s": f.forward.cpu_runs,
                "forward_backward_cpu_s": f.both.cpu_runs,
                "kept_bytes": f.kept,
                "ratio": _ratios(f, ours),
            }
            for f in found
        ]

    return {
        "machine": header,
        "settings": vars(settings),
        "layer": plain(findings.layer),
        "model": plain(findings.model),
        "largest_difference": findings.difference,
    }


@dataclass(frozen=True)
class CorrelationSettings:
    """Options of `bench.py fuse --ranks`."""

    ranks: int = 2
    width: int = 4096
    pairs: int = 256
    repeats: int = 5

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_least(self, ranks=2, width=1, pairs=2, repeats=1)

    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by arithmetic."""
        sizes = self.pairs, self.width, self.ranks
        return {
            ROWS: 4 * by_rows_cost(*sizes).sent,
            WHOLE: 4 * whole_cost(*sizes).sent,
            PLAIN: 8 * whole_cost(*sizes).sent,
        }


@dataclass(frozen=True)
class CorrelationFindings:
    """One way to compute the matrix."""

    name: str
    timing: Timing  # of a step: seconds of the slowest rank, CPU seconds of all ranks
    peak: int | None  # bytes by which a rank grew at most in a step
    loss: float


def measure_correlation(settings: CorrelationSettings) -> list[CorrelationFindings]:
    settings.check()
    ranks = run_workers(_measure_rank, settings.ranks, settings)
    found = []
    for of_way in zip(*ranks, strict=True):
        peaks = [rank.peak for rank in of_way if rank.peak is not None]
        timing = over_ranks([rank.timing for rank in of_way])
        found.append(replace(of_way[0], timing=timing, peak=max(peaks, default=None)))
    return found


def _measure_rank(comm: Comm, settings: CorrelationSettings) -> list[CorrelationFindings]:
    """All ways as one rank measures them."""
    generator = torch.Generator().manual_seed(comm.rank)
    own = len(range(comm.rank, settings.pairs, comm.size))
    za, zb = (torch.randn(own, settings.width, generator=generator, requires_grad=True) for _ in range(2))
    penalties = {ROWS: by_rows_penalty(comm), WHOLE: whole_penalty(comm), PLAIN: _autograd_penalty(comm)}

    def step(name: str) -> float:
        za.grad = zb.grad = None
        loss: Tensor = barlow_twins(za, zb, BETA, comm.allsum, penalty=penalties[name])
        loss.backward()
        return loss.item()

    losses = {name: step(name) for name in penalties}  # a warm-up as well
    peaks = {name: memory_growth(partial(step, name))[1] if CAN_WATCH_MEMORY else None for name in penalties}
    timings: dict[str, Timing] = {}
    for order in turns(list(penalties), settings.repeats):
        for name in order:
            comm.barrier()
            add_run(timings, name, timed(partial(step, name))[1])
    return [CorrelationFindings(name, timings[name], peaks[name], losses[name]) for name in penalties]


def _autograd_penalty(comm: Comm) -> Penalty:
    """C on every rank, and its gradient by plain autograd through the sum over ranks."""

    def penalty(a: Tensor, b: Tensor, beta: float) -> Tensor:
        c = comm.allsum(a.T @ b)  # (D, D)
        on = (1 - torch.diagonal(c)).square().sum()
        return on + beta * c.square().fill_diagonal_(0).sum()

    return penalty


def correlation_text(settings: CorrelationSettings, found: list[CorrelationFindings]) -> str:
    ours, sent = found[0].timing, settings.sent()
    title = f"C, D={settings.width}, B={settings.pairs}, R={settings.ranks}"
    lines = [[title, "ms", "ratio", "CPU ms of all", "ratio", "sent, MiB a rank", "peak, MiB a rank"]]
    for side in found:
        wall, cpu = side.timing.fastest, side.timing.fastest_cpu
        lines.append(
            [
                side.name,
                f"{1000 * wall:.1f}",
                f"{wall / ours.fastest:.2f}",
                f"{1000 * cpu:.1f}",
                f"{cpu / ours.fastest_cpu:.2f}",
                f"{sent[side.name] / MIB:.1f}",
                "-" if side.peak is None else f"{side.peak / MIB:.1f}",
            ]
        )
    return aligned(lines)


def correlation_json(settings: CorrelationSettings, found: list[CorrelationFindings]) -> dict[str, Any]:
    sides = [
        {
            "name": side.name,
            "runs_s": side.timing.runs,
            "cpu_runs_s": side.timing.cpu_runs,
            "peak_bytes": side.peak,
            "sent_bytes": settings.sent()[side.name],
            "loss": side.loss,
        }
        for side in found
    ]
    return {"settings": vars(settings), "sides": sides}


SHORT = "against a literal Algorithm 1"
DESCRIPTION = """\
The adaptors and their fusion against a literal Algorithm 1 of the paper, once with all adapted outputs in one
tensor and once set by set: time forward and forward+backward (gradients of the input, Q and K; adaptors are frozen),
memory kept for the backward pass, and the same for whole blocks, on a CPU or, in bfloat16 by autocast, on a GPU.
Ratios are baseline / ours, of the fastest run of each side.

With --ranks also the correlation matrix of Barlow Twins, value and gradients, over that many processes of one thread:
by rows, whole on every rank, and whole by plain autograd; ratios are to the first of these."""
EXAMPLE = """examples, half a minute each:
  python launch/bench.py fuse --repeats 9 --json fuse.json
  python launch/bench.py fuse --ranks 2 --width 4096 --pairs 256 --batch 1 --depth 1"""


def arguments(add: Callable[..., Any]) -> None:
    add("--batch", type=int, default=16, metavar="B", help="images; default: %(default)s")
    add("--tokens", type=int, default=197, metavar="T", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--sets", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--bottleneck", type=int, default=64, metavar="H", help="default: %(default)s")
    add("--depth", type=int, default=2, metavar="N", help="whole blocks; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16; default: %(default)s")
    add("--repeats", type=int, default=5, metavar="N", help="in alternating order, the fastest; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--ranks", type=int, metavar="R", help="also the correlation matrix, over R ranks; default: without it")
    add("--width", type=int, default=4096, metavar="D", help="of that matrix; default: %(default)s")
    add("--pairs", type=int, default=256, metavar="B", help="over all ranks; default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    ranks, width, pairs = (options.pop(name) for name in ("ranks", "width", "pairs"))
    settings = FuseSettings(**options)
    matrix = None if ranks is None else CorrelationSettings(ranks, width, pairs, settings.repeats)
    if matrix is not None:
        matrix.check()
    header = machine(settings.threads, "timm")
    findings = measure_fuse(settings, log)
    text, numbers = as_text(header, settings, findings), as_json(header, settings, findings)
    if matrix is None:
        return text, numbers
    log(f"the correlation matrix on {ranks} ranks")
    found = measure_correlation(matrix)
    numbers["matrix"] = correlation_json(matrix, found)
    return f"{text}\n\n{correlation_text(matrix, found)}", numbers
