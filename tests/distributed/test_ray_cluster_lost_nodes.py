"""What a run does when a node with idle workers dies, and when it is asked to end while workers are starting."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.config import Resources
from grappa_dist.console import Ending, Terminated
from grappa_dist.distributed import ray_cluster
from grappa_dist.distributed.preflight import Checks, Facts, versions
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from tests.distributed.standins import Ray, Ref, Worker


def answer(ref: Ref) -> Any:
    """What ends on node a goes on for ever on node b."""
    if ref.method == "free_address":
        return f"{ref.worker.node}:1"
    if ref.method == "ready":
        return ref.worker.node
    if ref.method == "status":
        return {}
    return None if ref.worker.node == "b" else "done"


def started(ray: Ray, monkeypatch: pytest.MonkeyPatch, workers: list[Worker], **settings: Any) -> Cluster:
    """A cluster with these workers up; new ones come up on node a."""
    versions()  # is remembered; a stand-in has no version
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("grappa_dist.distributed.runner.LOOK_S", 0.0)  # the stand-in reports no end
    monkeypatch.setattr("grappa_dist.distributed.runner.POLL_S", 0.01)
    cluster = Cluster(Resources(placement_timeout_s=5, **settings))
    cluster._begun, cluster._node_of = True, {worker: worker.node for worker in workers}
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "_new_worker", lambda: Worker("a"))
    return cluster


def test_nodes_of_renewed_workers_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [Worker("a")]
    cluster = started(Ray("a", answer), monkeypatch, old)
    cluster.facts["a"] = Facts("a")
    Runner(cluster, cluster.resources).renew_workers()
    assert old[0].asked == ["killed"]
    assert cluster.facts == {}
    assert cluster.size == 1


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("ranks", [0, 1])
def test_a_dead_nodes_idle_workers_are_given_no_job(monkeypatch: pytest.MonkeyPatch, elastic: bool, ranks: int) -> None:
    ray, waits = Ray("ab", answer), iter(range(10**6))

    def die_later(_: float) -> None:
        if next(waits) == 4:
            ray.dead.add("b")

    ray.each_wait = die_later
    workers = [Worker("b") for _ in range(8)]
    cluster = started(ray, monkeypatch, workers, elastic=elastic, max_restarts=1)
    failed, logged = list[dict[str, Any]](), list[str]()
    cluster.log = logged.append
    runner = Runner(
        cluster, cluster.resources, on_event=lambda name, **f: failed.append(f) if name == "job_failed" else None
    )
    assert runner.run_jobs([Job("one", print, None, ranks)]) == {"one": ["done"] if ranks else "done"}
    assert [event["attempt"] for event in failed] == [1]
    assert "warning: one failed and is tried again: The actor died because its node has died." in logged
    assert sum(bool({"run", "run_rank"} & set(worker.asked)) for worker in workers) == 1
    assert all("killed" in worker.asked for worker in workers)
    assert {cluster.node_of(worker) for worker in cluster.workers()} == {"a"}
    assert cluster.size == 8


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_a_start_on_workers_whose_death_is_not_known_yet_is_no_attempt(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """A task's as well as a job's, and whichever of the job's ranks would have been there."""
    ray = Ray("ab", answer, dead={"b"}, unnoticed={"b"})
    workers = [*(Worker("a") for _ in range(max(0, ranks - 1))), *(Worker("b") for _ in range(4))]
    cluster = started(ray, monkeypatch, workers, max_restarts=0)
    monkeypatch.setattr(cluster, "node_of", lambda worker: "alike")  # else the job goes to the node that can hold it
    results = Runner(cluster, cluster.resources).run_jobs([Job("one", print, None, ranks)])
    assert results == {"one": ["done"] * ranks if ranks else "done"}
    assert not any({"run", "run_rank"} & set(worker.asked) for worker in workers if worker.node == "b")


