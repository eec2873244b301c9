from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import RowBlock, Rows, ShardedRows, join_rows, side_by_side
from grappa_dist.distributed.worker import Stopped
from grappa_dist.kmeans.lloyd import KMeansTask, kmeans
from tests.kmeans.test_lloyd import clustered, unchecked
from tests.processes import run_ranks

pytestmark = pytest.mark.usefixtures("two_threads")

WAIT_S = 3.0  # of one collective
BLOCKS = 8  # of the last rank, each of which takes it long


def shard_rows(comm: Comm) -> ShardedRows:
    rows = clustered(10 * BLOCKS, 4, 5)
    own = rows if comm.rank == comm.size - 1 else rows[:3]
    sharded = join_rows(comm, Rows([own], [np.ones(len(own), dtype=bool)]), block_rows=10, device=torch.device("cpu"))
    return replace(sharded, threads=1)


def slowly(block: RowBlock) -> RowBlock:
    time.sleep(0.5)
    return block


def one_slow_rank(comm: Comm) -> list[float]:
    sharded = shard_rows(comm)
    if comm.rank == comm.size - 1:
        blocks = sharded.row_blocks
        object.__setattr__(sharded, "row_blocks", lambda: map(slowly, blocks()))
    return kmeans(sharded, 1, KMeansTask(unchecked(iterations=0))).inertia


@pytest.mark.slow
def test_a_rank_whose_pass_takes_longer_than_a_collective_waits_holds_the_others_up_and_no_more() -> None:
    assert 0.5 * BLOCKS > WAIT_S  # the seeding has such a pass, and so has the assignment
    first, last = run_ranks(one_slow_rank, 2, collective_s=WAIT_S)
    assert first == last


def one_slow_look(comm: Comm) -> int:
    own = clustered(10 * BLOCKS if comm.rank else 3, 4, 5)
    rows = Rows([own], [np.ones(len(own), dtype=bool)])
    if comm.rank:
        scan = rows.scan
        object.__setattr__(rows, "scan", lambda part: time.sleep(0.5) or scan(part))
    return join_rows(comm, rows, block_rows=10, device=torch.device("cpu")).num_good


@pytest.mark.slow
def test_a_rank_whose_look_at_its_rows_takes_long_holds_the_others_up_and_no_more() -> None:
    assert run_ranks(one_slow_look, 2, collective_s=WAIT_S) == [10 * BLOCKS + 3] * 2


def stopped_in_a_pass(comm: Comm) -> tuple[bool, list[int]]:
    done = list[int]()
    last = comm.rank == comm.size - 1

    def work(item: int) -> int:
        time.sleep(0.05 if last else 0.0)
        return item

    sharded = replace(shard_rows(comm), stop_requested=lambda: last and len(done) >= 2)
    try:
        for item in sharded.each(work, range(200 if last else 3)):
            done.append(item)
    except Stopped:
        return True, done
    return False, done


def test_all_ranks_stop_in_the_middle_of_a_pass_where_one_is_asked_to() -> None:
    (first, all_of_it), (last, begun) = run_ranks(stopped_in_a_pass, 2)
    assert (first, last) == (True, True)
    assert all_of_it == [0, 1, 2]  # of the rank that had long been through
    assert 2 <= len(begun) < 200


def test_a_caller_that_gives_up_waits_for_what_has_begun_alone() -> None:
    begun = list[int]()

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.3 if item else 0.0)
        return item

    results = side_by_side(work, range(100), 2)
    assert next(results) == 0  # two wait at most per thread: 3 has been handed over
    results.close()
    assert 3 not in begun
