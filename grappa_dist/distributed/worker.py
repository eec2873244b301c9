"""A worker process, which lives as long as the run, and what a function on one rank of a job is given.

Jobs and tasks come and go in it; ranks whose work takes unequal time wait for the slower ones.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from grappa_dist.bucket import keep_at_most, withdraw
from grappa_dist.distributed.collectives import Comm, process_group, wire_device
from grappa_dist.distributed.preflight import Checks, Facts, node_name, survey
from grappa_dist.files import hide_damaged
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.prefetch import CPU_THREADS, set_threads_here
from grappa_dist.progress import lost_trials
from grappa_dist.storage import raise_open_files

LOOK_S = 3.0  # between two checks that the head can be reached, and the timeout of one
CUT_OFF_TRIES = 4  # about when the head, too, gives up a node that it cannot reach
CUT_OFF_STATUS = 75
_END = object()  # of an iterator
Piece = TypeVar("Piece")
Place = tuple[int, int, str]  # rank, size, address of rank 0
Report = Callable[[dict[str, Any]], None]
_task_report: ContextVar[Report] = ContextVar("task_report", default=lambda status: None)


class Stopped(Exception):
    """All ranks agreed to stop early; what is finished is on storage."""


@dataclass(frozen=True)
class RankContext:
    """What a function that runs on every rank of a job is given."""

    comm: Comm
    device: torch.device
    report: Report  # progress; the driver shows the latest status of rank 0
    stop_requested: Callable[[], bool]  # whether to save and return
    note: Callable[[str], None] = lambda text: None  # what the run is to say; the driver shows each of rank 0's once

    def of_rank_0(self, flag: bool) -> bool:
        """Rank 0's flag, on all ranks: for what lies on storage, which other nodes may see some time later."""
        return bool(self.comm.broadcast(torch.tensor([flag], dtype=torch.int64, device=self.device), 0))

    def set_aside_damaged(self, path: Path, problem: str, what: str) -> bool:
        """Whether any rank finds a file or folder damaged, which rank 0 then sets aside. All ranks call it together.

        Args:
            problem: what this rank finds wrong with it; "" where nothing is.
            what: it is, for a note.
        """
        found = [bool(flag) for flag in self.comm.gather(torch.tensor([bool(problem)], device=self.device))]
        if not any(found):
            return False
        if self.comm.rank == 0:
            why = problem or f"damaged as rank {found.index(True)} reads it"
            self.note(f"{what} {path} is not used: {why}; set aside as {hide_damaged(path).name}")
            withdraw(path)
        self.comm.barrier()
        return True


class Worker:
    """A Ray actor with some CPUs and perhaps a GPU. While it works, it still answers `status` and `stop`."""

    def __init__(
        self, threads: int, gpus: float, decode_threads: int = CPU_THREADS, *, copies_bytes: int | None = None
    ) -> None:
        raise_open_files()
        keep_at_most(copies_bytes)
        set_threads_here(decode_threads)
        self._threads, self._gpus = threads, gpus
        self._status: dict[str, Any] = {}
        self._notes: list[str] = []  # of the running function
        self._lost_before = 0  # trials lost by earlier functions
        self._stop = threading.Event()
        threading.Thread(target=_end_when_cut_off, args=(_head_address(),), daemon=True).start()

    def ready(self) -> str:
        """The node's id, once the process is up and has imported what jobs need."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def survey(self, checks: Checks, token: Path | None, node: str, workers: int) -> Facts:
        """The facts of this node, of that id, when `workers` of ours share it."""
        name = node_name(_node_address())
        return survey(checks, token, node, name, workers=workers, gpu=bool(self._gpus))

    def compare_backbone(self, checks: Checks) -> str:
        """Why the backbone that is built here is not the driver's, or ""."""
        torch.set_num_threads(self._threads)
        return checks.backbone() if checks.backbone is not None else ""

    def free_address(self) -> str:
        """host:port for a process group whose rank 0 is here."""
        host = _node_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(self, function: Callable[[torch.device, Any], Any], task: Any) -> Any:
        """A task of one process, which may use `report_of_task`."""
        self._prepare()
        _task_report.set(self._set_status)
        with naming_lack_of_memory(function.__name__):
            return function(self._device(), task)

    def run_rank(self, function: Callable[[RankContext, Any], Any], job: Any, place: Place, timeout_s: float) -> Any:
        """One rank of a job, inside a process group."""
        self._prepare()
        rank, size, address = place
        device = self._device()
        try:
            with process_group(rank, size, address, timeout_s=timeout_s, device=device) as comm:
                context = RankContext(comm, device, self._set_status, self._stop.is_set, self._notes.append)
                try:
                    with naming_lack_of_memory(function.__name__):
                        return function(context, job)
                except Stopped:
                    return None
        finally:
            release_memory()

    def status(self) -> dict[str, Any]:
        """What the running function reported last, and its notes."""
        notes = [*self._notes, *lost_trials()[self._lost_before :]]
        return self._status | ({"notes": notes} if notes else {})

    def stop(self) -> None:
        self._stop.set()

    def _device(self) -> torch.device:
        """The GPU that Ray assigned; a worker without one sees all GPUs and must use none."""
        return torch.device("cuda", 0) if self._gpus and torch.cuda.is_available() else torch.device("cpu")

    def _set_status(self, status: dict[str, Any]) -> None:
        self._status = status

    def _prepare(self) -> None:
        self._status, self._notes, self._lost_before = {}, [], len(lost_trials())
        torch.set_num_threads(self._threads)  # holds for the calling thread, so it is set at each call
        import faiss

        faiss.omp_set_num_threads(self._threads)


