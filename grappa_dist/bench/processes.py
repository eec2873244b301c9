"""Workers for a measurement: real processes of this machine with one thread each, joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from grappa_dist.distributed.collectives import Comm, process_group

_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit the parent's threads and memory


def run_workers(work: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `work(comm, *args)` returns on each worker, in rank order; the first that fails ends the others."""
    address = _free_address()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    workers = [
        _CONTEXT.Process(target=_run, args=(writer, rank, size, address, work, args), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        with _interrupts_ignored():  # a child inherits that: Ctrl-C ends this process, and this one ends them
            for worker in workers:
                worker.start()
        for _, writer in pipes:
            writer.close()  # so that a worker that dies in silence is seen as the end of its pipe
        return _collect([reader for reader, _ in pipes])
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()  # on success it has said all it had to say
                worker.join()


def _collect(readers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        for ready in wait([reader for rank, reader in enumerate(readers) if rank not in results]):
            rank = next(r for r, reader in enumerate(readers) if reader is ready)
            try:
                ok, value = readers[rank].recv()
            except EOFError:
                raise RuntimeError(f"worker {rank} of {len(readers)} died without a word") from None
            if not ok:
                raise RuntimeError(f"worker {rank} of {len(readers)} failed: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _run(  # one argument per thing that a spawned process is given
    writer: Connection, rank: int, size: int, address: str, *job: Any
) -> None:
    work, args = job
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        if size == 1:
            result = work(Comm(), *args)
        else:
            with process_group(rank, size, address) as comm:
                result = work(comm, *args)
        writer.send((True, result))
    except Exception:
        writer.send((False, traceback.format_exc().strip().splitlines()[-1]))


@contextmanager
def group_of_one(device: torch.device) -> Iterator[Comm]:
    """A process group of this process alone, which the training engine wants."""
    with process_group(0, 1, _free_address(), backend="nccl" if device.type == "cuda" else "gloo") as comm:
        yield comm


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
