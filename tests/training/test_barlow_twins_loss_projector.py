from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.barlow_twins_loss import GlobalBatchNorm, Projector, barlow_twins
from tests.models import tiny
from tests.processes import run_ranks


def rows(num: int, dim: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(100 * num + dim + seed)
    return 3 * torch.randn(num, dim, generator=draws, dtype=torch.float64) + 1


def alone(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize(("num", "dim"), [(2, 1), (2, 5), (7, 5), (64, 3)])
def test_global_batch_norm_is_torchs_batch_norm_on_one_process(num: int, dim: int) -> None:
    ours, theirs = GlobalBatchNorm(dim).double(), nn.BatchNorm1d(dim).double()
    tiny.fill(ours, seed=1)
    tiny.fill(theirs, seed=1)
    a, b = rows(num, dim).requires_grad_(), rows(num, dim).requires_grad_()
    found, expected = ours(a, alone), theirs(b)
    torch.testing.assert_close(found, expected)
    (found * rows(num, dim, seed=1)).sum().backward()
    (expected * rows(num, dim, seed=1)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_a_batch_in_bfloat16_is_normalised_by_float32_statistics() -> None:
    norm, z = GlobalBatchNorm(4), rows(600, 4).bfloat16()  # more rows than bfloat16 can count
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(z, alone)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm(z.float(), alone))


def test_a_batch_of_one_row_is_all_bias() -> None:  # torch's refuses it
    norm = GlobalBatchNorm(4)
    tiny.fill(norm, seed=1)
    torch.testing.assert_close(norm(torch.randn(1, 4), alone), norm.bias[None].detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("widths", [(4,), (6, 4), (6, 5, 4)])
def test_projector_is_linear_norm_relu_and_a_linear_at_the_end(widths: tuple[int, ...]) -> None:
    projector = Projector(3, widths).double()
    projector.initialise(torch.Generator().manual_seed(0))
    parts: list[nn.Module] = []
    for i, (width, linear) in enumerate(zip(widths, projector.linears, strict=True)):
        assert linear.bias is None
        parts += [copy.deepcopy(linear), *([nn.BatchNorm1d(width), nn.ReLU()] * (i < len(widths) - 1))]
    torch.testing.assert_close(projector(rows(9, 3)), nn.Sequential(*parts).double()(rows(9, 3)))
    assert len(list(projector.parameters())) == 3 * len(widths) - 2


def chain(projector: Projector, za: Tensor, zb: Tensor, allsum: object = alone) -> Tensor:
    return barlow_twins(projector(za, allsum), projector(zb, allsum), 0.0051, allsum)  # type: ignore[arg-type]


def projector() -> Projector:
    made = Projector(4, (6, 5, 3)).double()
    tiny.fill(made, seed=5, scale=0.5)
    return made


def chain_on_a_rank(comm: Comm, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    made, za, zb = projector(), a[comm.rank].requires_grad_(), b[comm.rank].requires_grad_()
    loss = chain(made, za, zb, comm.allsum)
    return [loss.detach(), *torch.autograd.grad(loss, (za, zb, *made.parameters()))]


def norm_on_a_rank(comm: Comm, z: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    norm = GlobalBatchNorm(4).double()
    tiny.fill(norm, seed=1)
    own = z[comm.rank].requires_grad_()
    out = norm(own, comm.allsum)
    loss = comm.allsum((out * weights[comm.rank]).sum())
    return [out.detach(), *torch.autograd.grad(loss, (own, *norm.parameters()))]


@pytest.mark.parametrize("sizes", [(1, 6), (5, 0, 3)])
def test_batch_norm_on_uneven_ranks_is_that_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    z, weights = rows(sum(sizes), 4).requires_grad_(), rows(sum(sizes), 4, seed=1)
    norm = GlobalBatchNorm(4).double()
    tiny.fill(norm, seed=1)
    expected = norm(z, alone)
    grads = torch.autograd.grad((expected * weights).sum(), (z, *norm.parameters()))
    shares = [list(torch.split(t.detach(), list(sizes))) for t in (z, weights)]
    results = run_ranks(norm_on_a_rank, len(sizes), *shares)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected.detach())
    # every rank holds R times its own gradient, and the engine averages those of the parameters
    torch.testing.assert_close(torch.cat([r[1] for r in results]) / len(sizes), grads[0])
    for place in (1, 2):
        torch.testing.assert_close(torch.stack([r[place + 1] for r in results]).mean(0), grads[place])


@pytest.mark.parametrize("sizes", [(1, 6), (5, 0, 3)])
def test_projector_and_loss_on_uneven_ranks_are_those_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    za, zb = rows(sum(sizes), 4).requires_grad_(), rows(sum(sizes), 4, seed=1).requires_grad_()
    made = projector()
    loss = chain(made, za, zb)
    grads = torch.autograd.grad(loss, (za, zb, *made.parameters()))
    shares = [list(torch.split(z.detach(), list(sizes))) for z in (za, zb)]
    results = run_ranks(chain_on_a_rank, len(sizes), *shares)
    for found, *_ in results:
        torch.testing.assert_close(found, loss.detach())
    for place in (0, 1):
        torch.testing.assert_close(torch.cat([r[place + 1] for r in results]) / len(sizes), grads[place])
    for place, expected in enumerate(grads[2:]):
        torch.testing.assert_close(torch.stack([r[place + 3] for r in results]).mean(0), expected)
