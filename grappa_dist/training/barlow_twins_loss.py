"""Barlow Twins, Eq. (4), on the batch of all ranks: the loss, its projector, and its exact accumulation.

The loss is a function of the correlation matrix C = A^T B of all pairs. Every rank holds C, or a block of its rows
where that is cheaper; in either case one matrix is held, which is C and then its gradient. As with `Comm.allsum`, every
rank has the same value, and the gradient that reaches a rank's own pairs is R times the true one.

Training (stages/fuse.py) runs `Projector`, `barlow_twins` and `accumulate`. The package exports `barlow_twins`, so this
module has another name.

Shapes: B pairs of this rank (in costs: of all ranks), D projected dimensions, m rows of C in a block, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.deepspeed_engine import Engine

AllSum = Callable[[Tensor], Tensor]
Penalty = Callable[[Tensor, Tensor, float], Tensor]
Sizes = Callable[[], Sequence[int]]

_EPS = 1e-5  # of a variance
_CHUNK_ROWS = 256  # of C at a time, where its squares are added up
_PASSES = 4  # over C: adding up what ranks have, the squares (two operations), the gradient in place of the matrix


def barlow_twins(
    za: Tensor, zb: Tensor, beta: float, allsum: AllSum = lambda t: t, *, penalty: Penalty | None = None
) -> Tensor:
    """Eq. (4) on the global batch, a scalar that is the same on every rank.

    Ranks may hold uneven parts of the batch, also none (0, D). Even then za and zb must require gradients, since the
    backward pass sums over ranks too and waits for all of them.

    Args:
        za, zb: (B, D), row i of both from one pair; computed in float32 at least, whatever autocast says.
        allsum: adds over ranks and lets gradients through (see distributed/collectives.py).
        penalty: Eq. (4) of C = A^T B over all ranks, from a rank's A and B (B, D) and beta; None: with C on every rank,
            as `whole_penalty`. Training gives what `penalty_of` chooses.

    Raises:
        ValueError: za and zb are not of one shape (B, D).
    """
    if za.shape != zb.shape or za.ndim != 2:
        raise ValueError(f"barlow_twins: za {tuple(za.shape)} and zb {tuple(zb.shape)} must both be (B, D), row by row")
    dtype = torch.promote_types(torch.promote_types(za.dtype, zb.dtype), torch.float32)
    za, zb = za.to(dtype), zb.to(dtype)  # bf16 cannot count past 256
    size = allsum(za.new_full((), len(za)))  # a kernel writes it: `new_tensor` waits for a GPU

    def standardise(z: Tensor) -> Tensor:  # (B, D), by the statistics of all ranks
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) / torch.sqrt(var + _EPS)

    with torch.autocast(za.device.type, enabled=False):
        a, b = standardise(za) / size, standardise(zb)
        return _Whole.apply(a, b, beta, allsum) if penalty is None else penalty(a, b, beta)  # type: ignore[no-untyped-call]


def penalty_of(comm: Comm, batch: int, dim: int, sizes: Sizes | None = None) -> Penalty:
    """The cheaper penalty for batches of at most `batch` pairs over all ranks, the same one on all ranks."""
    return by_rows_penalty(comm, sizes) if rows_are_cheaper(batch, dim, comm.size) else whole_penalty(comm)


def whole_penalty(comm: Comm) -> Penalty:
    """C on every rank, summed in a ring."""
    return lambda a, b, beta: _Whole.apply(a, b, beta, comm.sum_)  # type: ignore[no-untyped-call]


def by_rows_penalty(comm: Comm, sizes: Sizes | None = None) -> Penalty:
    """On every rank its own block of rows of C; pairs and their gradients travel.

    Args:
        sizes: gives the pairs of each rank in this step; None: ranks tell each other, and the host waits for a GPU.
    """
    return lambda a, b, beta: _ByRows.apply(a, b, beta, comm, sizes and sizes())  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    """`allsum` may add in place: it is called without gradients, on tensors made here."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, beta: float, allsum: AllSum) -> Tensor:
        c = allsum(a.T @ b)
        value = barlow_penalty_and_grad_(c, 0, beta)
        ctx.allsum = allsum
        ctx.save_for_backward(a, b, c)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, of_c = ctx.saved_tensors
        scale = ctx.allsum(grad.clone())
        return (b @ of_c.T).mul_(scale), (a @ of_c).mul_(scale), None, None


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, beta: float, comm: Comm, sizes: Sequence[int] | None) -> Tensor:
        blocks = [block_of(a.shape[1], rank, comm.size) for rank in range(comm.size)]
        own = blocks[comm.rank]  # its rows of C are of these columns of all first views, and all of the second ones
        parts = comm.gather(b, sizes)
        sizes = [len(part) for part in parts]
        second = torch.cat(parts)  # (B, D) of all ranks
        del parts
        first = torch.cat(comm.exchange([a[:, of] for of in blocks], [(n, own.stop - own.start) for n in sizes]))
        c = first.T @ second  # (m, D) from (B, m)
        value = barlow_penalty_and_grad_(c, own.start, beta)
        ctx.comm, ctx.sizes, ctx.widths = comm, sizes, [of.stop - of.start for of in blocks]
        ctx.save_for_backward(first, second, c)
        return comm.sum_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second, of_c = ctx.saved_tensors
        comm, num, dim = ctx.comm, ctx.sizes[ctx.comm.rank], second.shape[1]
        scale = comm.sum_(grad.clone())
        columns = comm.exchange((second @ of_c.T).split(ctx.sizes), [(num, width) for width in ctx.widths])
        of_blocks = comm.exchange((first @ of_c).split(ctx.sizes), [(num, dim)] * comm.size)
        of_b = torch.zeros_like(of_blocks[0])
        for of_block in of_blocks:
            of_b += of_block
        return torch.cat(columns, dim=1).mul_(scale), of_b.mul_(scale), None, None, None


