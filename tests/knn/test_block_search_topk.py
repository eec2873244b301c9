from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.knn import block_search
from grappa_dist.knn.block_search import Block, Neighbours, are_duplicates, extend, merge, to_scores, without_duplicates
from grappa_dist.search.candidates import float_error, largest_float32
from grappa_dist.search.fixed_point import GRID, to_grid


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def brute_force(queries: Block, targets: Block, k: int) -> list[list[tuple[int, int]]]:
    """(score, id) of the k best, by Python's own sort of int64 scores."""
    q, t = ((b.rows.double() * GRID).long().numpy() for b in (queries, targets))
    lists = []
    for scores, own in zip((q @ t.T).tolist(), queries.ids.tolist(), strict=True):
        others = [(s, i) for s, i in zip(scores, targets.ids.tolist(), strict=True) if i != own]
        lists.append(sorted(others, key=lambda pair: (-pair[0], pair[1]))[:k])
    return lists


def pairs(found: Neighbours) -> list[list[tuple[int, int]]]:
    return [
        [(int(s), i) for s, i in zip(scores, ids, strict=True) if i >= 0]
        for scores, ids in zip(found.scores.tolist(), found.ids.tolist(), strict=True)
    ]


def collection(dim: int) -> Block:
    """Rows, half of them copies and some a step of the grid apart, ids in no order."""
    x = unit_rows(30, dim)
    close = to_grid((x[:8] + torch.eye(8, dim) / GRID).clamp(-1, 1))
    rows = torch.cat([x, close, x[:20], x[:1].repeat(15, 1)])
    return Block(rows, torch.from_numpy(np.random.default_rng(0).permutation(10 * len(rows))[: len(rows)]))


@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_lists_are_those_of_brute_force_in_any_blocks(dim: int, k: int) -> None:
    x = collection(dim)
    for size in (1, 9, 40, 200):
        found = Neighbours.none(len(x.ids), k)
        for rows, ids in zip(torch.split(x.rows, size), torch.split(x.ids, size), strict=True):
            found = extend(found, x, Block.of(rows, ids))
        assert pairs(found) == brute_force(x, x, k)


def test_float_noise_within_the_bound_changes_no_list() -> None:
    x = collection(16)
    targets, generator = Block.of(x.rows, x.ids), torch.Generator().manual_seed(1)

    def noisy(x: Tensor, y: Tensor, t: int) -> tuple[Tensor, Tensor]:
        scores = x.double() @ y.double().T
        noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64) * 2 - 1
        best = (scores + noise * float_error(16, 0.9)).topk(t)
        return best.values.float(), best.indices

    for _ in range(5):
        assert pairs(extend(Neighbours.none(len(x.ids), 5), x, targets, noisy)) == brute_force(x, x, 5)


def test_tiles_and_columns_do_not_change_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    x = collection(8)
    monkeypatch.setattr(block_search, "MOST_ROWS", 8)
    for tile in (8, 50):
        monkeypatch.setattr(block_search, "_TILE", tile)
        assert pairs(extend(Neighbours.none(len(x.ids), 4), x, Block.of(x.rows, x.ids))) == brute_force(x, x, 4)


def test_equal_scores_are_ordered_by_id() -> None:
    x = Block(unit_rows(1, 4).repeat(50, 1), torch.arange(50).flip(0))
    found = extend(Neighbours.none(50, 3), x, Block.of(x.rows, x.ids))
    assert found.ids[:2].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert found.ids[-1].tolist() == [1, 2, 3]  # row 0 itself is left out


def test_lists_without_enough_others_are_filled_up() -> None:
    x = Block(unit_rows(2, 4), torch.tensor([7, 3]))
    found = extend(Neighbours.none(2, 3), x, Block.of(x.rows, x.ids))
    assert found.ids.tolist() == [[3, -1, -1], [7, -1, -1]]
    assert to_scores(found)[:, 1:].tolist() == [[-float("inf")] * 2] * 2


def test_merging_does_not_depend_on_the_order() -> None:
    a = Neighbours(torch.tensor([[5.0, 3.0, -float("inf")]], dtype=torch.float64), torch.tensor([[9, 2, -1]]))
    b = Neighbours(torch.tensor([[5.0, 3.0, 1.0]], dtype=torch.float64), torch.tensor([[4, 1, 0]]))
    for merged in (merge(a, b), merge(b, a)):
        assert merged.ids.tolist() == [[4, 9, 1]]
        assert merged.scores.tolist() == [[5.0, 5.0, 3.0]]


def test_empty_blocks_change_nothing() -> None:
    x, none = collection(4), Block(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    found = extend(Neighbours.none(len(x.ids), 3), x, Block.of(x.rows, x.ids))
    assert torch.equal(extend(found, x, none).ids, found.ids)
    assert extend(Neighbours.none(0, 3), none, x).ids.shape == (0, 3)
    assert largest_float32(none.rows, x.rows, 2)[0].shape == (0, 2)


def test_neighbours_above_the_cosine_leave_the_list_and_the_next_ones_move_up() -> None:
    ids = np.array([[4, 5, 6, 7], [1, 2, 3, 4], [8, -1, -1, -1], [1, 2, 3, 9]])
    scores = np.array([[1, 0.9, 0.8, 0.7], [1, 1, 1, 1], [0.5, *3 * [-np.inf]], [0.4, 0.3, 0.2, 0.1]], dtype=np.float32)
    assert are_duplicates(ids, scores, 0.999).sum(1).tolist() == [1, 4, 0, 0]
    assert without_duplicates(ids, scores, 0.999, 2).tolist() == [[5, 6], [-1, -1], [8, -1], [1, 2]]
    assert without_duplicates(ids, scores, 1.0, 2).tolist() == [[4, 5], [1, 2], [8, -1], [1, 2]]
