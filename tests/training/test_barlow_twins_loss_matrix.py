from __future__ import annotations

import pytest
import torch

from grappa_dist.training.barlow_twins_loss import (
    barlow_penalty_and_grad_,
    block_of,
    by_rows_cost,
    rows_are_cheaper,
    whole_cost,
)


@pytest.mark.parametrize("dim", [1, 5, 8, 300])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_of_blocks_add_up_to_the_loss_and_each_block_becomes_its_gradient(dim: int, size: int) -> None:
    beta, c = 0.3, torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    c.requires_grad_()
    eye = torch.eye(dim, dtype=torch.float64)
    loss = ((1 - c).square() * eye + beta * c.square() * (1 - eye)).sum()
    (gradient,) = torch.autograd.grad(loss, c)
    shares, blocks = [], []
    for rank in range(size):
        rows = block_of(dim, rank, size)
        block = c.detach()[rows].clone()
        shares.append(barlow_penalty_and_grad_(block, rows.start, beta))
        blocks.append(block)
    torch.testing.assert_close(torch.stack(shares).sum(), loss.detach())
    torch.testing.assert_close(torch.cat(blocks), gradient)


def test_a_matrix_near_the_identity_loses_no_digits_to_its_diagonal() -> None:
    c = torch.eye(2048) + 1e-6
    assert float(barlow_penalty_and_grad_(c, 0, 1.0)) == pytest.approx(
        2048 * 2047 * 1e-12 + 2048 * 1e-12, rel=0.05
    )  # eps of 1 + 1e-6


def test_the_matrix_is_cut_up_where_the_batch_is_narrower_than_it_and_there_are_several_ranks() -> None:
    assert not rows_are_cheaper(256, 8192, 1)
    assert all(rows_are_cheaper(256, 8192, ranks) for ranks in (2, 3, 8, 64, 1024))
    assert not rows_are_cheaper(256, 24, 2)
    assert not rows_are_cheaper(8192, 8192, 8)
    meet = [max(b for b in range(1, 9000) if rows_are_cheaper(b, 8192, r)) for r in (2, 8, 4096)]
    assert meet == [8192 * r // (r + 1) - (8192 * r % (r + 1) == 0) for r in (2, 8, 4096)]


@pytest.mark.parametrize("batch", [2, 100, 256, 4000, 20_000])
@pytest.mark.parametrize("dim", [1, 64, 1000, 8192])
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_what_sends_less_never_computes_more(batch: int, dim: int, ranks: int) -> None:
    fewer = by_rows_cost(batch, dim, ranks).sent < whole_cost(batch, dim, ranks).sent
    assert fewer == rows_are_cheaper(batch, dim, ranks)


def test_a_world_of_one_sends_nothing() -> None:
    assert whole_cost(256, 8192, 1).sent == by_rows_cost(256, 8192, 1).sent == 0
    assert whole_cost(256, 8192, 1).held == 8192**2
