"""The workers of a run: Ray places and watches them; what died is replaced, what is gone is done without if allowed.

How many workers the nodes of a cluster hold. Pure: nodes are given as Ray describes them.

The connection to Ray: the cluster of RAY_ADDRESS, or a local one that is ours.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Terminated
from grappa_dist.distributed.placement import check_capacity
from grappa_dist.distributed.preflight import Checks, Facts, answered, problems, token_in, versions
from grappa_dist.distributed.worker import Worker

CONNECT_TIMEOUT_S = 5.0
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`


def check_faiss() -> None:
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("faiss is not installed; install grappa-dist[cpu], or grappa-dist[gpu] where there are GPUs")


def check_answers(address: str) -> None:
    """Raises ValueError when nobody listens at host:port, which Ray itself would wait minutes for."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ValueError(f"RAY_ADDRESS={address} does not answer: {error.strerror or error}") from None


def connect(resources: Resources) -> Path | None:
    """Connects unless that is done; the temporary folder of a local cluster, which is ours to end.

    Raises:
        ValueError: nobody answers at RAY_ADDRESS, or it runs other versions of Ray or Python.
        Terminated: SIGTERM or Ctrl-C came meanwhile.
    """
    import ray

    if ray.is_initialized():
        return None
    check_faiss()
    handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in place
    try:
        if not os.environ.get("RAY_ADDRESS"):
            return _start(ray, resources)
        _join(ray)
        return None
    except SystemExit:  # of Ray's own handler
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}


def _paths() -> str:
    return os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path if "site-packages" not in p))


def _join(ray: Any) -> None:
    submitted = SUBMITTED_JOB in os.environ  # then its runtime environment is set, and its folder importable
    environment = None if submitted else {"env_vars": {"PYTHONPATH": _paths()}}
    check_answers(os.environ["RAY_ADDRESS"])
    try:
        ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=environment, **_quiet())
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ValueError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {' '.join(str(error).split())}") from None


def _start(ray: Any, resources: Resources) -> Path:
    # Without this Ray writes a token that later clusters of this user want.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["PYTHONPATH"] = _paths()
    owned = Path(tempfile.mkdtemp(prefix="grappa-", dir="/tmp"))  # short: sockets live in it
    try:
        ray.init(
            address="local",
            num_cpus=resources.num_cpus,
            include_dashboard=False,
            object_store_memory=2**28,  # big arrays go through storage
            _temp_dir=str(owned),
            **_quiet(),
        )
    except BaseException:  # a signal may come meanwhile
        shutil.rmtree(owned, ignore_errors=True)
        raise
    return owned


