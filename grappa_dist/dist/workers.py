"""Worker processes that live as long as the run: Ray places, watches and replaces them; jobs and tasks come and go."""

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grappa_dist.config import Resources
from grappa_dist.dist.comm import Comm, process_group

PLACEMENT_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
Place = tuple[int, int, str]  # rank, size, address of rank 0


class Stopped(Exception):
    """All ranks agreed to stop early; what is finished is on storage."""


@dataclass(frozen=True)
class RankContext:
    """What a function that runs on every rank of a job is given."""

    comm: Comm
    device: torch.device
    report: Callable[[dict[str, Any]], None]  # status for whoever watches
    stop_requested: Callable[[], bool]  # save and return

    def raise_if_stopping(self) -> None:
        """Raises Stopped on all ranks when any of them was asked to stop; all ranks call it at the same point."""
        flag = torch.tensor([self.stop_requested()], dtype=torch.int64, device=self.device)
        if int(self.comm.sum_(flag)):
            raise Stopped


class Worker:
    """One process with its share of CPUs and perhaps a GPU: a Ray actor that answers status and stop while it works."""

    def __init__(self, threads: int, gpus: float) -> None:
        self._threads, self._gpus = threads, gpus
        self._status: dict[str, Any] = {}
        self._stop = threading.Event()

    def ready(self) -> str:
        """The node's address, once the process is up and has imported what jobs need."""
        return _node_address()

    def free_address(self) -> str:
        """host:port for a process group whose rank 0 is here."""
        host = _node_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(self, function: Callable[[torch.device, Any], Any], task: Any) -> Any:
        """A task of one process."""
        self._prepare()
        return function(self._device(), task)

    def run_rank(self, function: Callable[[RankContext, Any], Any], job: Any, place: Place, timeout_s: float) -> Any:
        """One rank of a job, inside a process group."""
        self._prepare()
        rank, size, address = place
        device = self._device()
        backend = "nccl" if device.type == "cuda" else "gloo"
        with process_group(rank, size, address, backend=backend, timeout_s=timeout_s) as comm:
            context = RankContext(comm, device, self._report, self._stop.is_set)
            try:
                return function(context, job)
            except Stopped:
                return None

    def status(self) -> dict[str, Any]:
        return self._status

    def stop(self) -> None:
        self._stop.set()

    def _device(self) -> torch.device:
        """The GPU that Ray gave us; a worker without a share sees all of them and must take none."""
        return torch.device("cuda", 0) if self._gpus and torch.cuda.is_available() else torch.device("cpu")

    def _report(self, status: dict[str, Any]) -> None:
        self._status = status

    def _prepare(self) -> None:
        self._status = {}
        torch.set_num_threads(self._threads)  # per calling thread, so it is said at each call
        import faiss

        faiss.omp_set_num_threads(self._threads)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def check_faiss() -> None:
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("faiss is not installed; install grappa-dist[cpu], or grappa-dist[gpu] where there are GPUs")


def check_answers(address: str) -> None:
    """Raises ValueError when nobody listens at host:port, which Ray itself would wait minutes for."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ValueError(f"RAY_ADDRESS={address} does not answer: {error.strerror or error}") from None


@dataclass
class Cluster:
    """A connection to Ray, started on first use: a run that reuses everything starts none."""

    resources: Resources
    owned: Path | None = None  # temp folder of a local cluster that is ours to end
    _workers: list[Any] | None = None
    _node_of: dict[Any, str] = field(default_factory=dict)

    def workers(self) -> list[Any]:
        """The worker actors, all up.

        Raises:
            ValueError: the cluster cannot hold them, saying what is missing.
        """
        if self._workers is None:
            self._connect()
            self._workers = [self.start_worker() for _ in range(self._count())]
            self._wait(self._workers)
        return self._workers

    def node_of(self, worker: Any) -> str:
        """The node that a worker lies on, so that the ranks of a job can be neighbours."""
        return self._node_of[worker]

    def replace(self, worker: Any) -> Any:
        """A fresh worker in the place of one that died or must end."""
        import ray

        ray.kill(worker)
        fresh = self.start_worker()
        self._wait([fresh])
        assert self._workers is not None
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def start_worker(self) -> Any:
        import ray

        actor: Any = ray.remote(concurrency_groups={"control": 2})(Worker)  # type: ignore[call-overload]
        threads = self.resources.cpus_per_worker if self.resources.threads == "auto" else self.resources.threads
        return actor.options(
            num_cpus=self.resources.cpus_per_worker,
            num_gpus=self._gpus_per_worker(),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        ).remote(threads, self._gpus_per_worker())

    def close(self) -> None:
        """Ends our workers, and the local cluster if it is ours."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        for worker in self._workers or []:
            ray.kill(worker)
        self._workers = None
        ray.shutdown()
        if self.owned:
            shutil.rmtree(self.owned, ignore_errors=True)

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        check_faiss()
        handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in place
        try:
            self._init(ray)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _init(self, ray: Any) -> None:
        paths = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path if "site-packages" not in p))
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if os.environ.get("RAY_ADDRESS"):
            submitted = SUBMITTED_JOB in os.environ  # then its runtime environment is set, and its folder importable
            environment = None if submitted else {"env_vars": {"PYTHONPATH": paths}}
            check_answers(os.environ["RAY_ADDRESS"])
            ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=environment, **quiet)
            return
        os.environ.setdefault(
            "RAY_AUTH_MODE", "disabled"
        )  # or Ray writes a token that later clusters of this user want
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ["PYTHONPATH"] = paths
        self.owned = Path(tempfile.mkdtemp(prefix="grappa-", dir="/tmp"))  # short: sockets live in it
        ray.init(
            address="local",
            num_cpus=self.resources.num_cpus,
            include_dashboard=False,
            object_store_memory=2**28,  # big arrays go through storage
            _temp_dir=str(self.owned),
            **quiet,
        )

    def _count(self) -> int:
        import ray

        have = ray.cluster_resources()
        gpus = self._gpus_per_worker()
        cpus = self.resources.cpus_per_worker
        if self.resources.workers != "auto":
            count = self.resources.workers
        elif gpus:
            count = int(have.get("GPU", 0) / gpus)
        else:
            count = max(1, int(have.get("CPU", 0) / cpus))
        for name, need in (("CPU", count * cpus), ("GPU", count * gpus)):
            if need > have.get(name, 0):
                raise ValueError(
                    f"{count} workers need {need:g} {name}, the Ray cluster has {have.get(name, 0):g}; "
                    f"lower resources.workers or resources.{name.lower()}s_per_worker"
                )
        if count < self.resources.adapt_ranks:
            raise ValueError(f"resources.adapt_ranks={self.resources.adapt_ranks} is more than the {count} workers")
        return count

    def _gpus_per_worker(self) -> float:
        import ray

        if self.resources.gpus_per_worker != "auto":
            return self.resources.gpus_per_worker
        return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0

    def _wait(self, workers: list[Any]) -> None:
        import ray

        began = time.monotonic()
        pending = [w.ready.remote() for w in workers]
        _, late = ray.wait(pending, num_returns=len(pending), timeout=PLACEMENT_TIMEOUT_S)
        if late:
            raise ValueError(
                f"{len(late)} of {len(workers)} workers did not start within {time.monotonic() - began:.0f} s; "
                "are other jobs holding the cluster's CPUs or GPUs?"
            )
        self._node_of |= zip(workers, ray.get(pending), strict=True)
