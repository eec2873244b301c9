"""Runs tasks and jobs on the workers: which goes where, what is tried again, how all of it stops.

What signals ask of a run: SIGTERM and Ctrl-C to save and end, a second Ctrl-C to end at once.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Interrupted, Terminated
from grappa_dist.distributed.placement import check_capacity, choose
from grappa_dist.distributed.preflight import Checks
from grappa_dist.distributed.ray_cluster import Cluster


@dataclass
class Signals:
    """Heard in the main thread."""

    looked_for: bool = False  # somebody asks `ending` now and then: what a handler raises while Ray waits may be lost
    _asked: bool = False
    _interrupts: int = 0

    def ending(self) -> bool:
        """Whether the run is to save and end."""
        return self._asked

    @property
    def interrupted(self) -> bool:
        return self._interrupts > 0

    @property
    def at_once(self) -> bool:
        """Whether nobody is to be waited for."""
        return self._interrupts > 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While inside, SIGTERM raises Terminated and Ctrl-C Interrupted, at once or where they are looked for."""

        def handle(number: int, _: object) -> None:
            self._asked = True
            self._interrupts += number == signal.SIGINT
            if not self.looked_for:
                raise Terminated

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if before[signal.SIGINT] == signal.SIG_IGN:  # as a shell has it for what runs in the background
            del before[signal.SIGINT]
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


POLL_S = 0.5
STATUS_S = 5.0
STOP_GRACE_S = 60.0
ERROR_GRACE_S = 2.0


@dataclass(frozen=True)
class Job:
    """`function(context, spec)` on `ranks` workers at once, in a process group of their own.

    With no ranks it is a task, `function(device, spec)` in one worker and without a group.
    """

    name: str
    function: Callable[[Any, Any], Any]
    spec: Any
    ranks: int


@dataclass
class _Running:
    job: Job
    workers: list[Any]
    refs: list[Any]  # one call of each worker: whether it is there, then the work
    pending: list[Any]  # those of them that had not ended when they were last looked at
    begun: bool = False  # whether all were there, and have been given the work


@dataclass
class _Tries:
    """Of one job."""

    attempts: int = 0  # in which it was given to its workers and failed
    in_vain: int = 0  # starts since then that found a worker dead which had nothing to do


