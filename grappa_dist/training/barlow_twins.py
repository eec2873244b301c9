"""Barlow Twins, Eq. (4), on the batch of all ranks. Shapes: B pairs of one rank, D projected dimensions.

Exact accumulation for losses of the whole batch. Shapes: B pairs of this rank, D channels.

Eq. (4) of C = A^T B over all ranks' pairs: every rank holds C, or each a block of its rows, where that is cheaper.

Both hold one matrix, which is C and then its gradient. As with `Comm.allsum`, every rank has the same value, and the
gradient that reaches a rank's own pairs is R times the true one.

Shapes: P pairs of this rank, B of all ranks, D dimensions, m rows of C, R ranks.

The Barlow Twins projector g, thrown away after training. Shapes: B rows of this rank, C widths.

Pure mathematics on tensors: no files, no ranks, no globals.

The correlation matrix C of Barlow Twins, whole or by blocks of rows: its part of Eq. (4), and what a step costs.

Shapes: B pairs of the global batch, D projected dimensions, R ranks; a block has m rows of C, all D columns of them.
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

_CHUNK_ROWS = 256  # of C at a time, where its squares are added up
_PASSES = 4  # over C: adding up what ranks have, the squares (two operations), the gradient in place of the matrix


def block_of(dim: int, rank: int, size: int) -> slice:
    """The rows of C that one of `size` ranks holds; perhaps none."""
    return slice(dim * rank // size, dim * (rank + 1) // size)


def barlow_penalty_and_grad_(c: Tensor, first: int, beta: float) -> Tensor:
    """The share in Eq. (4) of rows [first, first + m) of C, a scalar; `c` (m, D) becomes its gradient, in place."""
    diagonal = c[:, first : first + len(c)].diagonal()  # a view, (m,)
    missing = diagonal - 1
    diagonal.zero_()
    off = sum((rows.square().sum() for rows in c.split(_CHUNK_ROWS)), c.new_zeros(()))
    c.mul_(2 * beta)
    diagonal.copy_(2 * missing)
    return missing.square().sum() + beta * off


@dataclass(frozen=True)
class Cost:
    """What C takes of each rank in a step, forward and backward, at even shares."""

    sent: float  # numbers, as many of which are received
    held: float  # numbers at the peak, own pairs left aside
    operations: float


def whole(batch: int, dim: int, ranks: int) -> Cost:
    """Every rank holds C, the sum of all ranks' products by a ring; its gradient needs no sum, all ranks have it."""
    sent = 2 * (ranks - 1) / ranks * dim**2
    return Cost(sent, dim**2, _products(batch, dim, ranks) + _PASSES * dim**2)


def by_rows(batch: int, dim: int, ranks: int) -> Cost:
    """Every rank holds a block of rows of C: all second views and its columns of the first ones come, gradients go."""
    rows, pairs = dim / ranks, batch * dim
    sent = 2 * (ranks - 1) / ranks * (pairs + pairs / ranks)
    held = rows * dim + 4 * (pairs + pairs / ranks)  # pairs; their gradients as computed, as sent and as they came
    return Cost(sent, held, _products(batch, dim, ranks) + _PASSES * rows * dim + pairs)


def _products(batch: int, dim: int, ranks: int) -> float:
    """C and the gradients of both views: as many products of a rank in either way."""
    return 3 * 2 * batch * dim**2 / ranks


def rows_are_cheaper(batch: int, dim: int, ranks: int) -> bool:
    """Whether C by rows sends less than C whole and computes no more; a batch of about the width is where they meet."""
    ours, theirs = by_rows(batch, dim, ranks), whole(batch, dim, ranks)
    return ours.sent < theirs.sent and ours.operations <= theirs.operations


AllSum = Callable[[Tensor], Tensor]
Penalty = Callable[[Tensor, Tensor, float], Tensor]


def barlow_twins(
    za: Tensor, zb: Tensor, beta: float, allsum: AllSum = lambda t: t, *, penalty: Penalty | None = None
) -> Tensor:
    """Eq. (4) on the global batch, a scalar that is the same on every rank.

    Ranks may hold uneven shares, one of them none (0, D); the za and zb of every rank must need gradients all the same,
    since the backward pass sums over ranks too and waits for all of them.

    Args:
        za, zb: (B, D), row i of both from one pair; computed in float32 at least, whatever autocast says.
        allsum: adds over ranks and lets gradients through (see distributed/collectives.py).
        penalty: Eq. (4) of C = A^T B over all ranks, from a rank's A and B (B, D) and beta, where C itself is to be
            made otherwise (see training/barlow_twins.py).
    """
    if za.shape != zb.shape or za.ndim != 2:
        raise ValueError(f"barlow_twins: za {tuple(za.shape)} and zb {tuple(zb.shape)} must both be (B, D), row by row")
    dtype = torch.promote_types(torch.promote_types(za.dtype, zb.dtype), torch.float32)
    za, zb = za.to(dtype), zb.to(dtype)  # bf16 cannot count past 256
    size = allsum(za.new_tensor(len(za)))

    def standardise(z: Tensor) -> Tensor:  # (B, D), by the statistics of all ranks
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) / torch.sqrt(var + 1e-5)

    with torch.autocast(za.device.type, enabled=False):
        a, b = standardise(za) / size, standardise(zb)
        return _penalty(a, b, beta, allsum) if penalty is None else penalty(a, b, beta)


