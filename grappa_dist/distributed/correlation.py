"""Eq. (4) of C = A^T B over all ranks' pairs: every rank holds C, or each a block of its rows, where that is cheaper.

Both hold one matrix, which is C and then its gradient. As with `Comm.allsum`, every rank has the same value, and the
gradient that reaches a rank's own pairs is R times the true one.

Shapes: P pairs of this rank, B of all ranks, D dimensions, m rows of C, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grappa_dist.distributed.collectives import Comm
from grappa_dist.ops.correlation import block_of, judge_, rows_are_cheaper
from grappa_dist.training.barlow_twins import Penalty


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
        value = judge_(c, 0, beta)
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
        value = judge_(c, own.start, beta)
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
