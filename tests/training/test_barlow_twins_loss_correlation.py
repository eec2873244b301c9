from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.barlow_twins_loss import Projector, barlow_twins, by_rows_penalty, penalty_of, whole_penalty
from tests import reference
from tests.processes import run_ranks

BETA = 0.05
WAYS = {"whole": whole_penalty, "rows": by_rows_penalty}
SHARES = [(6,), (4, 3), (6, 0), (1, 6), (5, 0, 3), (1, 1, 1)]


def views(num: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(100 * num + dim)
    za = torch.randn(num, dim, generator=draws, dtype=torch.float64)
    zb = za + 0.5 * torch.randn(num, dim, generator=draws, dtype=torch.float64)
    return za.to(dtype), (3 * zb + 1).to(dtype)


def gradients(comm: Comm, sizes: tuple[int, ...], dim: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Value and gradients of this rank's pairs, by every way; in bfloat16 under autocast, as on a GPU."""
    found = {}
    for way in WAYS:
        za, zb = (z.split(list(sizes))[comm.rank].clone().requires_grad_() for z in views(sum(sizes), dim, dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = barlow_twins(za, zb, BETA, comm.allsum, penalty=WAYS[way](comm))
        found[way] = [loss.detach(), *torch.autograd.grad(3 * loss, (za, zb))]
    return found


def together(results: list[dict[str, list[Tensor]]], way: str, of: int) -> Tensor:
    """Gradients of all ranks' pairs; a rank's is R times the true one, for an engine that averages."""
    return torch.cat([rank[way][of] for rank in results]) / len(results)


@pytest.mark.parametrize("sizes", SHARES)
def test_both_ways_equal_one_process_on_the_concatenation(sizes: tuple[int, ...]) -> None:
    for dim in (2, 7):  # fewer columns than ranks; a number that no number of ranks divides
        za, zb = (z.requires_grad_() for z in views(sum(sizes), dim))
        loss = reference.barlow_twins(za, zb, BETA)
        expected = torch.autograd.grad(3 * loss, (za, zb))
        results = run_ranks(gradients, len(sizes), sizes, dim, torch.float64)
        for way in WAYS:
            for rank in results:
                torch.testing.assert_close(rank[way][0], loss.detach())
            for of, gradient in enumerate(expected, start=1):
                torch.testing.assert_close(together(results, way, of), gradient)


def with_default_penalty(comm: Comm) -> bool:
    """Whether value and gradients have the bits of `whole_penalty`, which training chooses for wide batches."""
    found = []
    for penalty in (None, whole_penalty(comm)):
        za, zb = (z.split([4, 3][: comm.size])[comm.rank].clone().requires_grad_() for z in views(7, 300))
        loss = barlow_twins(za, zb, BETA, comm.allsum, penalty=penalty)
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, (za, zb))])
    return all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_without_a_penalty_the_loss_is_that_of_training_to_the_bit() -> None:
    assert run_ranks(with_default_penalty, 2) == [True, True]


def test_bf16_pairs_are_correlated_in_float32() -> None:
    sizes, dim = (300, 1, 299), 8  # more rows than bf16 can count
    za, zb = (z.double().requires_grad_() for z in views(600, dim, torch.bfloat16))
    loss = reference.barlow_twins(za, zb, BETA)
    expected = torch.autograd.grad(3 * loss, (za, zb))
    results = run_ranks(gradients, 3, sizes, dim, torch.bfloat16)
    for way in WAYS:
        assert results[0][way][0].dtype == torch.float32
        torch.testing.assert_close(results[0][way][0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
        for of, gradient in enumerate(expected, start=1):
            found = together(results, way, of)
            assert found.dtype == torch.bfloat16  # as its pairs: rounded once, at the end, to 2**-9 of itself
            torch.testing.assert_close(found.double(), gradient, rtol=5e-3, atol=1e-6)


def projected(comm: Comm, sizes: tuple[int, ...], way: str | None) -> dict[str, Any]:
    projector = Projector(5, (6, 7)).double()
    projector.initialise(torch.Generator().manual_seed(3))
    za, zb = (z.split(list(sizes))[comm.rank].clone().requires_grad_() for z in views(sum(sizes), 5))
    ga, gb = projector(za, comm.allsum), projector(zb, comm.allsum)
    if way is None:
        loss = reference.barlow_twins(ga, gb, BETA)
    else:
        loss = barlow_twins(ga, gb, BETA, comm.allsum, penalty=WAYS[way](comm))
    loss.backward()
    weights = {name: comm.sum_(p.grad.clone()) / comm.size for name, p in projector.named_parameters()}
    return {"loss": loss.detach(), "pairs": [za.grad, zb.grad], "weights": weights}


@pytest.mark.parametrize("sizes", [(4, 3), (5, 0, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_through_the_projectors_batch_norm_gradients_are_those_of_one_process(way: str, sizes: tuple[int, ...]) -> None:
    expected = projected(Comm(), (sum(sizes),), None)
    results = run_ranks(projected, len(sizes), sizes, way)
    for of in (0, 1):
        found = torch.cat([rank["pairs"][of] for rank in results]) / len(sizes)
        torch.testing.assert_close(found, expected["pairs"][of])
    for rank in results:
        torch.testing.assert_close(rank["loss"], expected["loss"])
        torch.testing.assert_close(rank["weights"], expected["weights"])


def chosen(comm: Comm, batch: int, dim: int) -> str:
    z = torch.ones(1, dim, requires_grad=True)
    return str(penalty_of(comm, batch, dim)(z, z, BETA).grad_fn)


def test_all_ranks_cut_the_matrix_up_where_it_is_wider_than_the_batch() -> None:
    assert "_Whole" in chosen(Comm(), 4, 64)
    assert all("_ByRows" in name for name in run_ranks(chosen, 2, 4, 64))
    assert all("_Whole" in name for name in run_ranks(chosen, 2, 64, 4))


def kept(comm: Comm, way: str, num: int, dim: int) -> int:
    """Numbers that are held from the forward pass to the backward pass, inputs left out."""
    a, b = (z.float().requires_grad_() for z in views(num, dim))
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = WAYS[way](comm)(a, b, BETA)
    given = {z.untyped_storage().data_ptr() for z in (a, b)}
    assert value.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in given)


def test_one_matrix_is_kept_and_by_rows_a_part_of_it() -> None:
    num, dim = 3, 50
    assert kept(Comm(), "whole", num, dim) == dim**2
    both = 2 * num  # pairs of two ranks
    for found in run_ranks(kept, 2, "rows", num, dim):
        assert found == dim**2 // 2 + both * dim + both * dim // 2
