from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import barlow_twins
from tests import reference
from tests.processes import run_ranks


def pairs(num: int, dim: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num * 100 + dim)
    za = torch.randn(num, dim, generator=gen, dtype=torch.float64)
    zb = za + 0.5 * torch.randn(num, dim, generator=gen, dtype=torch.float64)
    return za.requires_grad_(), (3 * zb + 1).requires_grad_()


@pytest.mark.parametrize(("num", "dim"), [(1, 1), (1, 3), (2, 5), (11, 1), (11, 5), (64, 8)])
def test_loss_and_gradients_equal_the_reference(num: int, dim: int) -> None:
    za, zb = pairs(num, dim)
    ours, theirs = barlow_twins(za, zb, 0.0051), reference.barlow_twins(za, zb, 0.0051)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (za, zb)), torch.autograd.grad(theirs, (za, zb)))


def test_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda za, zb: barlow_twins(za, zb, 0.3), pairs(5, 3))


def test_equal_views_with_uncorrelated_columns_have_no_loss() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 1000
    assert float(barlow_twins(z, z, 1.0)) < 1e-12


def test_columns_that_never_vary_cost_one_each() -> None:
    za, zb = pairs(6, 2)
    constant = torch.full((6, 3), 7.0, dtype=torch.float64)
    with_dead = barlow_twins(torch.cat([za, constant], 1), torch.cat([zb, constant], 1), 0.1)
    torch.testing.assert_close(with_dead, barlow_twins(za, zb, 0.1) + 3)


def test_bf16_pairs_are_summed_in_float32_also_under_autocast() -> None:
    za, zb = (z.detach().bfloat16() for z in pairs(600, 8))  # more rows than bf16 can count
    expected = barlow_twins(za.double(), zb.double(), 0.0051)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = barlow_twins(za, zb, 0.0051)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [((4, 3), (4, 2)), ((4, 3), (3, 3)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3))])
def test_shapes_that_do_not_pair_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="barlow_twins"):
        barlow_twins(torch.zeros(a), torch.zeros(b), 0.0051)


def loss_and_gradients(comm: Comm, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    za, zb = a[comm.rank].requires_grad_(), b[comm.rank].requires_grad_()
    loss = barlow_twins(za, zb, 0.0051, comm.allsum)
    return [loss.detach(), *torch.autograd.grad(loss, (za, zb))]


@pytest.mark.parametrize("sizes", [(1, 7), (6, 0), (5, 0, 3), (1, 1, 1)])
def test_uneven_ranks_equal_one_process_on_the_concatenation(sizes: tuple[int, ...]) -> None:
    za, zb = pairs(sum(sizes), 5)
    loss = barlow_twins(za, zb, 0.0051)
    grad_a, grad_b = torch.autograd.grad(loss, (za, zb))
    a, b = (list(torch.split(z.detach(), list(sizes))) for z in (za, zb))
    results = run_ranks(loss_and_gradients, len(sizes), a, b)
    for found, _, _ in results:
        torch.testing.assert_close(found, loss.detach())
        assert torch.equal(found, results[0][0])
    # allsum hands every rank R times its true gradient, for an engine that averages over ranks
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]) / len(sizes), grad_a)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results]) / len(sizes), grad_b)
