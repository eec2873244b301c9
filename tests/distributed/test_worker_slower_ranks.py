from __future__ import annotations

import time
from collections.abc import Generator

import pytest

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext, Stopped, wait_for_slower_ranks
from tests.processes import run_ranks
from tests.stages.tiny import CPU

WAIT_S = 3.0  # of one collective
PIECES = (2, 0, 9)  # of each rank; the last rank's take longer than one collective waits


def pieces(num: int, each_s: float, done: list[int]) -> Generator[None, None, None]:
    try:
        for number in range(num):
            time.sleep(each_s)
            done.append(number)
            yield
    finally:
        done.append(-1)


def work(comm: Comm, stop_after: int | None = None) -> tuple[list[int], bool]:
    """What this rank has done, and whether it was stopped; the last rank is asked to stop after `stop_after` pieces."""
    done = list[int]()
    last = comm.rank == comm.size - 1

    def stop_requested() -> bool:
        return last and stop_after is not None and len(done) >= stop_after

    context = RankContext(comm, CPU, lambda status: None, stop_requested)
    try:
        wait_for_slower_ranks(context, pieces(PIECES[comm.rank], 0.5 if last else 0.0, done))
    except Stopped:
        return done, True
    return done, False


@pytest.mark.slow
def test_ranks_that_have_finished_wait_longer_than_a_collective_for_one_that_makes_progress() -> None:
    found = run_ranks(work, 3, collective_s=WAIT_S)
    assert found == [([*range(num), -1], False) for num in PIECES]


def wait_in_one(comm: Comm) -> None:
    if comm.rank == 0:
        time.sleep(0.5 * PIECES[-1])
    comm.barrier()


@pytest.mark.slow
def test_one_collective_would_not_have_waited_so_long() -> None:
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        run_ranks(wait_in_one, 2, collective_s=WAIT_S)


def test_all_ranks_stop_together_and_close_their_work_where_one_is_asked_to() -> None:
    first, none, last = run_ranks(work, 3, 2)
    assert [stopped for _, stopped in (first, none, last)] == [True, True, True]
    assert (first[0], none[0]) == ([0, 1, -1], [-1])
    assert last[0] in ([0, 1, -1], [0, 1, 2, -1])  # the piece under way is done


def test_one_rank_alone_does_all_of_its_work() -> None:
    done = list[int]()
    wait_for_slower_ranks(RankContext(Comm(), CPU, lambda status: None, lambda: False), pieces(4, 0.0, done))
    assert done == [0, 1, 2, 3, -1]