@dataclass
class Runner:
    """Runs things on the cluster's workers, one stage at a time."""

    cluster: Cluster
    resources: Resources
    on_status: Callable[[Mapping[str, Mapping[str, Any]]], None] = lambda status: None
    on_event: Callable[..., None] = lambda name, **figures: None
    on_interrupt: Callable[[str], None] = lambda text: None  # told what Ctrl-C does, while jobs save
    _signals: Signals = field(default_factory=Signals)

    def terminating(self) -> AbstractContextManager[None]:
        """While inside, SIGTERM raises Terminated, after running jobs have stopped at their next step and saved, or
        have had a minute for it.

        Ctrl-C raises Interrupted likewise; pressed again, it waits for no job.
        """
        return self._signals.heard()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """While inside, signals are noted and looked for; at the latest the end raises Terminated."""
        self.cluster.connect()  # where Ray listens to it
        self.cluster.stopping = self._signals.ending
        self._signals.looked_for = True
        try:
            yield
        finally:
            self._signals.looked_for = False
        if self._signals.ending():
            raise Terminated

    def require(self, checks: Checks) -> None:
        """What every node must pass before it works."""
        self.cluster.checks = checks

    @property
    def num_workers(self) -> int:
        with self._watched():
            return len(self.cluster.gather())

    @property
    def sharing(self) -> int:
        """Workers on the node that has the most of them."""
        with self._watched():
            nodes = [self.cluster.node_of(worker) for worker in self.cluster.gather()]
        return max(map(nodes.count, nodes), default=1)

    def map(
        self,
        function: Callable[[Any, Any], Any],
        tasks: Sequence[Any],
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Any]:
        """Results of `function(device, task)` in order; a task whose process died is tried again elsewhere."""
        jobs = [Job(f"{function.__name__} {i}", function, task, 0) for i, task in enumerate(tasks)]
        count = iter(range(1, len(tasks) + 1))
        results = self._run(jobs, lambda _: done(next(count)))
        return [results[job.name] for job in jobs]

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        """Every rank's result per job; jobs run side by side as far as the workers go, and restart apart."""
        return self._run(jobs, done)

    def _run(self, jobs: Sequence[Job], done: Callable[[str], None]) -> dict[str, Any]:
        with self._watched():
            self.cluster.gather()
            return self._watch(jobs, done)

    def _watch(self, jobs: Sequence[Job], done: Callable[[str], None]) -> dict[str, Any]:
        import ray

        waiting, tries = deque(jobs), {job.name: _Tries() for job in jobs}
        free, running, results = list(self.cluster.workers()), list[_Running](), dict[str, Any]()
        if not self.resources.elastic:
            check_capacity(len(free), max((job.ranks for job in jobs), default=0))
        shown = time.monotonic()
        while waiting or running:
            if self._signals.ending():
                self._stop(running)
            free += self.cluster.arrived(timeout_s=0 if running else POLL_S)
            while waiting and len(free) >= self._ranks(waiting[0]):
                running.append(self._start(waiting.popleft(), free))
            if running:
                ray.wait([ref for r in running for ref in r.pending], timeout=POLL_S)
            for r in list(running):
                outcome = self._outcome(r)
                if outcome is None:
                    continue
                running.remove(r)
                if isinstance(outcome, BaseException):
                    self._failed(r, outcome, tries[r.job.name], running)
                    free = self._replace(r.workers, free)  # all of them: survivors may sit in a collective
                    waiting.appendleft(r.job)
                else:
                    free += r.workers
                    results[r.job.name] = outcome if r.job.ranks else outcome[0]
                    done(r.job.name)
            if running and time.monotonic() - shown > STATUS_S:
                self.on_status(self._statuses(running))
                shown = time.monotonic()
        return results

    def _ranks(self, job: Job) -> int:
        """Workers that a job takes; with elastic no more than there will be."""
        return max(1, min(job.ranks, self.cluster.size) if self.resources.elastic else job.ranks)

    def _start(self, job: Job, free: list[Any]) -> _Running:
        """Asks its workers whether they are there: one may have died idle, on a node that Ray still takes for alive."""
        workers = self._take(free, self._ranks(job))
        asked = [worker.free_address.remote() for worker in workers]
        return _Running(job, workers, asked, asked)

    def _give(self, running: _Running, address: str) -> None:
        """Gives a job to workers that are there."""
        job, workers = running.job, running.workers
        if job.ranks:
            self.on_event("job_begins", job=job.name, ranks=len(workers))
            timeout_s = self.resources.collective_timeout_s
            running.refs = [
                worker.run_rank.remote(job.function, job.spec, (rank, len(workers), address), timeout_s)
                for rank, worker in enumerate(workers)
            ]
        else:
            running.refs = [workers[0].run.remote(job.function, job.spec)]
        running.begun, running.pending = True, running.refs

    def _take(self, free: list[Any], ranks: int) -> list[Any]:
        """The workers for a job, of one node where one has enough of them; they leave `free`."""
        chosen = choose([self.cluster.node_of(worker) for worker in free], ranks)
        assert chosen is not None, "a job starts when enough workers are free"
        return [free.pop(i) for i in reversed(chosen)][::-1]

    def _replace(self, workers: list[Any], free: list[Any]) -> list[Any]:
        """Starts others for the workers of a job that failed, and for idle ones of lost nodes; who is free then."""
        lost = set(self.cluster.lost())
        self.cluster.replace([*workers, *(worker for worker in free if worker in lost)])
        return [worker for worker in free if worker not in lost]

    def _outcome(self, running: _Running) -> Any:
        """None while it runs, its results, or why it failed: bad input on any rank before the dead links it causes."""
        import ray

        finished, running.pending = ray.wait(running.refs, num_returns=len(running.refs), timeout=0)
        errors = _errors(finished)
        if errors and running.pending:  # the rank at fault may speak last; one that sits in a collective never does
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

    def _failed(
        self, running: _Running, error: BaseException, tries: _Tries, others: Sequence[_Running] = ()
    ) -> None:  # fmt: skip
        """Raises when another attempt makes no sense, once the others have saved their state."""
        try:
            self._count(running, error, tries)
        except Exception:
            self._ask_to_stop(others)
            raise

    def _count(self, running: _Running, error: BaseException, tries: _Tries) -> None:
        job, cause = running.job, getattr(error, "cause", None)
        if cause is not None and _is_final(error, job):
            raise cause from error
        if running.begun:
            tries.attempts, tries.in_vain = tries.attempts + 1, 0
        else:
            tries.in_vain += 1
        reason = (str(cause or error).strip() or type(cause or error).__name__).splitlines()[-1]
        self.on_event("job_failed", job=job.name, attempt=tries.attempts, reason=reason)
        if tries.attempts > self.resources.max_restarts:
            raise RuntimeError(f"{job.name} failed {tries.attempts} times, last with: {reason}") from error
        if tries.in_vain > self.resources.max_restarts + self.cluster.size:  # each may have been on a lost node, once
            raise RuntimeError(
                f"{job.name} cannot begin: {tries.in_vain} times in a row a worker had died before it was given "
                f"anything to do, last with: {reason}"
            ) from error

    def _statuses(self, running: Sequence[_Running]) -> dict[str, Any]:
        import ray

        jobs = [r for r in running if r.job.ranks]
        refs = [r.workers[0].status.options(concurrency_group="control").remote() for r in jobs]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S) if refs else ([], [])
        statuses = dict[str, Any]()
        for r, ref in zip(jobs, refs, strict=True):
            try:
                statuses[r.job.name] = ray.get(ref) if ref in ready else {}
            except ray.exceptions.RayError:
                statuses[r.job.name] = {}  # it died just now; its outcome says so
        return statuses

    def _stop(self, running: Sequence[_Running]) -> None:
        if self._signals.interrupted and not self._signals.at_once:
            self.on_interrupt("interrupted: saving; press Ctrl-C again to stop at once")
        raise Terminated(None if self._ask_to_stop(running) else STOP_GRACE_S)

    def _ask_to_stop(self, running: Sequence[_Running]) -> bool:
        """Whether the jobs have all stopped by themselves in the time that they have, so that their state is saved."""
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


def _errors(finished: Sequence[Any]) -> list[BaseException]:
    """What those of the finished calls raised that failed, or the death of their process."""
    import ray

    errors: list[BaseException] = []
    for ref in finished:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            errors.append(error)
    return errors


def _is_final(error: BaseException, job: Job) -> bool:
    """Whether trying again would not help: what a rank raised by itself, not a dead process or the links it cut.

    Nor what a file system or a store did, which may do better next time.
    """
    cause = getattr(error, "cause", None)
    passing = (OSError, RuntimeError) if job.ranks > 1 else OSError
    return cause is not None and not isinstance(cause, passing)
