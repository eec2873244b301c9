"""Exact accumulation for losses of the whole batch. Shapes: B pairs of this rank, D channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grappa_dist.training.deepspeed_engine import Engine


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
