from __future__ import annotations

import numpy as np
import pytest
import torch

from grappa_dist.distributed.sharded_rows import Rows
from grappa_dist.search.fixed_point import to_grid
from tests.search.test_backends import unit_rows


def two_shards() -> Rows:
    good = [np.array([True, False, True, True, False]), np.array([], dtype=bool), np.array([False, True, True])]
    return Rows([unit_rows(5, 4), np.zeros((0, 4), np.float32), unit_rows(3, 4, seed=1)], good, ["a", "b", "c"])


def test_blocks_of_any_size_contain_every_good_row_once() -> None:
    rows = two_shards()
    whole = to_grid(torch.from_numpy(np.concatenate(rows.shards)))
    for size, threads in ((1, 1), (2, 1), (2, 3), (3, 2), (100, 2)):
        places = list(rows.positions(size, threads))
        parts = [torch.cat(rows.pieces(positions)) for positions in places]
        assert max(map(len, parts)) <= size
        assert torch.cat(places).tolist() == [0, 2, 3, 6, 7]
        assert torch.equal(torch.cat(parts), whole[torch.cat(places)])
    assert (len(rows), rows.num_good) == (8, 5)


def test_small_shards_share_blocks_of_even_size() -> None:
    rows = Rows([unit_rows(3, 4, seed=i) for i in range(40)], [np.ones(3, dtype=bool) for _ in range(40)])
    assert [len(p) for p in rows.positions(50)] == [40, 40, 40]
    assert [len(p) for p in rows.positions(50, threads=2)] == [30, 30, 30, 30]


def test_neighbouring_rows_of_a_shard_that_needs_no_preparation_are_not_copied() -> None:
    shard = to_grid(torch.from_numpy(unit_rows(6, 4))).numpy()
    rows = Rows([shard], [np.ones(6, dtype=bool)])
    (found,) = rows.pieces(torch.arange(2, 5), (True,))
    assert np.shares_memory(found.numpy(), shard)


def test_rows_of_several_shards_come_in_pieces_that_are_not_copied_either() -> None:
    shards = [to_grid(torch.from_numpy(unit_rows(n, 4, seed=n))).numpy() for n in (3, 1, 4)]
    rows = Rows(shards, [np.ones(len(s), dtype=bool) for s in shards])
    pieces = rows.pieces(torch.arange(1, 7), (True,) * 3)
    assert [len(p) for p in pieces] == [2, 1, 3]
    assert all(np.shares_memory(p.numpy(), s) for p, s in zip(pieces, shards, strict=True))
    assert torch.equal(torch.cat(rows.pieces(torch.arange(1, 7))), torch.cat(pieces))


def test_a_bad_row_now_and_then_copies_nothing() -> None:
    shards = [to_grid(torch.from_numpy(unit_rows(n, 4, seed=n))).numpy() for n in (100, 90, 1, 120)]
    rows = Rows(shards, [np.ones(len(s), dtype=bool) for s in shards])
    for shard, good in zip(shards, rows.good, strict=True):
        good[len(good) // 2] = len(good) == 1
        shard[~good] = 9  # not of the grid's size, but it is never read
    plain = (True,) * 4
    (positions,) = rows.positions(1000)
    pieces = rows.pieces(positions, plain)
    assert [len(p) for p in pieces] == [50, 49, 45, 44, 1, 60, 59]
    assert all(any(np.shares_memory(p.numpy(), s) for s in shards) for p in pieces)
    assert torch.equal(torch.cat(pieces), torch.from_numpy(np.concatenate(shards))[positions])


@pytest.mark.parametrize("plain", [(), (True, False, True)])
def test_scattered_rows_come_in_one_copy(plain: tuple[bool, ...]) -> None:
    shards = [unit_rows(n, 4, seed=n) for n in (30, 40, 50)]
    for shard in (shards[0], shards[2]):
        shard[:] = to_grid(torch.from_numpy(shard)).numpy()
    shards[1].flags.writeable = False
    rows = Rows(shards, [np.ones(len(s), dtype=bool) for s in shards])
    whole = to_grid(torch.from_numpy(np.concatenate(shards)))
    for positions in (torch.arange(0, 120, 2), torch.tensor([3, 29, 70, 119]), torch.tensor([5, 31, 33])):
        (found,) = rows.pieces(positions, plain)
        assert torch.equal(found, whole[positions])


def test_rows_are_taken_by_position_across_shards() -> None:
    rows = two_shards()
    whole = to_grid(torch.from_numpy(np.concatenate(rows.shards)))
    assert torch.equal(rows.take(torch.tensor([7, 0, 4, 5, 0])), whole[[7, 0, 4, 5, 0]])


def problems(rows: Rows, block_rows: int) -> list[str]:
    return [rows.scan(part).problem for part in rows.parts(block_rows)]


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "c: row 2 has a NaN"), (np.inf, "c: row 2 has a NaN"), (3.0, "c: row 2 has norm 3")]
)
def test_a_row_that_is_no_unit_row_is_named(value: float, words: str) -> None:
    rows = two_shards()
    rows.shards[2][2] = [0, value, 0, 0]
    for size in (1, 2, 100):
        (problem,) = filter(None, problems(rows, size))
        assert problem.startswith(words)


def test_a_part_is_plain_where_all_of_its_rows_are_on_the_grid() -> None:
    shard = to_grid(torch.from_numpy(unit_rows(9, 4))).numpy()
    shard[4] = unit_rows(1, 4)
    rows = Rows([shard], [np.ones(9, dtype=bool)])
    assert [rows.scan(part).plain for part in rows.parts(3)] == [True, False, True]


def test_a_bad_row_may_hold_anything() -> None:
    rows = two_shards()
    rows.shards[0][1] = np.nan
    assert rows.problem() == ""
    assert problems(rows, 2) == [""] * 5


def test_shards_of_another_form_are_named() -> None:
    fine, good = unit_rows(2, 4), np.ones(2, dtype=bool)
    assert "shard 1: rows have 3 dimensions" in Rows([fine, fine[:, :3]], [good, good]).problem()
    assert "shard 0: rows must be" in Rows([fine.astype(np.float64)], [good]).problem()
    assert "shard 0: good must be (2,) bool" in Rows([fine], [good[:1]]).problem()
