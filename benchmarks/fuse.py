"""The Grappa layer against a literal Algorithm 1: time of both directions, and what the backward pass keeps.

On a GPU all sides run under autocast to bfloat16, as training does there.

Shapes: B images, T tokens, D channels, N adaptor sets, H bottleneck.

`bench.py fuse`: adaptors and fusion against a literal Algorithm 1.

Eq. (4) over several ranks: the correlation matrix by rows, whole on every rank, and whole by plain autograd.

Plain autograd sums the matrix and its gradient over the ranks. One step is value and gradients of all pairs.

Shapes: B pairs of all ranks, D dimensions, R ranks.

Findings of `fuse` as text for a terminal and as JSON.

Algorithm 1 of the paper to the letter, as a judge of speed. Shapes: B images, T tokens, D channels, N sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    CAN_WATCH_MEMORY,
    Timing,
    aligned,
    aligned_header,
    check_device,
    check_least,
    check_positive,
    held_bytes,
    machine,
    run_workers,
    timed,
    turns,
    watched_memory,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.make_shards.building import Tell
from grappa_dist.models import Adaptors, Attention, GrappaLayer, create_backbone
from grappa_dist.models.backbone import forward_precision
from grappa_dist.training.barlow_twins_loss import (
    Penalty,
    barlow_twins,
    by_rows_cost,
    by_rows_penalty,
    whole_cost,
    whole_penalty,
)

Fuse = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        """With N tensors (B, T, D), added up one after the other."""
        outputs = self._outputs(h, y)
        query = F.linear(h.mean(1), self._attention.query)
        logits = [(query * F.linear(u.mean(1), self._attention.key)).sum(1) / math.sqrt(h.shape[-1]) for u in outputs]
        alpha = torch.stack(logits, 1).softmax(1)
        fused = torch.zeros_like(h)
        for i, u in enumerate(outputs):
            fused = fused + alpha[:, i, None, None] * u
        return fused + x


class LiteralLayer(nn.Module):
    """A plain pre-norm ViT block, opened, and the fusion after it."""

    def __init__(self, block: Any, fuse: Fuse) -> None:
        super().__init__()
        self.block, self._fuse = block, fuse

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = tokens + self.block.attn(self.block.norm1(tokens))
        y: Tensor = self.block.mlp(self.block.norm2(x))
        return self._fuse(x + y, x, y)


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


_MIB = 2**20


def as_text(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> str:
    s = settings
    device = "CPU alone" if s.device == "cpu" else f"{torch.cuda.get_device_name()}, bfloat16 by autocast"
    sizes = f"B={s.batch}, T={s.tokens}, D={s.dim}, N={s.sets}, H={s.bottleneck}"
    titles = {"adaptors and fusion alone": findings.layer, f"{s.depth} whole ViT blocks": findings.model}
    blocks = [aligned_header({**header, "sizes": sizes, "devices": device})]
    blocks += [_side_by_side(title, found) for title, found in titles.items()]
    apart = f"{findings.apart:.1e} of the largest value"
    end = f"ours and literal differ by at most {apart}, in output and gradients (float32)"
    return "\n\n".join([*blocks, end])


def _side_by_side(title: str, found: Sequence[Found]) -> str:
    heads = [
        title,
        "forward, ms",
        "ratio",
        "CPU ratio",
        "forward+backward, ms",
        "ratio",
        "CPU ratio",
        "kept, MiB",
        "ratio",
    ]
    lines, ours = [heads], next(f for f in found if f.name == OURS)
    for side in found:
        ratio = {name: "" if side is ours else f"{value:.2f}" for name, value in _ratios(side, ours).items()}
        lines.append(
            [
                side.name,
                f"{1000 * min(side.forward.runs):.1f}",
                ratio["forward"],
                ratio["forward_cpu"],
                f"{1000 * min(side.both.runs):.1f}",
                ratio["forward_backward"],
                ratio["forward_backward_cpu"],
                f"{side.kept / _MIB:.1f}",
                ratio["kept"],
            ]
        )
    return aligned(lines)


def _ratios(side: Found, ours: Found) -> dict[str, float]:
    """A judge over ours: above 1, ours is faster or keeps less."""
    return {
        "forward": min(side.forward.runs) / min(ours.forward.runs),
        "forward_cpu": min(side.forward.cpu_runs) / min(ours.forward.cpu_runs),
        "forward_backward": min(side.both.runs) / min(ours.both.runs),
        "forward_backward_cpu": min(side.both.cpu_runs) / min(ours.both.cpu_runs),
        "kept": side.kept / max(1, ours.kept),
    }


def as_json(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> dict[str, Any]:
    def plain(found: Sequence[Found]) -> list[dict[str, Any]]:
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
        "largest_difference": findings.apart,
    }


ROWS, WHOLE, PLAIN = "by rows", "whole", "whole, plain autograd"
BETA = 0.0051


@dataclass(frozen=True)
class CorrelationSettings:
    """What to measure."""

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
class FoundCorrelation:
    """One way to do it."""

    name: str
    timing: Timing  # of a step: the slowest rank's seconds, the CPU seconds of all ranks
    peak: int | None  # bytes by which the rank that grew most grew in a step
    loss: float


def measure_correlation(settings: CorrelationSettings) -> list[FoundCorrelation]:
    settings.check()
    told = run_workers(_on_a_rank, settings.ranks, settings)
    found = []
    for name in (ROWS, WHOLE, PLAIN):
        runs = zip(*(rank[name]["runs"] for rank in told), strict=True)  # of every repeat, those of all ranks
        times = [(max(wall for wall, _ in ranks), sum(cpu for _, cpu in ranks)) for ranks in runs]
        peaks = [rank[name]["peak"] for rank in told]
        timing = Timing(tuple(wall for wall, _ in times), tuple(cpu for _, cpu in times))
        found.append(FoundCorrelation(name, timing, max(peaks) if CAN_WATCH_MEMORY else None, told[0][name]["loss"]))
    return found


def _on_a_rank(comm: Comm, settings: CorrelationSettings) -> dict[str, dict[str, Any]]:
    draws = torch.Generator().manual_seed(comm.rank)
    own = len(range(comm.rank, settings.pairs, comm.size))
    za, zb = (torch.randn(own, settings.width, generator=draws, requires_grad=True) for _ in range(2))
    penalties = {ROWS: by_rows_penalty(comm), WHOLE: whole_penalty(comm), PLAIN: _autograd_penalty(comm)}

    def step(name: str) -> float:
        za.grad = zb.grad = None
        loss: Tensor = barlow_twins(za, zb, BETA, comm.allsum, penalty=penalties[name])
        loss.backward()
        return loss.item()

    found: dict[str, dict[str, Any]] = {}
    for name in penalties:
        found[name] = {"loss": step(name), "runs": []}  # a warm-up as well
        found[name]["peak"] = _peak(comm, partial(step, name))
    for order in turns(list(penalties), settings.repeats):
        for name in order:
            comm.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step(name)
            found[name]["runs"].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def _autograd_penalty(comm: Comm) -> Penalty:
    """C on every rank, and its gradient by plain autograd through the sum over ranks."""

    def penalty(a: Tensor, b: Tensor, beta: float) -> Tensor:
        c = comm.allsum(a.T @ b)  # (D, D)
        on = (1 - torch.diagonal(c)).square().sum()
        return on + beta * c.square().fill_diagonal_(0).sum()

    return penalty


def _peak(comm: Comm, work: Callable[[], float]) -> int | None:
    if not CAN_WATCH_MEMORY:
        return None
    before = held_bytes()
    comm.barrier()
    with watched_memory() as peak:
        work()
    return peak[0] - before


def correlation_text(settings: CorrelationSettings, found: list[FoundCorrelation]) -> str:
    ours, sent = found[0].timing, settings.sent()
    title = f"C, D={settings.width}, B={settings.pairs}, R={settings.ranks}"
    lines = [[title, "ms", "ratio", "CPU ms of all", "ratio", "sent, MiB a rank", "peak, MiB a rank"]]
    for side in found:
        wall, cpu = min(side.timing.runs), min(side.timing.cpu_runs)
        lines.append(
            [
                side.name,
                f"{1000 * wall:.1f}",
                f"{wall / min(ours.runs):.2f}",
                f"{1000 * cpu:.1f}",
                f"{cpu / min(ours.cpu_runs):.2f}",
                f"{sent[side.name] / _MIB:.1f}",
                "-" if side.peak is None else f"{side.peak / _MIB:.1f}",
            ]
        )
    return aligned(lines)


def correlation_json(settings: CorrelationSettings, found: list[FoundCorrelation]) -> dict[str, Any]:
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
what is kept for the backward pass, and the same for whole blocks, on a CPU or, in bfloat16 by autocast, on a GPU.
Ratios are judge / ours, of the fastest run of each side.

With --ranks also the correlation matrix of Barlow Twins over so many processes of a thread each: by rows, whole on
every rank, and whole by plain autograd, value and gradients; ratios are to the first of these."""
EXAMPLE = """examples, half a minute each:
  python launch/bench.py fuse --repeats 9 --json json
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
    add("--ranks", type=int, metavar="R", help="also the correlation matrix, over so many; default: without it")
    add("--width", type=int, default=4096, metavar="D", help="of that matrix; default: %(default)s")
    add("--pairs", type=int, default=256, metavar="B", help="over all ranks; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    ranks, width, pairs = (asked.pop(name) for name in ("ranks", "width", "pairs"))
    settings = FuseSettings(**asked)
    matrix = None if ranks is None else CorrelationSettings(ranks, width, pairs, settings.repeats)
    if matrix is not None:
        matrix.check()
    header = machine(settings.threads, "timm")
    findings = measure_fuse(settings, tell)
    text, numbers = as_text(header, settings, findings), as_json(header, settings, findings)
    if matrix is None:
        return text, numbers
    tell(f"the correlation matrix on {ranks} ranks")
    found = measure_correlation(matrix)
    return f"{text}\n\n{correlation_text(matrix, found)}", {
        **numbers,
        "matrix": correlation_json(matrix, found),
    }