def report_of_task() -> Report:
    """Takes how far the task of this thread is, `done` units in so many `seconds`; to nobody outside of a worker."""
    return _task_report.get()


def release_memory() -> None:
    """Frees the memory of a finished job.

    An engine and its module refer to each other until Python's collector runs, which counts objects and not their bytes
    on a GPU. What is freed stays with the C library between what is not: after k-means with 65,536 clusters of 64
    channels 110 MiB, which the next job would take in addition to its own.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _head_address() -> tuple[str, int]:
    import ray

    host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
    return str(host).strip("[]"), int(port)


def _end_when_cut_off(head: tuple[str, int]) -> None:
    """Ends this process when it can no longer reach the head: it would hold its GPU, and write beside its successor.

    Ray itself takes minutes to see that packets vanish. A busy head counts as reached: its kernel answers.
    """
    missed = 0  # in a row, not a time: this process itself may have been held up
    while missed < CUT_OFF_TRIES:
        try:
            socket.create_connection(head, LOOK_S).close()
            missed = 0
        except OSError:
            missed += 1
        time.sleep(LOOK_S)
    os._exit(CUT_OFF_STATUS)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def wait_for_slower_ranks(context: RankContext, work: Generator[None, None, None]) -> None:
    """Does this rank's work, piece by piece, and returns when every rank has finished: see `until_all_ranks_finish`."""
    for _ in until_all_ranks_finish(context.comm, work, context.stop_requested):
        pass


def until_all_ranks_finish(
    comm: Comm, pieces: Generator[Piece, None, None], stop_requested: Callable[[], bool]
) -> Generator[Piece, None, None]:
    """This rank's pieces of work; ends when every rank has finished its own. All ranks call and exhaust it together.

    For work without collectives that takes some ranks much longer than others. A rank that waited in one collective
    would give up after `resources.collective_timeout_s`, however well the others get on. So the ranks sum up, again and
    again and in the background, how many of them have finished. A rank that has pieces left works on while such a sum
    is under way, and begins the next sum after the piece in which the last one arrived. A rank that has none left waits
    for the sum, which takes no longer than the slowest piece of the others.

    Args:
        pieces: does a piece of the work each time it is advanced; it is closed when this ends or raises.
        stop_requested: called before each sum.

    Raises:
        Stopped: on all ranks, after the pieces under way, when any was asked to stop.
    """
    device, done = wire_device(comm), False
    with closing(pieces):
        while True:
            flags = comm.begin_sum(torch.tensor([done, stop_requested()], dtype=torch.int64, device=device))
            while not done:
                piece = next(pieces, _END)
                if piece is _END:
                    done = True
                else:
                    yield piece  # type: ignore[misc]
                if flags.ready():
                    break
            finished, stopping = flags.total().tolist()
            if stopping:
                raise Stopped
            if finished == comm.size:
                return
