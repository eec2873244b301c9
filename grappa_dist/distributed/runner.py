"""Runs tasks and jobs on the workers: places them, tries failed ones again, and stops all of them on a signal.

SIGTERM, SIGHUP and Ctrl-C let running jobs save their state before the run ends; a second Ctrl-C ends the run at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Interrupted, Terminated
from grappa_dist.distributed.placement import FreeWorkers, check_capacity, may_have_gpus
from grappa_dist.distributed.preflight import Checks
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.storage import WITHOUT_SPACE

POLL_S = 0.5
LOOK_S = 2.0  # between two looks at all calls, for an end that Ray has not reported
STATUS_S, ASKED_AT_ONCE = 1.0, 50  # seconds between two looks at what so many running jobs report; more have longer
STOP_GRACE_S = 60.0  # for running jobs to save their state
RAY_DEATH_S = 1.0  # after an error, for a death of Ray that may have caused it
ERROR_GRACE_S = 2.0  # for the other ranks of a failed job to report their errors
OnTasks = Callable[[Sequence[Mapping[str, Any]]], None]  # called with what running tasks report


@dataclass(frozen=True)
class Job:
    """`function(context, spec)` on `ranks` workers at once, in their own process group.

    With no ranks it is a task, `function(device, spec)` in one worker and without a group.
    """

    name: str
    function: Callable[[Any, Any], Any]
    spec: Any
    ranks: int


@dataclass
class Signals:
    """SIGTERM, the SIGHUP of a closed terminal, and Ctrl-C as the main thread receives them."""

    polled: bool = False  # `stop_requested` is called now and then: what a handler raises while Ray waits may be lost
    _stop_requested: bool = False
    _interrupts: int = 0

    def stop_requested(self) -> bool:
        """Whether the run is to save its state and end."""
        return self._stop_requested

    @property
    def interrupted(self) -> bool:
        return self._interrupts > 0

    @property
    def at_once(self) -> bool:
        """Whether the run ends without waiting for any job."""
        return self._interrupts > 1

    @contextmanager
    def handled(self) -> Iterator[None]:
        """While inside, SIGTERM and SIGHUP raise Terminated, Ctrl-C Interrupted: at once, or where they are polled.

        Outside of the main thread, which alone may handle signals, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _: object) -> None:
            self._stop_requested = True
            self._interrupts += number == signal.SIGINT
            if not self.polled:
                raise Terminated

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        for number in (signal.SIGHUP, signal.SIGINT):  # nohup ignores the one, a shell's background the other
            if before[number] == signal.SIG_IGN:
                del before[number]
        try:
            for number in before:
                signal.signal(number, handle)
            yield
        except Terminated as ended:
            if self.interrupted:
                raise Interrupted(at_once=self.at_once, waited_s=ended.waited_s) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's


@dataclass(eq=False)
class _Running:
    job: Job
    workers: list[Any]
    refs: list[Any]  # one call of each worker: at first whether it answers, then the work
    pending: set[Any]  # those of them that are not known to have ended
    begun: bool = False  # whether all workers have answered and have been given the work


@dataclass
class EndedCalls:
    """Calls of workers that have ended, as Ray reports each; the cost of one does not depend on the number of others.

    Ray calls back in a thread of its own, which must not wait for Ray: it puts what has ended into a queue. It does so
    for dead workers and for results that cannot be read here as well. As that is not promised, a look at all calls,
    every LOOK_S, finds the rest.
    """

    queue: SimpleQueue[tuple[_Running, Any, bool]] = field(default_factory=SimpleQueue)  # job, call, whether it failed
    _looked: float = field(default_factory=time.monotonic)

    def watch(self, running: _Running) -> None:
        """From now on the ends of the calls that are under way are reported."""
        running.pending = set(running.refs)
        for ref in running.refs:
            ref.future().add_done_callback(partial(self._put, running, ref))

    def _put(self, running: _Running, ref: Any, future: Any) -> None:
        self.queue.put((running, ref, future.exception() is not None))

    def next(self, timeout_s: float) -> tuple[_Running, Any, bool]:
        """The job, the call that has ended, and whether it failed; raises Empty where none ends in time."""
        return self.queue.get(timeout_s > 0, timeout_s)

    def wait(self, running: Mapping[str, _Running]) -> list[_Running]:
        """Those of which all calls have ended, or one has failed; waits for a call to end, at most POLL_S."""
        found: dict[_Running, None] = {}
        try:
            timeout_s = POLL_S
            while True:
                r, ref, failed = self.next(timeout_s)
                timeout_s = 0.0
                if running.get(r.job.name) is r and ref in r.pending:  # else of an attempt that is over
                    r.pending.remove(ref)
                    if failed or not r.pending:
                        found[r] = None
        except Empty:
            pass
        if time.monotonic() - self._looked > LOOK_S:
            found |= dict.fromkeys(_with_ended_calls(running.values()))
            self._looked = time.monotonic()
        return list(found)