def room(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Workers of so many CPUs and GPUs that fit the nodes that are alive; none spans two nodes."""
    return sum(
        min(int(have.get(name, 0) / need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need)
        for have in (node["Resources"] for node in nodes if node["Alive"])
    )


def gpus_per_worker(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> float:
    """What resources.gpus_per_worker comes to on these nodes."""
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1.0 if any(node["Alive"] and node["Resources"].get("GPU", 0) for node in nodes) else 0.0


def fitting(nodes: Iterable[Mapping[str, Any]], resources: Resources, gpus: float) -> int:
    """Workers that there is room for, as many as are wanted at most."""
    fit = room(nodes, resources.cpus_per_worker, gpus)
    return fit if resources.workers == "auto" else min(fit, resources.workers)


def planned(nodes: Iterable[Mapping[str, Any]], resources: Resources) -> int:
    """Workers to start on these nodes.

    Raises:
        ValueError: they do not fit, or are fewer than a job has ranks; not with resources.elastic, as long as one does.
    """
    nodes = [node for node in nodes if node["Alive"]]
    need = {"CPU": resources.cpus_per_worker, "GPU": gpus_per_worker(nodes, resources)}
    fit = room(nodes, need["CPU"], need["GPU"])
    count = max(1, fit) if resources.workers == "auto" else resources.workers
    if fit < count and not (resources.elastic and fit):
        raise ValueError(_lack(nodes, count, need, fit))
    count = min(count, fit)
    if not resources.elastic:
        check_capacity(count, resources.adapt_ranks)
    return count


def _lack(nodes: Iterable[Mapping[str, Any]], count: int, need: Mapping[str, float], fit: int) -> str:
    """What is missing: the sum of something, or room for whole workers on single nodes."""
    nodes = list(nodes)
    for name, each in need.items():
        have = sum(node["Resources"].get(name, 0) for node in nodes)
        if count * each > have:
            return (
                f"{count} workers need {count * each:g} {name}, the Ray cluster has {have:g}; "
                f"lower resources.workers or resources.{name.lower()}s_per_worker"
            )
    shares = ", ".join(
        f"{node['NodeManagerHostname']} {node['Resources'].get('CPU', 0):g} CPU {node['Resources'].get('GPU', 0):g} GPU"
        for node in nodes
    )
    return (
        f"{count} workers of {need['CPU']:g} CPU and {need['GPU']:g} GPU do not fit: there is room for {fit} "
        f"({shares}); lower resources.workers or resources.cpus_per_worker"
    )


SURVEY_TIMEOUT_S = 60.0  # a storage that hangs must not hang the run
START_ATTEMPTS = 3  # Ray may place a worker on a node of whose death it has not heard


@dataclass(frozen=True)
class _Start:
    """A worker on its way."""

    ready: Any  # the call that it answers once it is up
    since: float
    attempt: int = 1


@dataclass
class Cluster:
    """A connection to Ray and our workers in it, started on first use: a run that reuses everything starts none."""

    resources: Resources
    checks: Checks | None = None  # what every node must pass before it works
    log: Callable[[str], None] = lambda text: None
    stopping: Callable[[], bool] = lambda: False  # whether to give up waiting: a signal has come
    owned: Path | None = None  # temp folder of a local cluster that is ours to end
    facts: dict[str, Facts] = field(default_factory=dict)  # of the nodes that passed, by node id
    _refused: set[str] = field(default_factory=set)  # nodes that joined later and did not pass
    _gpus: float = 0.0  # per worker, of the nodes at the start: CPU nodes that outlive all others change nothing
    _begun: bool = False
    _node_of: dict[Any, str] | None = None  # workers that are up, and the ids of their nodes
    _arriving: dict[Any, _Start] = field(default_factory=dict)

    def connect(self) -> None:
        """Connects to Ray unless that is done; starts no workers.

        Raises:
            ValueError: nobody answers at RAY_ADDRESS, or it runs other versions.
            Terminated: SIGTERM came meanwhile.
        """
        self.owned = connect(self.resources) or self.owned

    def workers(self) -> list[Any]:
        """The worker actors that are up.

        Raises:
            ValueError: the cluster cannot hold them or a node cannot take part, saying what is missing.
            Terminated: `stopping` before they are up.
        """
        if self._node_of is None:
            self.connect()
            nodes = _alive()
            self._gpus = gpus_per_worker(nodes, self.resources)
            self._start(planned(nodes, self.resources))
            self._node_of = {}
            self._settle()
            self._begun = True
        return list(self._node_of)

    def node_of(self, worker: Any) -> str:
        """The node that a worker lies on, so that the ranks of a job can be neighbours."""
        assert self._node_of is not None
        return self._node_of[worker]

    @property
    def size(self) -> int:
        """Workers that are up or on their way."""
        return len(self._node_of or {}) + len(self._arriving)

    def gather(self) -> list[Any]:
        """The workers for a stage: those of nodes that are gone are replaced; with elastic, nodes that joined serve.

        Raises:
            RuntimeError: there is no room for the replacements within placement_timeout_s; with elastic, for none.
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
        """The workers that were up on nodes which are gone."""
        alive = {node["NodeID"] for node in _alive()}
        return [worker for worker, node in (self._node_of or {}).items() if node not in alive]

    def replace(self, workers: Sequence[Any]) -> None:
        """Ends workers that died or must end, and starts others in their place: they show in `arrived`."""
        import ray

        assert self._node_of is not None
        for worker in workers:
            ray.kill(worker)
            self._node_of.pop(worker, None)
        count = len(workers)
        if self.resources.elastic:  # what there is room for, and one in any case: a node may come back
            count = max(self._room() - self.size, 0 if self.size else 1)
            change = count - len(workers)
            if change:
                self.log(f"workers: {self.size + len(workers)} become {self.size + count}")
        self._start(count)

    def arrived(self, timeout_s: float = 0.0) -> list[Any]:
        """Workers that have come up since, after the checks of their nodes.

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
        trouble = self._check(up)
        if trouble and not self._begun:
            raise ValueError(trouble)
        if trouble:
            self._give_up([worker for worker, node in up.items() if node in self._refused], trouble)
        passed = {worker: node for worker, node in up.items() if node not in self._refused}
        for worker in passed:
            del self._arriving[worker]
        self._node_of |= passed
        return list(passed)

    def close(self) -> None:
        """Ends our workers, and the local cluster if it is ours."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        for worker in [*(self._node_of or {}), *self._arriving]:
            ray.kill(worker)
        self._node_of, self._arriving = None, {}
        ray.shutdown()
        if self.owned:
            shutil.rmtree(self.owned, ignore_errors=True)

    def _settle(self) -> None:
        """Waits until nobody is on their way any more."""
        while self._arriving:
            if self.stopping():
                raise Terminated
            self.arrived(timeout_s=1.0)

    def _await(self, refs: list[Any], patience_s: float) -> None:
        """Waits until all have ended, as long as patience lasts."""
        import ray

        end = time.monotonic() + patience_s
        while refs and (left := end - time.monotonic()) > 0:
            if self.stopping():
                raise Terminated
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=min(1.0, left))

    def _room(self) -> int:
        nodes = [node for node in _alive() if node["NodeID"] not in self._refused]
        return fitting(nodes, self.resources, self._gpus)

    def _start(self, count: int) -> None:
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
        threads = where.cpus_per_worker if where.threads == "auto" else where.threads
        return actor.options(
            num_cpus=where.cpus_per_worker,
            num_gpus=self._gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        ).remote(threads, self._gpus)

    def _give_up_late(self, up: set[Any]) -> None:
        """Who is late; with elastic also, at once, who was meant for a node that turns out to be gone."""
        now = time.monotonic()
        late = {worker: now - start.since for worker, start in self._arriving.items() if worker not in up}
        limit = self.resources.placement_timeout_s
        over = [worker for worker, age in late.items() if age > limit]
        if over:
            why = f"{len(over)} of {self.size} workers did not start within {limit:g} s; "
            self._give_up(over, why + "are other jobs holding the cluster's CPUs or GPUs, or is a node gone?")
        elif self.resources.elastic and self._begun and late:
            surplus = min(self.size - self._room(), self.size - 1, len(late))
            if surplus > 0:
                self._give_up(list(late)[-surplus:], f"{surplus} workers have no room any more")

    def _give_up(self, workers: Sequence[Any], why: str) -> None:
        import ray

        for worker in workers:
            ray.kill(worker)
            del self._arriving[worker]
        if not (self.resources.elastic and self.size):
            raise RuntimeError(why) if self._begun else ValueError(why)
        self.log(f"workers: {why}; going on with {self.size}")

    def _check(self, up: dict[Any, str]) -> str:
        """One worker of every node not seen before answers for it; what is in the way, and where."""
        first = {node: worker for worker, node in up.items() if node not in self.facts}
        if self.checks is None or not first:
            return ""
        sharing = [*up.values(), *(self._node_of or {}).values()]
        with token_in(self.checks.root) as token:
            asked = {n: w.survey.remote(self.checks, token, n, sharing.count(n)) for n, w in first.items()}
            self._await(list(asked.values()), SURVEY_TIMEOUT_S)  # all at once: several may hang
            found = {node: answered(token, node, _facts(node, ref)) for node, ref in asked.items()}
        wrong = {node: problems(versions(), [facts], self.checks.worker_bytes) for node, facts in found.items()}
        self._refused = {*self._refused, *wrong} - {node for node, trouble in wrong.items() if not trouble}
        self.facts |= {node: facts for node, facts in found.items() if not wrong[node]}
        in_order = sorted(found.values(), key=lambda facts: facts.node)
        trouble = problems(versions(), in_order, self.checks.worker_bytes)
        return f"preflight: {'; '.join(trouble)}" if trouble else ""


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