def _penalty(a: Tensor, b: Tensor, beta: float, allsum: AllSum) -> Tensor:
    c = allsum(a.T @ b)  # (D, D)
    on = (1 - torch.diagonal(c)).square().sum()
    off = c.square().fill_diagonal_(0).sum()  # D = 8192 makes c 256 MiB: no further copies of it
    return on + beta * off


class GlobalBatchNorm(nn.Module):
    """Batch norm by the statistics of all ranks' rows; without running averages, since nobody evaluates a projector."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, z: Tensor, allsum: AllSum) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # bf16 cannot count past 256
        size = allsum(z.new_tensor(float(len(z))))
        mean = allsum(z.sum(0)) / size
        var = allsum((z - mean).square().sum(0)) / size
        return (z - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Projector(nn.Module):
    """Linear-BN-ReLU for all widths but the last, then Linear; no biases (Zbontar et al., Barlow Twins, 2021)."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [dim, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(GlobalBatchNorm(width) for width in widths[:-1])

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """The default init of linear layers."""
        for linear in self.linears:
            bound = 1 / math.sqrt(linear.in_features)  # type: ignore[arg-type]
            linear.weight.uniform_(-bound, bound, generator=generator)  # type: ignore[operator]

    def forward(self, z: Tensor, allsum: AllSum = lambda t: t) -> Tensor:
        """(B, D) -> (B, C); each call is one view, with statistics of its own."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            z = F.relu(norm(linear(z), allsum))
        return self.linears[-1](z)


def penalty_of(comm: Comm, batch: int, dim: int) -> Penalty:
    """The cheaper way for batches of up to so many pairs over all ranks; all ranks choose alike."""
    return by_rows_penalty(comm) if rows_are_cheaper(batch, dim, comm.size) else whole_penalty(comm)


def whole_penalty(comm: Comm) -> Penalty:
    """C on every rank, summed in a ring."""
    return lambda a, b, beta: _Whole.apply(a, b, beta, comm)  # type: ignore[no-untyped-call]


def by_rows_penalty(comm: Comm) -> Penalty:
    """On every rank the rows of C that are its own; what travels is pairs and their gradients."""
    return lambda a, b, beta: _ByRows.apply(a, b, beta, comm)  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, beta: float, comm: Comm) -> Tensor:
        c = comm.sum_(a.T @ b)
        value = barlow_penalty_and_grad_(c, 0, beta)
        ctx.comm = comm
        ctx.save_for_backward(a, b, c)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, of_c = ctx.saved_tensors
        scale = ctx.comm.sum_(grad.clone())
        return (b @ of_c.T).mul_(scale), (a @ of_c).mul_(scale), None, None


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, beta: float, comm: Comm) -> Tensor:
        blocks = [block_of(a.shape[1], rank, comm.size) for rank in range(comm.size)]
        own = blocks[comm.rank]  # its rows of C are of these columns of all first views, and all of the second ones
        parts = comm.gather(b)
        sizes = [len(part) for part in parts]
        second = torch.cat(parts)  # (B, D)
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
        shares = comm.exchange((first @ of_c).split(ctx.sizes), [(num, dim)] * comm.size)  # of every block of rows
        of_b = torch.zeros_like(shares[0])
        for share in shares:
            of_b += share
        return torch.cat(columns, dim=1).mul_(scale), of_b.mul_(scale), None, None


def accumulate(
    engine: Engine,
    module: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    micro_batch: int,
    after: Callable[[], None] = lambda: None,
) -> float:
    """One step's gradients of `loss_of(za, zb)` on pairs (2B, 3, S, S), first views then second; the loss.

    Barlow Twins is a statistic of the whole batch, so summing the losses of micro-batches would be another loss.
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
        loss = loss_of(*_halves(z))
        engine.backward(loss)
        return loss.item()
    z = _features(engine, chunks, after).requires_grad_()
    loss = loss_of(*_halves(z))
    engine.backward(loss, last=False)
    assert z.grad is not None
    for i, (chunk, gradient) in enumerate(zip(chunks, z.grad.split(micro_batch), strict=True)):
        again = engine.forward(chunk)
        if not again.requires_grad:  # a single set has nothing to weigh; the engine still wants its turn
            again = again.detach().requires_grad_()
        engine.backward((again * gradient).sum(), last=i == len(chunks) - 1)
    return loss.item()


@torch.no_grad()
def _features(engine: Engine, chunks: list[Tensor], after: Callable[[], None]) -> Tensor:
    parts = []
    for chunk in chunks:
        parts.append(engine.forward(chunk))
        after()
    return torch.cat(parts)


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    half = len(z) // 2
    return z[:half], z[half:]


def _width(module: nn.Module) -> int:
    return int(module.grappa.embed_dim)  # type: ignore[union-attr, arg-type]