@dataclass
class _Tries:
    """Attempts at one job."""

    attempts: int = 0  # in which it was given to its workers and failed
    dead_starts: int = 0  # starts since then in which an idle worker turned out to be dead


@dataclass
class Runner:
    """Runs tasks and jobs on the cluster's workers, one stage at a time."""

    cluster: Cluster
    resources: Resources
    on_status: Callable[[Mapping[str, Mapping[str, Any]]], None] = lambda status: None  # rank 0's status of each job
    on_event: Callable[..., None] = lambda name, **figures: None
    ended: EndedCalls = field(default_factory=EndedCalls)
    _signals: Signals = field(default_factory=Signals)
    _nodes: list[dict[str, Any]] = field(default_factory=list)  # of the last event about workers

    def handle_signals(self) -> AbstractContextManager[None]:
        """While inside, SIGTERM and SIGHUP raise Terminated, Ctrl-C raises Interrupted.

        Before that, running jobs stop at their next step, or on a GPU when they next read their figures, and save, for
        which they have a minute. Ctrl-C pressed again waits for no job.
        """
        return self._signals.handled()

    @contextmanager
    def _polling_signals(self) -> Iterator[None]:
        """While inside, signals are recorded and polled; the end raises Terminated if one has come."""
        self.cluster.connect()  # meanwhile Ray's own handler takes SIGTERM
        self.cluster.stopping = self._signals.stop_requested
        self._signals.polled = True
        try:
            yield
        finally:
            self._signals.polled = False
        if self._signals.stop_requested():
            raise Terminated

    def require(self, checks: Checks) -> None:
        """What every node must pass before it works."""
        self.cluster.checks = checks

    def has_gpus(self) -> bool:
        """Whether the workers have GPUs; connects to Ray where only the cluster knows, and starts no workers."""
        if self.resources.gpus_per_worker != "auto" or not os.environ.get("RAY_ADDRESS"):
            return may_have_gpus(self.resources)
        with self._polling_signals():
            return self.cluster.has_gpus()

    def renew_workers(self) -> None:
        """Replaces all workers that are up, and with them what they hold in memory; their nodes are checked again."""
        if self.cluster.started and not self.cluster.ray_has_died():  # else all are new once it is started again
            with self._polling_signals():
                self.cluster.facts.clear()  # what is needed of a node may be more than before, such as the backbone
                self.cluster.replace(self.cluster.workers())

    @property
    def num_workers(self) -> int:
        with self._polling_signals():
            return len(self._gather())

    @property
    def sharing(self) -> int:
        """Workers on the node that has the most of them."""
        with self._polling_signals():
            nodes = Counter(self.cluster.node_of(worker) for worker in self._gather())
        return max(nodes.values(), default=1)

    def map(
        self,
        function: Callable[[Any, Any], Any],
        tasks: Sequence[Any],
        progress: Callable[[int], None] = lambda index: None,
        running: Callable[[Sequence[Mapping[str, Any]]], None] = lambda reports: None,
    ) -> list[Any]:
        """Results of `function(device, task)` in order; a task whose process died is tried again elsewhere.

        Args:
            progress: called with the index of each task that has finished.
            running: called now and then with what the running tasks report of themselves.
        """
        jobs = [Job(f"{function.__name__} {i}", function, task, 0) for i, task in enumerate(tasks)]
        index = {job.name: i for i, job in enumerate(jobs)}
        results: dict[str, Any] = {}
        with closing(self._run(jobs, running)) as finished:
            for name, result in finished:
                results[name] = result
                progress(index[name])
        return [results[job.name] for job in jobs]

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        """Every rank's result per job; jobs run side by side as far as the workers go, and restart separately.

        Args:
            done: called with the name of each job that has finished.
        """
        results: dict[str, list[Any]] = {}
        with closing(self._run(jobs, lambda reports: None)) as finished:
            for name, result in finished:
                results[name] = result
                done(name)
        return results

    def _run(self, jobs: Sequence[Job], on_tasks: OnTasks) -> Generator[tuple[str, Any], None, None]:
        """Name and results of each job, or the result of a task, as soon as it has finished."""
        left = {job.name: job for job in jobs}
        with self._polling_signals():
            while left:
                self._gather()
                try:
                    for name, result in self._finished(list(left.values()), on_tasks):
                        del left[name]
                        yield name, result
                except Exception:
                    if not self.cluster.ray_has_died(RAY_DEATH_S):
                        raise

    def _gather(self) -> list[Any]:
        """The workers; a local Ray that has died is started again first."""
        while True:
            if self.cluster.ray_has_died():
                self.cluster.restart_ray()
                self.cluster.connect()
            try:
                workers = self.cluster.gather()
            except Exception:
                if not self.cluster.ray_has_died(RAY_DEATH_S):
                    raise
            else:
                if (nodes := self.cluster.describe_nodes()) != self._nodes:
                    self._nodes = nodes
                    self.on_event("workers", nodes=nodes)
                return workers

    def _finished(self, jobs: Sequence[Job], on_tasks: OnTasks) -> Iterator[tuple[str, Any]]:
        waiting, tries = deque(jobs), {job.name: _Tries() for job in jobs}
        free, running = FreeWorkers(self.cluster.node_of, self.cluster.workers()), dict[str, _Running]()
        if not self.resources.elastic:
            check_capacity(len(free), max((job.ranks for job in jobs), default=0))
        shown = time.monotonic()
        while waiting or running:
            if self._signals.stop_requested():
                self._stop(list(running.values()))
            self.cluster.check_ray()
            free.add(self.cluster.arrived(timeout_s=0 if running else POLL_S))
            while waiting and len(free) >= self._ranks(waiting[0]):
                started = self._start(waiting.popleft(), free)
                running[started.job.name] = started
            for r in self.ended.wait(running) if running else ():
                outcome = self._outcome(r)
                if outcome is None:
                    continue
                del running[r.job.name]
                if isinstance(outcome, BaseException):
                    self._handle_failure(r, outcome, tries[r.job.name], list(running.values()))
                    free = self._replace(r.workers, free)  # all of them: survivors may be blocked in a collective
                    waiting.appendleft(r.job)
                else:
                    if r.job.ranks:
                        self._show_notes(r)
                    free.add(r.workers)
                    yield r.job.name, outcome if r.job.ranks else outcome[0]
            if running and time.monotonic() - shown > STATUS_S * max(1, len(running) / ASKED_AT_ONCE):
                self._show(list(running.values()), waiting, on_tasks)
                shown = time.monotonic()

    def _ranks(self, job: Job) -> int:
        """Workers that a job takes; with elastic no more than there are or will be."""
        return max(1, min(job.ranks, self.cluster.size) if self.resources.elastic else job.ranks)

    def _start(self, job: Job, free: FreeWorkers[Any]) -> _Running:
        """Calls its workers, to see that they answer: one may have died idle, on a node that Ray still lists as alive.

        The workers of one node are taken where a node has enough of them; they leave `free`.
        """
        workers = free.take(self._ranks(job))
        assert workers is not None, "a job starts when enough workers are free"
        running = _Running(job, workers, [worker.free_address.remote() for worker in workers], set())
        self.ended.watch(running)
        return running

    def _give(self, running: _Running, address: str) -> None:
        """Gives a job to workers that have answered; what it is about is sent once, whatever the number of ranks."""
        import ray

        job, workers = running.job, running.workers
        if job.ranks:
            self.on_event("job_begins", job=job.name, ranks=len(workers))
            timeout_s = self.resources.collective_timeout_s
            spec = ray.put(job.spec) if len(workers) > 1 else job.spec
            running.refs = [
                worker.run_rank.remote(job.function, spec, (rank, len(workers), address), timeout_s)
                for rank, worker in enumerate(workers)
            ]
        else:
            running.refs = [workers[0].run.remote(job.function, job.spec)]
        running.begun = True
        self.ended.watch(running)

    def _replace(self, workers: list[Any], free: FreeWorkers[Any]) -> FreeWorkers[Any]:
        """Replaces the workers of a failed job and the idle ones of lost nodes; returns those that are still free."""
        lost = set(self.cluster.lost())
        self.cluster.replace([*workers, *(worker for worker in free if worker in lost)])
        return FreeWorkers(self.cluster.node_of, [worker for worker in free if worker not in lost])

    def _outcome(self, running: _Running) -> Any:
        """None while it runs, its results, or its error: bad input on any rank before the links it breaks."""
        import ray

        finished, pending = ray.wait(running.refs, num_returns=len(running.refs), timeout=0)
        running.pending = set(pending)
        errors = _errors(finished)
        if errors and running.pending:  # the rank at fault may report last; one blocked in a collective never does
            errors = _errors(ray.wait(running.refs, num_returns=len(running.refs), timeout=ERROR_GRACE_S)[0])
        if errors:
            return next((e for e in errors if _is_final(e, running.job)), errors[0])
        if running.pending:
            return None
        answers = ray.get(running.refs)
        if running.begun:
            return answers
        self._give(running, address=answers[0])
        return None

    def _handle_failure(
        self, running: _Running, error: BaseException, tries: _Tries, others: Sequence[_Running]
    ) -> None:
        """Raises when another attempt is pointless, once the other jobs have saved their state."""
        try:
            self._count_attempt(running, error, tries)
        except Exception:
            self._ask_to_stop(others)
            raise

    def _count_attempt(self, running: _Running, error: BaseException, tries: _Tries) -> None:
        job, cause = running.job, getattr(error, "cause", None)
        if cause is not None and _is_final(error, job):
            raise cause from error
        if running.begun:
            tries.attempts, tries.dead_starts = tries.attempts + 1, 0
        else:
            tries.dead_starts += 1
        reason = (str(cause or error).strip() or type(cause or error).__name__).splitlines()[-1]
        self.on_event("job_failed", job=job.name, attempt=tries.attempts, reason=reason)
        if tries.attempts > self.resources.max_restarts:
            raise RuntimeError(f"{job.name} failed {tries.attempts} times, last with: {reason}") from error
        if (
            tries.dead_starts > self.resources.max_restarts + self.cluster.size
        ):  # each may have been on a lost node, once
            raise RuntimeError(
                f"{job.name} cannot begin: {tries.dead_starts} times in a row a worker had died before it was given "
                f"anything to do, last with: {reason}"
            ) from error
        if running.begun:
            self.cluster.log(f"warning: {job.name} failed and is tried again: {reason}")

    def _show(self, running: Sequence[_Running], waiting: Sequence[Job], on_tasks: OnTasks) -> None:
        """Tells what jobs report, with how many of them wait for workers, and what tasks report."""
        statuses = self._statuses(running)
        jobs = {r.job.name for r in running if r.job.ranks}
        more = {"waiting": len(waiting)} if waiting else {}
        if found := {name: status | (more if status else {}) for name, status in statuses.items() if name in jobs}:
            self.on_status(found)
        if tasks := [status for name, status in statuses.items() if name not in jobs]:
            on_tasks(tasks)

    def _show_notes(self, finished: _Running) -> None:
        """Shows what a job that has ended had to say, as it may have ended before anybody asked."""
        notes = {name: status.get("notes") for name, status in self._statuses([finished]).items()}
        self.on_status({name: {"notes": texts} for name, texts in notes.items() if texts})

    def _statuses(self, running: Sequence[_Running]) -> dict[str, Any]:
        import ray

        refs = [r.workers[0].status.options(concurrency_group="control").remote() for r in running]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S) if refs else ([], [])
        statuses = dict[str, Any]()
        for r, ref in zip(running, refs, strict=True):
            try:
                statuses[r.job.name] = ray.get(ref) if ref in ready else {}
            except ray.exceptions.RayError:
                statuses[r.job.name] = {}  # it died just now, which its outcome will show
        return statuses

    def _stop(self, running: Sequence[_Running]) -> None:
        if self._signals.interrupted and not self._signals.at_once:
            self.cluster.log("interrupted: saving; press Ctrl-C again to stop at once")
        raise Terminated(None if self._ask_to_stop(running) else STOP_GRACE_S)

    def _ask_to_stop(self, running: Sequence[_Running]) -> bool:
        """Whether all jobs have stopped by themselves within STOP_GRACE_S, so that their state is saved."""
        import ray

        self.on_event("stopping", jobs=[r.job.name for r in running])
        for r in running:
            for worker in r.workers:
                worker.stop.options(concurrency_group="control").remote()
        refs = [ref for r in running if r.job.ranks for ref in r.refs]
        end = time.monotonic() + STOP_GRACE_S
        errors: list[BaseException] = []
        while refs and time.monotonic() < end and not self._signals.at_once:
            ended, refs = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
            errors += _errors(ended)
        return not refs and not errors


def _with_ended_calls(running: Iterable[_Running]) -> list[_Running]:
    """Those of which a call has ended that was pending, by one call to Ray for all of them."""
    import ray

    pending = {ref: r for r in running for ref in r.pending}
    if not pending:
        return []
    ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
    return list(dict.fromkeys(pending[ref] for ref in ended))


def _errors(finished: Sequence[Any]) -> list[BaseException]:
    """The errors of the finished calls that failed: what they raised, or the death of their process."""
    import ray

    errors: list[BaseException] = []
    for ref in finished:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            errors.append(error)
    return errors


def _is_final(error: BaseException, job: Job) -> bool:
    """Whether another attempt would not help: an error of a rank itself, not a dead process or a broken connection.

    Errors of a file system or a store are not final either, as they may pass; that it is full or read-only is.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, OSError) and cause.errno in WITHOUT_SPACE:
        return True
    passing = (OSError, RuntimeError) if job.ranks > 1 else OSError
    return cause is not None and not isinstance(cause, passing)
