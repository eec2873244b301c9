"""Blocks compared once, pairs filtered by thresholds, give the lists of brute force for any estimates and tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from grappa_dist.knn import block_search
from grappa_dist.knn.block_search import Block, Found, Neighbours, Side, search_both_ways, search_one_way, search_within
from grappa_dist.search.fixed_point import GRID, to_grid
from tests.knn.test_block_search_topk import brute_force, pairs, unit_rows


def merged(best: Neighbours, found: list[Found]) -> Neighbours:
    for part in found:
        part.merge_into(best)
    return best


def both(a: Block, b: Block) -> Block:
    return Block.of(torch.cat([a.rows, b.rows]), torch.cat([a.ids, b.ids]))


def clustered(num: int, dim: int, seed: int = 0) -> Tensor:
    """Rows around a few others, some of them copies and some a step of the grid apart."""
    draws = torch.Generator().manual_seed(seed)
    near = unit_rows(1 + num // 20, dim, seed)[torch.randint(0, 1 + num // 20, (num,), generator=draws)]
    x = torch.nn.functional.normalize(near + 0.4 * torch.randn(num, dim, generator=draws), dim=1)
    x[num // 2 : num // 2 + num // 8] = x[: num // 8]
    x[-3:, 0] += 1 / GRID
    return to_grid(x.clamp(-1, 1))


def spread(num: int, dim: int) -> Tensor:
    return torch.cat([unit_rows(num - num // 2, dim), -unit_rows(num // 2, dim)])


ROWS = {
    "clustered": clustered(280, 24),
    "spread": spread(150, 3),
    "all equal": unit_rows(1, 6).repeat(100, 1),
    "two": unit_rows(2, 4),
    "opposite": torch.cat([unit_rows(1, 5), -unit_rows(1, 5)]).repeat(40, 1),  # negative scores among the best
    "zero": torch.zeros(90, 4),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tables", [(512, 2048), (64, 128)])
@pytest.mark.parametrize("name", ROWS)
def test_the_lists_are_those_of_brute_force(
    name: str, tables: tuple[int, int], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_search, "_TABLE_ROWS", tables[0])
    monkeypatch.setattr(block_search, "_TABLE_COLUMNS", tables[1])
    x = ROWS[name]
    whole = Block(x, torch.arange(len(x)) * 5 + 2**40)
    edge = len(x) // 3
    first, second = (Block(whole.rows[part], whole.ids[part]) for part in (slice(edge), slice(edge, None)))
    a, b = (Side.of(block, bf16=bf16) for block in (first, second))
    for k in (1, 7):
        wanted = brute_force(whole, whole, k)
        inside = Neighbours.none(len(b), k)
        assert pairs(merged(inside, search_within(b, inside))) == brute_force(second, second, k)
        lists = merged(Neighbours.none(len(a), k), search_within(a, Neighbours.none(len(a), k))), inside
        for best, found in zip(lists, search_both_ways(a, b, lists), strict=True):
            merged(best, found)
        assert pairs(lists[0]) + pairs(lists[1]) == wanted
        alone = Neighbours.none(len(x), k)
        for side in (b, a):  # queries that are among the targets, thresholds that come from other targets
            merged(alone, search_one_way(Side.of(whole, bf16=bf16), side, alone))
        assert pairs(alone) == wanted


def test_few_pairs_of_large_blocks_are_scored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(1500, 48)
    scored: list[int] = []
    exact = block_search.pair_dots

    def counting(a: Tensor, b: Tensor, some: tuple[Tensor, Tensor]) -> Tensor:
        scored.append(len(some[0]))
        return exact(a, b, some)

    monkeypatch.setattr(block_search, "pair_dots", counting)
    monkeypatch.setattr(block_search, "extend", None)  # no table is too unresolved
    best = Neighbours.none(len(x), 5)
    merged(best, search_within(Side.of(Block(x, torch.arange(len(x))), bf16=False), best))
    assert sum(scored) < 8 * len(x)
    assert (best.ids >= 0).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_no_estimate_is_off_by_more_than_the_error_and_its_rounding(bf16: bool) -> None:
    a, b = (Side.of(Block(clustered(200, 40, seed), torch.arange(200)), bf16=bf16) for seed in (0, 1))
    true = a.block.rows.double() @ b.block.rows.double().T
    estimates = (a.form @ b.form.T)[:200, :200]
    off = (estimates.double() - true).abs()
    assert float(off.max()) <= a.error(b) + (2.0**-8 if bf16 else 0)
    assert bf16 or float(off.max()) < 1e-5


def test_blocks_without_rows_bring_nothing() -> None:
    none = Side.of(Block(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), bf16=False)
    some = Side.of(Block(unit_rows(3, 4), torch.arange(3)), bf16=False)
    lists = Neighbours.none(0, 2), Neighbours.none(3, 2)
    assert search_within(none, lists[0]) == search_one_way(some, none, lists[1]) == []
    assert search_both_ways(none, some, lists) == ([], [])


def test_the_order_by_row_and_key_has_places_and_beginnings() -> None:
    rows = np.array([3, 1, 3, 1, 3, 7])
    order, place, first = block_search._by_row(rows, np.array([5, 2, 4, 1, 6, 0]))
    assert rows[order].tolist() == [1, 1, 3, 3, 3, 7]
    assert order.tolist() == [3, 1, 2, 0, 4, 5]
    assert place.tolist() == [0, 1, 0, 1, 2, 0]
    assert first.tolist() == [0, 0, 2, 2, 2, 5]
