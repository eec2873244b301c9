from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import norm_softmax, norm_softmax_loss
from grappa_dist.training.norm_softmax_loss import add_scores, class_gradient, no_scores, norm_softmax_sum
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


def dense_sum(z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
    cosines = nn.functional.normalize(z, dim=1) @ nn.functional.normalize(weight, dim=1).T
    return nn.functional.cross_entropy(gamma * cosines, labels, reduction="sum")


def with_gradients(loss: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (loss, *torch.autograd.grad(3 * loss, (z, weight)))


@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("num", [1, 9])
def test_chunks_of_classes_change_nothing_but_rounding(num: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_softmax_loss, "_CPU_CHUNK_BYTES", 1)  # chunks of the least size, 64 classes
    z, weight, labels = batch(num, 5, classes)
    weight = torch.cat([weight[: classes // 2], weight[: classes - classes // 2]]).detach().requires_grad_()  # twice
    labels[:6] = (torch.tensor([0, 63, 64, 127, 128, classes - 1]) % classes)[:num]
    z = z.detach()[torch.arange(num) // 2 * 2].requires_grad_()  # rows twice as well
    found = with_gradients(norm_softmax_sum(z, weight, labels, 16.0), z, weight)
    torch.testing.assert_close(found, with_gradients(dense_sum(z, weight, labels, 16.0), z, weight))


def test_gradients_of_several_chunks_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_softmax_loss, "_CPU_CHUNK_BYTES", 1)
    z, weight, labels = batch(3, 2, 130)
    assert torch.autograd.gradcheck(lambda z, w: norm_softmax(z, w, labels, 7.0), (z, weight))


def test_scores_of_disjoint_classes_add_up_in_any_order_and_from_any_scale() -> None:
    z, weight, labels = (t.detach() for t in batch(4, 5, 90))
    unit, gamma = nn.functional.normalize(z, dim=1), 900.0  # exp of which is no number
    parts = [slice(50, 90), slice(0, 1), slice(1, 50)]
    scores = no_scores(unit)
    for part in parts:
        scores = add_scores(scores, unit, weight[part], labels - part.start, gamma)
    loss = (scores.log_total - scores.target).sum()
    torch.testing.assert_close(loss, dense_sum(z, weight, labels, gamma))
    learning = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dense_sum(z, learning, labels, gamma), learning)
    for part in parts:
        found = class_gradient(unit, weight[part], labels - part.start, scores.log_total, gamma)
        torch.testing.assert_close(found, expected[part])


def test_the_logits_are_never_held_as_a_whole() -> None:
    """The largest tensors that a backward pass makes are the gradients."""
    classes, dim, num = 40_000, 8, 256
    z, weight = torch.randn(num, dim).requires_grad_(), torch.randn(classes, dim).requires_grad_()
    sizes = list[int]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, Tensor)
            )
            return out

    with Watch():
        norm_softmax_sum(z, weight, torch.randint(classes, (num,)), 16.0).backward()
    assert max(sizes) < 4 * num * classes / 4


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