@pytest.mark.parametrize("ranks", [0, 2])
def test_workers_that_die_again_and_again_before_they_are_given_anything_end_the_run(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """No attempt is counted, but there is an end."""
    ray = Ray("ab", answer, dead={"b"}, unnoticed={"b"})
    cluster = started(ray, monkeypatch, [Worker("b") for _ in range(3)], max_restarts=2)
    ups = iter(range(10**6))

    def restarted() -> Worker:
        assert next(ups) < 100, "for ever"
        return Worker("b")

    monkeypatch.setattr(cluster, "_new_worker", restarted)
    ray.last_words = {"ready"}
    failed: list[dict[str, Any]] = []
    runner = Runner(
        cluster, cluster.resources, on_event=lambda name, **f: failed.append(f) if name == "job_failed" else None
    )
    message = (
        r"one cannot begin: 6 times in a row a worker had died before it was given anything to do, last with: .+died"
    )
    with pytest.raises(RuntimeError, match=message):
        runner.run_jobs([Job("one", print, None, ranks)])
    assert [event["attempt"] for event in failed] == [0] * 6


def swallow(ray: Ray, monkeypatch: pytest.MonkeyPatch, seconds_of_waiting: float) -> None:
    """Makes waiting lose what a signal handler raises, as Ray's compiled code may, and stand still, as it does."""

    def wait(timeout_s: float) -> None:
        with contextlib.suppress(Terminated):
            time.sleep(min(timeout_s, 0.2))
        assert time.monotonic() < end, "still waiting"

    end = time.monotonic() + seconds_of_waiting
    ray.each_wait = wait


@pytest.mark.parametrize("call", ["run_jobs", "num_workers"])
def test_sigterm_while_a_worker_cannot_be_placed_ends_the_run(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    ray = Ray("a", lambda ref: None)
    swallow(ray, monkeypatch, 10)
    cluster = started(ray, monkeypatch, [], max_restarts=0)
    cluster.resources = cluster.resources.model_copy(update={"placement_timeout_s": 300.0})
    cluster._start(1)
    runner = Runner(cluster, cluster.resources)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    timer.start()
    with pytest.raises(Terminated), runner.handle_signals():
        runner.num_workers if call == "num_workers" else runner.run_jobs([Job("one", print, None, 1)])
    assert time.monotonic() - began < 60  # placing would take 300 s


def test_sigterm_that_comes_with_the_last_result_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray("a", answer)
    cluster = started(ray, monkeypatch, [Worker("a")])
    runner = Runner(cluster, cluster.resources)
    with pytest.raises(Terminated), runner.handle_signals():
        runner.run_jobs([Job("one", print, None, 1)], lambda name: os.kill(os.getpid(), signal.SIGTERM))


def test_what_running_tasks_and_jobs_report_is_passed_on_with_how_many_jobs_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, waits = list[int](), iter(range(10**6))

    def answer_later(ref: Ref) -> Any:
        if ref.method in ("run", "run_rank"):
            return "done" if done else None
        return {"done": 3} if ref.method == "status" else answer(ref)

    def pass_time(_: float) -> None:
        if next(waits) == 20:
            done.append(1)

    monkeypatch.setattr("grappa_dist.distributed.runner.STATUS_S", 0.0)
    cluster = started(Ray("a", answer_later, each_wait=pass_time), monkeypatch, [Worker("a"), Worker("a")])
    reports, statuses = list[Any](), list[Any]()
    runner = Runner(cluster, cluster.resources, on_status=statuses.append)
    assert runner.map(print, [1, 2, 3], running=reports.append) == ["done"] * 3
    assert reports[0] == [{"done": 3}, {"done": 3}]
    assert statuses == []
    done.clear()
    waits = iter(range(10**6))
    runner.run_jobs([Job(f"k={k}", print, None, 1) for k in range(3)])
    assert statuses[0] == {f"k={k}": {"done": 3, "waiting": 1} for k in range(2)}


def test_an_error_of_the_progress_callback_is_raised_and_signals_are_no_longer_polled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray("a", answer)
    cluster = started(ray, monkeypatch, [Worker("a")])
    runner = Runner(cluster, cluster.resources)

    def refuse(index: int) -> None:
        raise ValueError(f"{index} is enough")

    with pytest.raises(ValueError, match="0 is enough"):
        runner.map(print, [1, 2], refuse)
    assert not runner._signals.polled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("end", ["saves", "hangs", "dies"])
def test_the_last_line_has_state_is_saved_only_where_all_jobs_have_ended_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, end: str
) -> None:
    monkeypatch.setattr("grappa_dist.distributed.runner.STOP_GRACE_S", 0.3)
    workers = [Worker("a"), Worker("b")]

    def goes_on(ref: Ref) -> Any:
        if ref.method == "free_address":
            return "a:1"
        stopped = "stop" in ref.worker.asked
        if stopped and end == "dies":
            ray.dead.add("b")
        return "saved" if stopped and (end == "saves" or ref.worker.node == "a") else None

    ray = Ray("ab", goes_on)
    cluster = started(ray, monkeypatch, workers)
    runner = Runner(
        cluster,
        cluster.resources,
        on_event=lambda name, **_: os.kill(os.getpid(), number) if name == "job_begins" else None,
    )

    def work() -> None:
        with runner.handle_signals():
            runner.run_jobs([Job("one", print, None, 2)])

    assert Ending().of(work) == (143 if number == signal.SIGTERM else 130)
    how = "terminated" if number == signal.SIGTERM else "interrupted"
    saved = "state is saved" if end == "saves" else "not all jobs had saved within 0.3 s"
    assert capsys.readouterr().err == f"{how}; {saved}, run the same command again to go on\n"


def test_sigterm_while_ray_starts_ends_the_run_as_terminated_despite_rays_handler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A separate process: ray.init installs its handler, which calls sys.exit."""
    program = """
import os, signal, sys, ray
from grappa_dist.config import Resources
from grappa_dist.console import Ending
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Runner
def init(**_):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.kill(os.getpid(), signal.SIGTERM)
ray.init = init
runner = Runner(Cluster(Resources()), Resources())
def work():
    with runner.handle_signals():
        print(runner.num_workers)
sys.exit(Ending().of(work))
"""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert ended.returncode == 143, ended.stderr


def test_nodes_whose_storage_hangs_are_awaited_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_cluster, "SURVEY_TIMEOUT_S", 1.0)
    ray = Ray("abcd", lambda ref: ref.worker.node if ref.method == "ready" else None)
    ray.each_wait = lambda timeout_s: time.sleep(min(timeout_s, 0.1))
    nodes = iter("abcd")
    cluster = started(ray, monkeypatch, [])
    monkeypatch.setattr(cluster, "_new_worker", lambda: Worker(next(nodes)))
    cluster._begun, cluster.checks = False, Checks(tmp_path, print)
    cluster._start(4)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^preflight: a, b, c and 1 more: no answer within 1 s; does its storage hang\?$"
    ):
        cluster._settle()
    assert time.monotonic() - began < 3.5  # one after the other they would take 4 s


def test_sigterm_while_storage_hangs_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = Ray("a", lambda ref: ref.worker.node if ref.method == "ready" else None)
    swallow(ray, monkeypatch, 10)
    cluster = started(ray, monkeypatch, [])
    cluster.checks = Checks(tmp_path, print)
    cluster._start(1)
    runner = Runner(cluster, cluster.resources)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Terminated), runner.handle_signals():
        print(runner.num_workers)
