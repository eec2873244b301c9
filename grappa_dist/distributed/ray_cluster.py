"""The workers of a run in a Ray cluster: that of RAY_ADDRESS, or a local one that the run starts and ends.

Ray places the workers and monitors them. Dead workers are replaced; with `resources.elastic` a run goes on without
those that no node can hold any more. How many workers the nodes can hold is computed from Ray's description of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Terminated, pluralize
from grappa_dist.distributed.connection import connect, is_connected, is_local
from grappa_dist.distributed.local_ray import LocalRay
from grappa_dist.distributed.placement import check_capacity, cpus_per_worker, decode_threads
from grappa_dist.distributed.preflight import Checks, Facts, answered, problems, remarks, token_in, versions
from grappa_dist.distributed.worker import Worker

SURVEY_TIMEOUT_S = 60.0  # a storage that hangs must not hang the run
BACKBONE_TIMEOUT_S = 600.0  # to import timm and read some gigabytes of weights, on all nodes at once
DEATH_POLL_S = 0.1
START_ATTEMPTS = 3  # Ray may place a worker on a node that has died without Ray having noticed


@dataclass(frozen=True)
class _Start:
    """A worker that is starting."""

    ready: Any  # the call that returns once it is up
    since: float
    attempt: int = 1


@dataclass
class Cluster:
    """A connection to Ray and our workers in it, made on first use: a run that reuses everything starts none."""

    resources: Resources
    checks: Checks | None = None  # what every node must pass before it works
    log: Callable[[str], None] = lambda text: None
    on_phase: Callable[[str, str], None] = lambda what, text: None  # what is waited for, and how it comes along
    stopping: Callable[[], bool] = lambda: False  # whether to stop waiting, because of a signal
    local: LocalRay | None = None  # one that this run has started and ends
    facts: dict[str, Facts] = field(default_factory=dict)  # of the nodes that passed, by node id
    _refused: set[str] = field(default_factory=set)  # nodes that joined later and did not pass
    _gpus: float = 0.0  # per worker, by the nodes at the start: it stays when only CPU nodes are left
    _cpus: int = 1  # per worker, by the nodes at the last start of some
    _begun: bool = False
    _restarts: int = 0  # of a local Ray
    _node_of: dict[Any, str] | None = None  # workers that are up -> the ids of their nodes; None before the start
    _arriving: dict[Any, _Start] = field(default_factory=dict)

    def connect(self) -> None:
        """Connects to Ray unless that is done; starts no workers.

        Raises:
            ValueError: no Ray that this run can use answers at RAY_ADDRESS.
            RuntimeError: a local Ray did not start.
            Terminated: SIGTERM came meanwhile.
        """
        if not is_connected():
            address = os.environ.get("RAY_ADDRESS", "")
            self.on_phase("Ray", "starts on this machine" if is_local(address) else f"connecting to {address}")
        self.local = connect(self.resources, self.log) or self.local

    def ray_has_died(self, patience_s: float = 0.0) -> bool:
        """Whether a local Ray can no longer be used.

        Args:
            patience_s: how long to wait for it to die, after an error that its death may have caused.
        """
        end = time.monotonic() + patience_s
        while self.local is not None:
            if self.local.dead():
                return True
            if time.monotonic() >= end:
                break
            time.sleep(DEATH_POLL_S)
        return False

    def check_ray(self) -> None:
        """Raises RuntimeError when a local Ray has died: calls to it may take minutes to fail."""
        if self.ray_has_died():
            raise RuntimeError("Ray on this machine has died; run the same command again to go on")

    def restart_ray(self) -> None:
        """Replaces a local Ray that has died; its workers are gone, and `gather` starts others.

        Raises:
            RuntimeError: that has happened more often than resources.max_restarts.
        """
        assert self.local is not None
        part = self.local.dead()
        self.local.end()
        self.local, self._node_of, self._arriving, self.facts = None, None, {}, {}
        if self._restarts == self.resources.max_restarts:
            raise RuntimeError(
                f"Ray on this machine has died {self._restarts + 1} times, the last time its {part}; is memory short? "
                "What is finished is kept: run the same command again to go on"
            )
        self._restarts += 1
        self.log(f"Ray's {part} on this machine has died; starting Ray again and going on from what is saved")

    def workers(self) -> list[Any]:
        """The worker actors that are up.

        Raises:
            ValueError: the cluster cannot hold them or a node cannot take part, with what is missing.
            Terminated: `stopping` before they are up.
        """
        if self._node_of is None:
            self.connect()
            nodes = _alive()
            self._gpus = gpus_per_worker(nodes, self.resources)
            count = workers_to_start(nodes, self.resources)
            self.on_phase("workers", f"{count} to start")
            self._start(count)
            self._node_of = {}
            self._settle()
            self._begun = True
        return list(self._node_of)

    def has_gpus(self) -> bool:
        """Whether workers have GPUs, by the nodes of the cluster."""
        self.connect()
        return bool(gpus_per_worker(_alive(), self.resources))

    def node_of(self, worker: Any) -> str:
        """The id of a worker's node, so that the ranks of a job can share a node."""
        assert self._node_of is not None
        return self._node_of[worker]

    def describe_nodes(self) -> list[dict[str, Any]]:
        """What the workers that are up run on: nodes that are alike together, with their number and that of workers."""
        nodes = Counter((self._node_of or {}).values())  # workers of each
        alike: dict[str, list[int]] = {}
        for node, workers in nodes.items():
            machine = self.facts[node].machine if node in self.facts else ""
            alike.setdefault(machine, []).append(workers)
        return [{"machine": m, "nodes": len(w), "workers": sum(w)} for m, w in sorted(alike.items())]

    @property
    def started(self) -> bool:
        """Whether workers were started."""
        return self._node_of is not None

    @property
    def size(self) -> int:
        """Workers that are up or starting."""
        return len(self._node_of or {}) + len(self._arriving)

    def gather(self) -> list[Any]:
        """The workers for a stage: those of lost nodes are replaced; with elastic, nodes that have joined are used.

        Raises:
            RuntimeError: replacements cannot be placed within placement_timeout_s; with elastic, not a single worker.
            Terminated: `stopping` before they are up.
        """
        self.workers()
        assert self._node_of is not None
        lost = self.lost()
        if lost or self.resources.elastic:
            self.replace(lost)
        self._settle()
        return list(self._node_of)

    def lost(self) -> list[Any]:
        """The workers that were up on nodes that are gone."""
        alive = {node["NodeID"] for node in _alive()}
        return [worker for worker, node in (self._node_of or {}).items() if node not in alive]

    def replace(self, workers: Sequence[Any]) -> None:
        """Ends workers that died or must end, and starts others, which `arrived` returns once they are up."""
        import ray

        assert self._node_of is not None
        for worker in workers:
            ray.kill(worker)
            self._node_of.pop(worker, None)
        count = len(workers)
        if self.resources.elastic:  # what the nodes can hold, and at least one: a node may come back
            count = max(self._capacity() - self.size, 0 if self.size else 1)
            change = count - len(workers)
            if change:
                self.log(f"workers: {self.size + len(workers)} become {self.size + count}")
        self._start(count)

    def arrived(self, timeout_s: float = 0.0) -> list[Any]:
        """Workers that have come up since the last call, after the checks of their nodes.

        Raises:
            ValueError, or RuntimeError after the start: one is not up in time or cannot start, or its node cannot
                take part; with elastic and after the start only when no worker is left.
        """
        import ray

        if not self._arriving:
            return []
        assert self._node_of is not None
        refs = {start.ready: worker for worker, start in self._arriving.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
        up: dict[Any, str] = {}
        for ref in ready:
            try:
                up[refs[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                self._start_again(refs[ref], str(error).strip().splitlines()[-1])
        self._give_up_late(set(up))
        if not self._begun and len(up) < len(self._arriving):  # at the start all nodes are checked together
            return []
        problem = self._check(up)
        if problem and not self._begun:
            raise ValueError(problem)
        if problem:
            self._give_up([worker for worker, node in up.items() if node in self._refused], problem)
        passed = {worker: node for worker, node in up.items() if node not in self._refused}
        for worker in passed:
            del self._arriving[worker]
        self._node_of |= passed
        return list(passed)

    def close(self) -> None:
        """Ends our workers, and the local cluster if this run started it."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if not self.ray_has_died():  # it would not answer
            for worker in [*(self._node_of or {}), *self._arriving]:
                ray.kill(worker)
        self._node_of, self._arriving = None, {}
        if self.local:
            self.local.end()
            self.local = None
        else:
            ray.shutdown()

    def _settle(self) -> None:
        """Waits until no worker is starting any more."""
        while self._arriving:
            if self.stopping():
                raise Terminated
            self.check_ray()
            self.arrived(timeout_s=1.0)

    def _await(self, refs: list[Any], patience_s: float) -> None:
        """Waits until all have ended, at most `patience_s`."""
        import ray

        end = time.monotonic() + patience_s
        while refs and (left := end - time.monotonic()) > 0:
            if self.stopping():
                raise Terminated
            self.check_ray()
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=min(1.0, left))

    def _capacity(self) -> int:
        """Workers that the nodes can hold, at most as many as the settings ask for."""
        nodes = [node for node in _alive() if node["NodeID"] not in self._refused]
        return usable_workers(nodes, self.resources, self._gpus)

    def _start(self, count: int) -> None:
        self._cpus = cpus_per_worker(self.resources, _sizes(_alive()))
        for _ in range(count):
            worker = self._new_worker()
            self._arriving[worker] = _Start(worker.ready.remote(), time.monotonic())

    def _start_again(self, worker: Any, why: str) -> None:
        failed = self._arriving[worker]
        if failed.attempt == START_ATTEMPTS:
            self._give_up([worker], f"a worker cannot start: {why}")
            return
        del self._arriving[worker]
        fresh = self._new_worker()
        self._arriving[fresh] = _Start(fresh.ready.remote(), failed.since, failed.attempt + 1)

    def _new_worker(self) -> Any:
        import ray

        actor: Any = ray.remote(concurrency_groups={"control": 2})(Worker)  # type: ignore[call-overload]
        where = self.resources
        threads = self._cpus if where.threads == "auto" else where.threads
        reading = decode_threads(where, self._cpus, gpu=bool(self._gpus))
        return actor.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            # The second: no Python that a worker starts may import from the current directory first
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}},
        ).remote(threads, self._gpus, reading, copies_bytes=where.copies_bytes)

    def _give_up_late(self, up: set[Any]) -> None:
        """Gives up late workers; with elastic also, at once, those whose node turns out to be gone."""
        now = time.monotonic()
        late = {worker: now - start.since for worker, start in self._arriving.items() if worker not in up}
        limit = self.resources.placement_timeout_s
        over = [worker for worker, age in late.items() if age > limit]
        if over:
            why = f"{len(over)} of {self.size} workers did not start within {limit:g} s; "
            self._give_up(over, why + "are other jobs holding the cluster's CPUs or GPUs, or is a node gone?")
        elif self.resources.elastic and self._begun and late:
            surplus = min(self.size - self._capacity(), self.size - 1, len(late))
            if surplus > 0:
                self._give_up(list(late)[-surplus:], f"{pluralize(surplus, 'worker')} no longer fit the nodes")

    def _give_up(self, workers: Sequence[Any], why: str) -> None:
        import ray

        for worker in workers:
            ray.kill(worker)
            del self._arriving[worker]
        if not (self.resources.elastic and self.size):
            raise RuntimeError(why) if self._begun else ValueError(why)
        self.log(f"workers: {why}; going on with {self.size}")

    def _check(self, up: dict[Any, str]) -> str:
        """Surveys each new node through one of its workers; what is wrong and on which node, or ""."""
        new = {node: worker for worker, node in up.items() if node not in self.facts}
        if self.checks is None or not new:
            return ""
        sharing = Counter([*up.values(), *(self._node_of or {}).values()])
        with token_in(self.checks.root) if self.checks.writes else nullcontext() as token:
            calls = {n: w.survey.remote(self.checks, token, n, sharing[n]) for n, w in new.items()}
            self._await(list(calls.values()), SURVEY_TIMEOUT_S)  # all at once: several may hang
            found = {node: answered(token, node, _facts(node, ref)) for node, ref in calls.items()}
        found = self._compare_backbones(found, new)
        wrong = {node: problems(versions(), [facts], self.checks.worker_bytes) for node, facts in found.items()}
        self._refused = {*self._refused, *wrong} - {node for node, lines in wrong.items() if not lines}
        self.facts |= {node: facts for node, facts in found.items() if not wrong[node]}
        in_order = sorted(found.values(), key=lambda facts: facts.node)
        for line in remarks(in_order):
            self.log(f"warning: preflight: {line}")
        lines = problems(versions(), in_order, self.checks.worker_bytes)
        return f"preflight: {'; '.join(lines)}" if lines else ""

    def _compare_backbones(self, found: Mapping[str, Facts], workers: Mapping[str, Any]) -> dict[str, Facts]:
        """The facts with what came of building the backbone on the nodes that have no problem so far."""
        assert self.checks is not None
        if self.checks.backbone is None:
            return dict(found)
        sound = [node for node, facts in found.items() if not problems(versions(), [facts], self.checks.worker_bytes)]
        calls = {node: workers[node].compare_backbone.remote(self.checks) for node in sound}
        self._await(list(calls.values()), BACKBONE_TIMEOUT_S)
        whys = {node: _backbone(ref) for node, ref in calls.items()}
        return {node: replace(facts, backbone=whys.get(node, "")) for node, facts in found.items()}


def _backbone(ref: Any) -> str:
    import ray

    try:
        why: str = ray.get(ref, timeout=0)
        return why
    except ray.exceptions.GetTimeoutError:
        return f"the backbone is not built within {BACKBONE_TIMEOUT_S:.0f} s; does the storage of its weights hang?"
    except ray.exceptions.RayError as error:
        return f"the backbone cannot be built: {str(error).strip().splitlines()[-1]}"


def _facts(node: str, ref: Any) -> Facts:
    import ray

    try:
        facts: Facts = ray.get(ref, timeout=0)
        return facts
    except ray.exceptions.GetTimeoutError:
        why = f"no answer within {SURVEY_TIMEOUT_S:.0f} s; does its storage hang?"
    except ray.exceptions.RayError as error:
        why = f"its checks failed: {str(error).strip().splitlines()[-1]}"
    return Facts(next((str(n["NodeManagerHostname"]) for n in _alive() if n["NodeID"] == node), node), storage=why)


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _sizes(nodes: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """CPUs and GPUs of each living node."""
    have = [node["Resources"] for node in nodes if node["Alive"]]
    return [(of_node.get("CPU", 0.0), of_node.get("GPU", 0.0)) for of_node in have]


def worker_capacity(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many workers of `cpus` and `gpus` each the living nodes can hold; no worker spans two nodes.

    Args:
        nodes: as `ray.nodes()` describes them, here and below.
    """
    return sum(
        min(int(have.get(name, 0) / need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need)
        for have in (node["Resources"] for node in nodes if node["Alive"])
    )


def gpus_per_worker(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> float:
    """`resources.gpus_per_worker`, with `auto` resolved: 1 where any node has a GPU."""
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1.0 if any(node["Alive"] and node["Resources"].get("GPU", 0) for node in nodes) else 0.0


def usable_workers(nodes: Iterable[Mapping[str, Any]], resources: Resources, gpus: float) -> int:
    """Workers that the nodes can hold, at most `resources.workers`."""
    nodes = list(nodes)
    fit = worker_capacity(nodes, cpus_per_worker(resources, _sizes(nodes)), gpus)
    return fit if resources.workers == "auto" else min(fit, resources.workers)


def workers_to_start(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> int:
    """Workers to start on these nodes.

    Raises:
        ValueError: they do not fit, or are fewer than a job has ranks; with resources.elastic only if none fits.
    """
    nodes = [node for node in nodes if node["Alive"]]
    # GPUs first: CPUs may be a part of theirs
    need = {"GPU": gpus_per_worker(nodes, resources), "CPU": float(cpus_per_worker(resources, _sizes(nodes)))}
    fit = worker_capacity(nodes, need["CPU"], need["GPU"])
    count = max(1, fit) if resources.workers == "auto" else resources.workers
    if fit < count and not (resources.elastic and fit):
        raise ValueError(_shortage(nodes, count, need, fit))
    count = min(count, fit)
    if not resources.elastic:
        check_capacity(count, resources.adapt_ranks)
    return count


def _shortage(nodes: Iterable[Mapping[str, Any]], count: int, need: Mapping[str, float], fit: int) -> str:
    """What is missing: CPUs or GPUs in total, or enough of them on single nodes."""
    nodes = list(nodes)
    for name, each in need.items():
        have = sum(node["Resources"].get(name, 0) for node in nodes)
        if count * each > have:
            return (
                f"{pluralize(count, 'worker needs', 'workers need')} {count * each:g} {name}, the Ray cluster "
                f"has {have:g}; "
                f"lower resources.workers or resources.{name.lower()}s_per_worker"
            )
    shares = ", ".join(
        f"{node['NodeManagerHostname']} {node['Resources'].get('CPU', 0):g} CPU {node['Resources'].get('GPU', 0):g} GPU"
        for node in nodes
    )
    return (
        f"{pluralize(count, 'worker')} of {need['CPU']:g} CPU and {need['GPU']:g} GPU "
        f"{'does' if count == 1 else 'do'} not fit: the nodes can hold {fit} "
        f"({shares}); lower resources.workers or resources.cpus_per_worker"
    )
