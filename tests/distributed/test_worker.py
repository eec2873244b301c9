from __future__ import annotations

import platform
import socket
import time
from pathlib import Path

import pytest

from grappa_dist import progress
from grappa_dist.bucket import _Kept
from grappa_dist.distributed import worker


class Ended(Exception):
    pass


def end(status: int) -> None:
    raise Ended(status)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.02)
    monkeypatch.setattr(worker.os, "_exit", end)


def test_a_worker_that_cannot_reach_the_head_ends_itself() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing listens
        with pytest.raises(Ended, match="75"):
            worker._end_when_cut_off(closed.getsockname())


def test_a_head_that_is_too_busy_to_answer_counts_as_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    class Enough(Exception):
        pass

    def count(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) > 3 * worker.CUT_OFF_TRIES:
            raise Enough

    monkeypatch.setattr(time, "sleep", count)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen(100)  # and accepts no connection
        with pytest.raises(Enough):
            worker._end_when_cut_off(head.getsockname())


def test_one_connection_to_the_head_resets_the_count_of_failed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False] * (worker.CUT_OFF_TRIES - 1) + [True] + [False] * worker.CUT_OFF_TRIES

    def look(address: object, timeout_s: float) -> socket.socket:
        if answers.pop(0):
            return socket.socket()
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", look)
    with pytest.raises(Ended):
        worker._end_when_cut_off(("10.0.0.1", 1))
    assert answers == []


def test_a_job_says_which_faster_ways_it_lost_and_those_after_it_do_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_lost", list[str]())
    monkeypatch.setattr(worker, "_head_address", lambda: ("127.0.0.1", 0))
    monkeypatch.setattr(worker, "_end_when_cut_off", lambda address: None)
    monkeypatch.setattr(_Kept, "most", None)
    one = worker.Worker(threads=1, gpus=0, copies_bytes=7)
    assert _Kept.most == 7

    def lose(device: object, what: str) -> None:
        progress.trial_lost(what, ValueError("no\n compiler"))

    assert one.run(lose, "a kernel") is None
    assert one.status() == {"notes": ["a kernel is not used: ValueError: no compiler"]}
    one.run(lose, "a kernel")
    assert one.status() == {}
    one.run(lose, "another")
    assert one.status() == {"notes": ["another is not used: ValueError: no compiler"]}


def own_bytes() -> int:
    """What this process holds that is of no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have nothing to call")
def test_what_a_job_has_freed_goes_back_to_the_system_when_it_ends() -> None:
    size, count = 64 * 1024, 1600  # below what the C library takes from the system by itself
    blocks = [(b"x" * size, b"y" * (1000 + i)) for i in range(count)]
    kept = [small for _, small in blocks]  # between the others, so that none of them is at the end
    del blocks
    held = own_bytes()
    worker.release_memory()
    assert held - own_bytes() > size * count // 2
    assert len(kept) == count