def block_of(dim: int, rank: int, size: int) -> slice:
    """The rows of C that one of `size` ranks holds; perhaps none."""
    return slice(dim * rank // size, dim * (rank + 1) // size)


def barlow_penalty_and_grad_(c: Tensor, first: int, beta: float) -> Tensor:
    """The part in Eq. (4) of rows [first, first + m) of C, a scalar; `c` (m, D) becomes its gradient, in place."""
    diagonal = c[:, first : first + len(c)].diagonal()  # a view, (m,)
    missing = diagonal - 1
    diagonal.zero_()
    off = sum((rows.square().sum() for rows in c.split(_CHUNK_ROWS)), c.new_zeros(()))
    c.mul_(2 * beta)
    diagonal.copy_(2 * missing)
    return missing.square().sum() + beta * off


@dataclass(frozen=True)
class CorrelationCost:
    """What C costs each rank in a step, forward and backward, if ranks hold equal parts of the batch."""

    sent: float  # numbers sent, and as many received
    held: float  # numbers at the peak, the rank's own pairs not counted
    operations: float


def whole_cost(batch: int, dim: int, ranks: int) -> CorrelationCost:
    """Every rank holds C, the sum of all ranks' products by a ring; its gradient needs no sum, all ranks have it."""
    sent = 2 * (ranks - 1) / ranks * dim**2
    return CorrelationCost(sent, dim**2, _products(batch, dim, ranks) + _PASSES * dim**2)


def by_rows_cost(batch: int, dim: int, ranks: int) -> CorrelationCost:
    """Every rank holds a block of rows of C, receives all second views and its columns of the first ones, and sends
    gradients back."""
    rows, pairs = dim / ranks, batch * dim
    sent = 2 * (ranks - 1) / ranks * (pairs + pairs / ranks)
    held = rows * dim + 4 * (pairs + pairs / ranks)  # pairs; their gradients as computed, as sent and as received
    return CorrelationCost(sent, held, _products(batch, dim, ranks) + _PASSES * rows * dim + pairs)


def _products(batch: int, dim: int, ranks: int) -> float:
    """Operations of a rank for C and the gradients of both views, whole or by rows."""
    return 3 * 2 * batch * dim**2 / ranks


def rows_are_cheaper(batch: int, dim: int, ranks: int) -> bool:
    """Whether C by rows sends less than C whole and computes no more: where the batch is no wider than about D."""
    rows, whole = by_rows_cost(batch, dim, ranks), whole_cost(batch, dim, ranks)
    return rows.sent < whole.sent and rows.operations <= whole.operations


class Projector(nn.Module):
    """The projector g, thrown away after training: Linear-BN-ReLU for all widths but the last, then Linear; no biases
    (Zbontar et al., Barlow Twins, 2021)."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [dim, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(GlobalBatchNorm(width) for width in widths[:-1])

    @torch.no_grad()
    def initialise(self, rng: torch.Generator) -> None:
        """The default init of linear layers."""
        for linear in self.linears:
            bound = 1 / math.sqrt(linear.in_features)  # type: ignore[arg-type]
            linear.weight.uniform_(-bound, bound, generator=rng)  # type: ignore[operator]

    def forward(self, z: Tensor, allsum: AllSum = lambda t: t) -> Tensor:
        """Features (B, channels) -> (B, D); each call is one view and uses that view's statistics."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            z = F.relu(norm(linear(z), allsum))
        return self.linears[-1](z)


class GlobalBatchNorm(nn.Module):
    """Batch norm by the statistics of all ranks' rows; no running averages, since a projector is never evaluated."""

    def __init__(self, width: int, eps: float = _EPS) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, z: Tensor, allsum: AllSum) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # bf16 cannot count past 256
        size = allsum(z.new_full((), len(z)))
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def accumulate(
    engine: Engine,
    module: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    micro_batch: int,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """One step's gradients of `loss_of(za, zb)` on pairs (2B, 3, S, S), first views then second; returns the loss, a
    scalar on the device.

    Barlow Twins is a statistic of the whole batch, so the sum of the losses of micro-batches would be another loss.
    Instead: features of all micro-batches without a graph, the loss on all of them, then each micro-batch forward again
    and backward from the stored gradients of its features. The gradient is that of the whole batch.

    Args:
        after: called after each forward of the pass that sees every image once, to look at the model.
    """
    chunks = list(images.split(micro_batch)) if len(images) else []
    if len(chunks) <= 1:
        z = engine.forward(images) if len(images) else images.new_zeros((0, _width(module)), requires_grad=True)
        if len(images):
            after()
        loss = loss_of(*_views(z))
        engine.backward(loss)
        return loss.detach()
    z = _features(engine, chunks, after).requires_grad_()
    loss = loss_of(*_views(z))
    engine.backward(loss, last=False)
    assert z.grad is not None
    for i, (chunk, gradient) in enumerate(zip(chunks, z.grad.split(micro_batch), strict=True)):
        again = engine.forward(chunk)
        if not again.requires_grad:  # the attention over a single set has no gradient; the engine needs its backward
            again = again.detach().requires_grad_()
        engine.backward((again * gradient).sum(), last=i == len(chunks) - 1)
    return loss.detach()


@torch.no_grad()
def _features(engine: Engine, chunks: list[Tensor], after: Callable[[], None]) -> Tensor:
    parts = []
    for chunk in chunks:
        parts.append(engine.forward(chunk))
        after()
    return torch.cat(parts)


def _views(z: Tensor) -> tuple[Tensor, Tensor]:
    """First and second views, (B, channels) each."""
    return z[: len(z) // 2], z[len(z) // 2 :]


def _width(module: nn.Module) -> int:
    return int(module.grappa.embed_dim)  # type: ignore[union-attr, arg-type]
