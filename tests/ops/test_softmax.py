from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grappa_dist.dist.comm import Comm
from grappa_dist.ops.softmax import norm_softmax, norm_softmax_sum
from tests import reference
from tests.processes import run_ranks


def batch(num: int, dim: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num)
    z = torch.randn(num, dim, generator=gen, dtype=torch.float64).requires_grad_()
    weight = torch.randn(classes, dim, generator=gen, dtype=torch.float64).requires_grad_()
    return z, weight, torch.randint(classes, (num,), generator=gen)


@pytest.mark.parametrize(("num", "dim", "classes"), [(1, 1, 1), (1, 3, 2), (7, 5, 4), (12, 1, 3), (3, 8, 40)])
def test_loss_and_gradients_equal_the_reference(num: int, dim: int, classes: int) -> None:
    z, weight, labels = batch(num, dim, classes)
    ours = norm_softmax(z, weight, labels, 16.0)
    theirs = reference.norm_softmax(z, weight, labels, 16.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (z, weight)), torch.autograd.grad(theirs, (z, weight)))


def test_gradients_pass_gradcheck() -> None:
    z, weight, labels = batch(4, 3, 5)
    assert torch.autograd.gradcheck(lambda z, w: norm_softmax(z, w, labels, 7.0), (z, weight))


def test_lengths_of_features_and_class_vectors_do_not_matter() -> None:
    z, weight, labels = batch(6, 4, 5)
    scaled = norm_softmax(z * 100, weight * torch.rand(5, 1, dtype=torch.float64).add(0.1), labels, 16.0)
    torch.testing.assert_close(scaled, norm_softmax(z, weight, labels, 16.0))


def test_a_saturated_softmax_stays_finite() -> None:
    z = torch.eye(3).requires_grad_()
    loss = norm_softmax(z, torch.eye(3).roll(1, 0), torch.arange(3), 1e4)  # every image is at a wrong class
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(1e4)
    assert bool(torch.isfinite(grad).all())


def test_bf16_features_are_scored_in_float32_also_under_autocast() -> None:
    z, weight, labels = batch(9, 64, 11)
    z16, w32 = z.detach().bfloat16(), weight.detach().float()
    expected = norm_softmax(z16.double(), w32.double(), labels, 16.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = norm_softmax(z16, w32, labels, 16.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)  # bf16 cosines would miss by 1e-2


def test_an_empty_share_sums_to_zero_and_still_has_gradients() -> None:
    z, weight, labels = batch(0, 3, 4)
    total = norm_softmax_sum(z, weight, labels, 16.0)
    assert total.item() == 0
    assert torch.equal(torch.autograd.grad(total, weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_labels_of_no_class_are_refused(label: int) -> None:
    z, weight, labels = batch(3, 2, 4)
    labels[1] = label
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 4\).* {label}"):
        norm_softmax(z, weight, labels, 16.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, weight, labels = batch(3, 2, 4)
    with pytest.raises(ValueError, match="weight"):
        norm_softmax(z, weight[:, :1], labels, 16.0)
    with pytest.raises(ValueError, match="labels must be 3 integers"):
        norm_softmax(z, weight, labels[:2], 16.0)
    with pytest.raises(ValueError, match="labels must be 3 integers"):
        norm_softmax(z, weight, labels.double(), 16.0)


def loss_and_gradients(comm: Comm, shares: list[Tensor], labels: list[Tensor], weight: Tensor) -> list[Tensor]:
    z, weight = shares[comm.rank].requires_grad_(), weight.requires_grad_()
    loss = norm_softmax(z, weight, labels[comm.rank], 16.0, allsum=comm.allsum)
    return [loss.detach(), *torch.autograd.grad(loss, (z, weight))]


@pytest.mark.parametrize("sizes", [(1, 7), (5, 0, 3)])
def test_uneven_ranks_equal_one_process_on_the_concatenation(sizes: tuple[int, ...]) -> None:
    z, weight, labels = batch(sum(sizes), 4, 6)
    loss = norm_softmax(z, weight, labels, 16.0)
    grad_z, grad_weight = torch.autograd.grad(loss, (z, weight))
    shares, share_labels = (list(torch.split(t, list(sizes))) for t in (z.detach(), labels))
    results = run_ranks(loss_and_gradients, len(sizes), shares, share_labels, weight.detach())
    for found, _, _ in results:
        torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]) / len(sizes), grad_z)
    torch.testing.assert_close(sum(grad for _, _, grad in results) / len(sizes), grad_weight)
