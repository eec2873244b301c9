"""Tasks and jobs on one Ray cluster of this machine, whose workers die on purpose."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.console import Terminated
from grappa_dist.distributed.local_ray import NICENESS
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from grappa_dist.distributed.worker import RankContext

RESOURCES = Resources(workers=2, num_cpus=2, max_restarts=2, collective_timeout_s=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(RESOURCES)
        try:
            cluster.workers()
            yield cluster
        finally:
            cluster.close()


class Recorder:
    """Events of a runner, by name."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **figures: Any) -> None:
        self.events.append((name, figures))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [figures for event, figures in self.events if event == name]


@pytest.fixture
def events() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(cluster: Cluster, events: Recorder) -> Iterator[Runner]:
    runner = Runner(cluster, RESOURCES, on_event=events)
    with runner.handle_signals():
        yield runner


def once(marker: str) -> bool:
    """True on the first call over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def square(device: torch.device, number: int) -> tuple[int, str, int]:
    time.sleep(0.05 * (number % 3))
    return number**2, str(device.type), os.getpid()


def die_once(device: torch.device, task: tuple[int, str]) -> int:
    number, marker = task
    if number == 1 and once(marker):
        os._exit(3)
    return number * 10


def always_die(device: torch.device, folder: str) -> None:
    with open(os.path.join(folder, f"attempt-{time.monotonic_ns()}"), "w"):
        os._exit(3)


def refuse(device: torch.device, number: int) -> None:
    raise AssertionError


def read_stale(device: torch.device, marker: str) -> str:
    if once(marker):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return "read"


def refuse_once_seen(context: RankContext, marker: str) -> None:
    while not Path(marker).exists():
        time.sleep(0.02)
    raise ValueError("adapt: loss is nan")


def lose_link(context: RankContext, spec: None) -> None:
    raise ConnectionError


def sum_of_ranks(context: RankContext, spec: tuple[int, str]) -> tuple[int, int]:
    victim, marker = spec
    for step in range(3):
        total = context.comm.sum_(torch.tensor([context.comm.rank + 1]))
        if step == 1 and context.comm.rank == victim and once(marker):
            os._exit(3)
    return context.comm.rank, int(total)


def sum_with_a_rank_stopped(context: RankContext, marker: str) -> int:
    """Rank 1 is stopped once, as by SIGSTOP from outside, and what it would write afterwards is there to be seen."""
    if context.comm.rank == 1 and once(marker):
        Path(marker).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        Path(marker + ".went-on").touch()
    return int(context.comm.sum_(torch.tensor([context.comm.rank + 1])))


def refuse_on_rank(context: RankContext, spec: tuple[int, str]) -> None:
    """One rank finds its input bad while the other sits in a collective."""
    rank, folder = spec
    (Path(folder) / f"{context.comm.rank}-{time.monotonic_ns()}").touch()
    if context.comm.rank == rank:
        raise ValueError("data.train: a shard is missing")
    context.comm.sum_(torch.zeros(1))


_left: list[weakref.ref[torch.nn.Module]] = []


def leave_cycle(context: RankContext, spec: None) -> bool:
    """Leaves a model that only the collector frees, which shall not run by itself; whether the last one is there."""
    there = any(ref() is not None for ref in _left)
    gc.disable()
    model = torch.nn.Linear(3, 3)
    model.whole = [model]
    _left.append(weakref.ref(model))
    return there


def wait_for_stop(context: RankContext, marker: str) -> str:
    context.report({"done": 1})
    Path(marker).touch()
    deadline = time.monotonic() + 60
    while not context.stop_requested() and time.monotonic() < deadline:
        time.sleep(0.02)
    Path(marker + ".saved").touch()
    return "stopped"


@pytest.mark.slow
def test_results_of_tasks_come_in_their_order_from_all_workers(runner: Runner) -> None:
    finished: list[int] = []
    results = runner.map(square, list(range(9)), finished.append)
    assert [result[0] for result in results] == [n**2 for n in range(9)]
    assert sorted(finished) == list(range(9))
    assert len({result[2] for result in results}) == 2
    assert os.getpid() not in {result[2] for result in results}
    nice = {os.getpriority(os.PRIO_PROCESS, result[2]) for result in results}
    assert nice == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)}
    assert runner.map(square, []) == []


def test_a_task_whose_process_dies_is_tried_again(runner: Runner, events: Recorder, tmp_path: Path) -> None:
    marker = str(tmp_path / "died")
    assert runner.map(die_once, [(n, marker) for n in range(4)]) == [0, 10, 20, 30]
    assert [event["job"] for event in events.of("job_failed")] == ["die_once 1"]
    assert runner.num_workers == 2
    assert runner.sharing == 2


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_job_whose_rank_dies_restarts_whole_and_ends(
    runner: Runner, events: Recorder, tmp_path: Path, victim: int
) -> None:
    results = runner.run_jobs([Job("sums", sum_of_ranks, (victim, str(tmp_path / "died")), 2)])
    assert results == {"sums": [(0, 3), (1, 3)]}
    assert [event["attempt"] for event in events.of("job_failed")] == [1]
    assert len(events.of("job_begins")) == 2


@pytest.mark.slow
def test_a_job_or_task_starts_on_fresh_workers_where_idle_ones_have_died_and_no_attempt_is_counted(
    cluster: Cluster, events: Recorder
) -> None:
    runner = Runner(cluster, RESOURCES.model_copy(update={"max_restarts": 0}), on_event=events)
    for pid in {result[2] for result in runner.map(square, list(range(6)))}:
        os.kill(pid, signal.SIGKILL)
    assert runner.run_jobs([Job("late", sum_of_ranks, (-1, ""), 2)]) == {"late": [(0, 3), (1, 3)]}
    assert [(event["job"], event["attempt"]) for event in events.of("job_failed")] == [("late", 0)]
    os.kill(runner.map(square, [1])[0][2], signal.SIGKILL)
    assert runner.map(square, [3, 4])[1][0] == 16
    assert [event["attempt"] for event in events.of("job_failed")] == [0, 0]


def test_jobs_run_side_by_side_and_one_that_dies_takes_no_other_with_it(
    runner: Runner, events: Recorder, tmp_path: Path
) -> None:
    specs = {"dies": (0, str(tmp_path / "died")), "lives": (-1, ""), "waits": (-1, "")}
    results = runner.run_jobs([Job(name, sum_of_ranks, spec, 1) for name, spec in specs.items()])
    assert results == {name: [(0, 1)] for name in specs}
    assert [event["job"] for event in events.of("job_begins")].count("lives") == 1
    assert [event["job"] for event in events.of("job_failed")] == ["dies"]


def test_nothing_of_a_job_is_left_when_the_next_one_begins(runner: Runner) -> None:
    left = [runner.run_jobs([Job("cycle", leave_cycle, None, 2)])["cycle"] for _ in range(2)]
    assert left == [[False, False]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_on_any_rank_reaches_the_driver_at_once(runner: Runner, tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match=r"^data\.train: a shard is missing$"):
        runner.run_jobs([Job("refused", refuse_on_rank, (rank, str(tmp_path)), 2)])
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "1"]  # one attempt


def test_workers_serve_on_after_bad_input(runner: Runner) -> None:
    assert [result[0] for result in runner.map(square, [5, 6])] == [25, 36]


def test_an_error_that_a_task_raises_itself_is_not_tried_again(runner: Runner, events: Recorder) -> None:
    with pytest.raises(AssertionError):
        runner.map(refuse, [0])
    assert events.of("job_failed") == []


def test_a_task_that_storage_failed_is_tried_again(runner: Runner, events: Recorder, tmp_path: Path) -> None:
    assert runner.map(read_stale, [str(tmp_path / "once")]) == ["read"]
    (failed,) = events.of("job_failed")
    assert "Stale file handle" in failed["reason"]


def test_a_job_of_one_rank_whose_port_was_taken_is_tried_again_at_another_address(
    runner: Runner, events: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "died").touch()  # so that no rank dies
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        given, give = list[str](), Runner._give

        def give_at_first_what_is_taken(runner: Runner, running: Any, address: str) -> None:
            host = address.rsplit(":", 1)[0]
            given.append(address if given else f"{host}:{taken.getsockname()[1]}")
            give(runner, running, given[-1])

        monkeypatch.setattr(Runner, "_give", give_at_first_what_is_taken)
        assert runner.run_jobs([Job("alone", sum_of_ranks, (0, str(tmp_path / "died")), 1)]) == {"alone": [(0, 1)]}
    (failed,) = events.of("job_failed")
    assert failed["reason"].startswith(f"no process group at {given[0]}: ")
    assert given[1] != given[0]


def test_an_error_without_a_message_is_reported_by_its_name(cluster: Cluster, events: Recorder) -> None:
    runner = Runner(cluster, RESOURCES.model_copy(update={"max_restarts": 0}), on_event=events)
    with pytest.raises(RuntimeError, match=r"links failed 1 times, last with: ConnectionError$"):
        runner.run_jobs([Job("links", lose_link, None, 2)])


@pytest.mark.slow
def test_a_job_that_always_dies_fails_with_its_last_reason(runner: Runner, events: Recorder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"always_die 0 failed 3 times, last with: .+"):
        runner.map(always_die, [str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == RESOURCES.max_restarts + 1
    assert [event["attempt"] for event in events.of("job_failed")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 3}, r"3 workers need 3 CPU, the Ray cluster has 2; lower resources\.workers"),
        (
            {"workers": 2, "cpus_per_worker": 2},
            r"2 workers need 4 CPU, the Ray cluster has 2.*resources\.cpus_per_worker",
        ),
        (
            {"workers": 1, "gpus_per_worker": 1},
            r"1 worker needs 1 GPU, the Ray cluster has 0.*resources\.gpus_per_worker",
        ),
        ({"workers": 2, "adapt_ranks": 3}, r"resources\.adapt_ranks=3 is more than the 2 workers"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_at_once(
    cluster: Cluster, settings: dict[str, Any], message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        Cluster(Resources(**settings)).workers()
    assert time.monotonic() - began < 10


def test_a_job_of_more_ranks_than_workers_is_refused(runner: Runner) -> None:
    with pytest.raises(ValueError, match=r"adapt_ranks=3 is more than the 2 workers: 1 missing"):
        runner.run_jobs([Job("wide", sum_of_ranks, (-1, ""), 3)])


@pytest.mark.slow
def test_a_job_that_fails_for_good_lets_the_others_save_their_state(
    cluster: Cluster, runner: Runner, events: Recorder, tmp_path: Path
) -> None:
    marker = str(tmp_path / "runs")
    jobs = [Job("long", wait_for_stop, marker, 1), Job("wrong", refuse_once_seen, marker, 1)]
    with pytest.raises(ValueError, match="loss is nan"):
        runner.run_jobs(jobs)
    assert Path(f"{marker}.saved").exists()
    assert [event["jobs"] for event in events.of("stopping")] == [["long"]]
    cluster.replace(list(cluster.workers()))  # which stay asked to stop


def test_sigterm_lets_jobs_save_their_state(runner: Runner, tmp_path: Path) -> None:
    """Last: its workers stay asked to stop."""
    marker = tmp_path / "runs"

    def terminate() -> None:
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(Terminated):
        runner.run_jobs([Job("long", wait_for_stop, str(marker), 1)])
    thread.join()
    assert Path(f"{marker}.saved").exists()


@pytest.mark.long
def test_a_rank_that_stands_still_is_ended_and_its_job_starts_again(
    cluster: Cluster, events: Recorder, tmp_path: Path
) -> None:
    marker = str(tmp_path / "stopped")
    runner = Runner(cluster, RESOURCES.model_copy(update={"collective_timeout_s": 5}), on_event=events)
    with runner.handle_signals():
        assert runner.run_jobs([Job("sum", sum_with_a_rank_stopped, marker, 2)]) == {"sum": [3, 3]}
    assert [figures["attempt"] for figures in events.of("job_failed")] == [1]
    end, pid = time.monotonic() + 20, int(Path(marker).read_text())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()  # it could otherwise go on later and write beside its successor
    assert not Path(marker + ".went-on").exists()


@pytest.mark.long
def test_a_rank_that_stands_still_for_a_while_costs_time_alone(
    runner: Runner, events: Recorder, tmp_path: Path
) -> None:
    marker = tmp_path / "stopped"

    def go_on() -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.05)
        time.sleep(2.0)
        os.kill(int(marker.read_text()), signal.SIGCONT)

    waker = threading.Thread(target=go_on, daemon=True)
    waker.start()
    assert runner.run_jobs([Job("sum", sum_with_a_rank_stopped, str(marker), 2)]) == {"sum": [3, 3]}
    assert events.of("job_failed") == []
    assert Path(f"{marker}.went-on").exists()
