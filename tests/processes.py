"""Runs one function on several real ranks: processes of this machine, joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from grappa_dist.distributed.collectives import process_group

# Forked from a server that has imported torch and started no thread, a rank is up in a tenth of a second, and unlike a
# plain fork it inherits nothing of the test session.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tests.preloaded"])
DEATH_SEEN_S = 2.0  # after a failure, the wait for the death of a rank that may have caused it


def free_ports(count: int) -> list[int]:
    """Free ports below those that the system hands out by itself, so that no connection takes one before it is used."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 30000), 1000):
        if len(ports) == count:
            break
        with socket.socket() as probe, suppress(OSError):  # taken
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def free_address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def run_ranks(
    fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0, collective_s: float | None = None
) -> list[Any]:
    """What `fn(comm, *args)` returns on each of `size` ranks, in rank order.

    `fn` is a function of a module; `args` and the results can be pickled. The first rank that fails ends the others,
    and its traceback is in the error. A rank computes on one thread.

    Args:
        collective_s: how long a rank waits for the others; by default as long as all of it may take.
    """
    address = free_address()
    job = pickle.dumps((fn, args))  # plain pickle: tensors by value, no shared memory left over
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        _CONTEXT.Process(
            target=_run_rank, args=(rank, size, address, job, writer, dict(os.environ), collective_s or timeout_s)
        )
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        for process, (_, writer) in zip(ranks, pipes, strict=True):
            process.start()
            writer.close()  # so that a rank that dies in silence is seen as the end of its pipe
        return _collect([reader for reader, _ in pipes], time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()  # this process alone; on success it has sent its result
                process.join()
        for reader, _ in pipes:
            reader.close()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while left := [reader for rank, reader in enumerate(readers) if rank not in results and rank not in failures]:
        ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(readers[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(readers)} died without an error message") from None
            if ok:
                results[rank] = value
                continue
            if not failures:  # perhaps since another rank has died, which is seen a moment later
                deadline = min(deadline, time.monotonic() + DEATH_SEEN_S)
            failures[rank] = f"rank {rank} of {len(readers)} failed:\n{value}"
    for failure in failures.values():
        raise RuntimeError(failure)
    if len(results) < len(readers):
        late = [rank for rank in range(len(readers)) if rank not in results]
        raise TimeoutError(f"ranks {late} of {len(readers)} did not finish in time")
    return [results[rank] for rank in range(len(readers))]


def _run_rank(
    rank: int, size: int, address: str, job: bytes, writer: Connection, environ: dict[str, str], wait_s: float
) -> None:
    os.environ.clear()  # the server's is as old as the server
    os.environ.update(environ)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(job)
        with process_group(rank, size, address, timeout_s=wait_s) as comm:
            try:
                result = fn(comm, *args)
            except BaseException:
                writer.send_bytes(pickle.dumps((False, traceback.format_exc())))  # before the farewell, which may hang
                raise
        writer.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
