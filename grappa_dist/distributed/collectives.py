"""Collective operations between the ranks of one job. Shapes are the caller's; R is the number of ranks."""

from __future__ import annotations

import datetime
import math
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllSum(torch.autograd.Function):
    """Sum over all ranks; its gradient is summed too, as every rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class Sum:
    """A sum over ranks that has begun."""

    tensor: Tensor
    work: dist.Work | None  # None in a world of one

    def ready(self) -> bool:
        """Whether every rank has contributed, so that `total` does not wait."""
        return self.work is None or self.work.is_completed()

    def total(self) -> Tensor:
        """The sum; waits for it."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class Comm:
    """The ranks of one job, or some of them, seen from one of them. Without a process group it is a world of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: all ranks of the job
    timeout_s: float = 600.0  # for which a rank waits for others in a collective

    def among(self, parts: Sequence[Sequence[int]]) -> Comm:
        """The part of these ranks that this one is in, as ranks of their own. All ranks call it with the same parts.

        Args:
            parts: ranks, ascending; every rank is in one part.
        """
        found = Comm()
        for ranks in parts:
            if len(ranks) == self.size:
                return self
            if len(ranks) > 1:
                timeout = datetime.timedelta(seconds=self.timeout_s)
                group = dist.new_group(list(ranks), timeout=timeout)  # by all, in the same order, whoever is in it
                if self.rank in ranks:
                    found = Comm(list(ranks).index(self.rank), len(ranks), group, self.timeout_s)
        return found

    def allsum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of the job, differentiable.

        Every rank computes the same global loss from such sums. The gradient that then reaches a rank's own tensor is
        R times the true one, and an engine that averages gradients over ranks makes it exact.
        """
        return tensor if self.size == 1 else _AllSum.apply(tensor)  # type: ignore[no-untyped-call]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks in place, any dtype, no gradient."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Sum:
        """As `sum_`, in the background, while this rank does work that needs no other rank."""
        return Sum(tensor, dist.all_reduce(tensor, group=self.group, async_op=True) if self.size > 1 else None)

    def max_(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place, no gradient."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over ranks, in place, no gradient."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Every rank's tensor, in rank order; the first dimension may differ between ranks.

        At most twice the size of the result is sent and held: ranks are padded to the longest one where that is no
        more, and broadcast one after the other where lengths are more uneven.

        Args:
            sizes: the first dimension on every rank, where all ranks know it; None: they tell each other, and the host
                waits for a GPU.
        """
        if self.size == 1:
            return [tensor]
        sizes = self._lengths(tensor) if sizes is None else list(sizes)
        assert len(tensor) == sizes[self.rank]
        longest = max(sizes)
        if longest * self.size > 2 * sum(sizes):
            return self._in_turn(tensor, sizes)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.group)
        return [part[:n] for part, n in zip(received, sizes, strict=True)]

    def _lengths(self, tensor: Tensor) -> list[int]:
        """The first dimension of every rank's tensor."""
        lengths = torch.empty(self.size, dtype=torch.int64, device=tensor.device)
        dist.all_gather(list(lengths.split(1)), torch.full((1,), len(tensor), device=tensor.device), group=self.group)
        found: list[int] = lengths.tolist()
        return found

    def _in_turn(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """Each rank that has rows broadcasts them, into one piece of memory."""
        parts = list(tensor.new_empty((sum(sizes), *tensor.shape[1:])).split(sizes))
        parts[self.rank].copy_(tensor)
        for source, part in enumerate(parts):
            if len(part):
                dist.broadcast(part, self._of_job(source), group=self.group)
        return parts

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Sends part r to rank r; returns what every rank has sent to this one, in rank order, of these shapes."""
        if self.size == 1:
            return list(parts)
        sent = torch.cat([part.reshape(-1) for part in parts])
        counts = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, [part.numel() for part in parts], group=self.group)
        return [part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The source rank's tensor, written into `tensor` on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, self._of_job(source), group=self.group)
        return tensor

    def send(self, tensor: Tensor, target: int) -> None:
        """Sends the tensor to a rank, which calls `receive`."""
        dist.send(tensor, self._of_job(target), group=self.group)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """What a rank has sent to this one, written into `tensor`."""
        dist.recv(tensor, self._of_job(source), group=self.group)
        return tensor

    def _of_job(self, rank: int) -> int:
        """A rank's number among all ranks of the job."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def shift(self, tensor: Tensor, by: int = 1) -> Tensor:
        """Sends the tensor `by` ranks ahead; returns that of the rank `by` before. The first dimension may differ."""
        if by % self.size == 0:
            return tensor
        after, before = (self.rank + by) % self.size, (self.rank - by) % self.size
        length = torch.zeros(1, dtype=torch.int64, device=tensor.device)
        self._send_and_receive(torch.full((1,), len(tensor), device=tensor.device), after, length, before)
        received = tensor.new_empty((int(length), *tensor.shape[1:]))
        self._send_and_receive(tensor.contiguous(), after, received, before)
        return received

    def _send_and_receive(self, sent: Tensor, after: int, received: Tensor, before: int) -> None:
        """Sends and receives at once: one after the other, two GPUs could wait for each other for ever."""
        to, source = self._of_job(after), self._of_job(before)
        operations = [dist.P2POp(dist.isend, sent, to, self.group)] if len(sent) else []
        operations += [dist.P2POp(dist.irecv, received, source, self.group)] if len(received) else []
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True)
class Grid:
    """The ranks of a job as a grid: those that share rows hold a slice of the centroids each, consecutive ranks."""

    job: Comm
    sharing_rows: Comm  # the R_k ranks with the rows of this one, by slice
    sharing_slice: Comm  # the R_n ranks with the slice of this one

    @staticmethod
    def of(job: Comm, slices: int) -> Grid:
        """All ranks call it with the same number of slices, which divides that of the ranks.

        Raises:
            ValueError: it does not.
        """
        if slices < 1 or job.size % slices:
            raise ValueError(f"slices of the centroids must divide the {job.size} ranks, got {slices}")
        rows = [range(first, first + slices) for first in range(0, job.size, slices)]
        return Grid(job, job.among(rows), job.among([range(i, job.size, slices) for i in range(slices)]))


def wire_device(comm: Comm) -> torch.device:
    """Where a tensor must be for a collective: NCCL takes only those on a GPU."""
    if comm.size > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def raise_together(comm: Comm, problem: str) -> None:
    """Raises the first problem of any rank on every rank, so that none waits for one that has failed; "" is none."""
    text = torch.tensor(list(problem.encode()), dtype=torch.uint8, device=wire_device(comm))
    for part in comm.gather(text):
        if len(part):
            raise ValueError(bytes(part.tolist()).decode())


@contextmanager
def failing_together(comm: Comm, device: torch.device) -> Iterator[None]:
    """Around what may fail on some ranks: if it does, all raise once all have left it, and none waits for another.

    Args:
        device: where tensors must be for a collective.

    Raises:
        RuntimeError: it failed on another rank alone; says on which, and why.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    why = "" if error is None else f"{type(error).__name__}: {error}"
    own = torch.tensor(list(why.encode()), dtype=torch.uint8, device=device)
    for rank, of_rank in enumerate(comm.gather(own)):
        if len(of_rank):
            raise error or RuntimeError(f"rank {rank} failed: {bytes(of_rank.tolist()).decode()}")


@contextmanager
def process_group(
    rank: int,
    size: int,
    address: str,
    *,
    timeout_s: float = 600.0,
    device: torch.device | None = None,
) -> Iterator[Comm]:
    """A process group at `address` ("host:port"), ended with a barrier: no rank leaves while another communicates.

    Args:
        device: of this rank. A GPU's group is NCCL's and is bound to it: NCCL would guess by the rank otherwise, which
            is wrong where every process sees one GPU. All others are gloo's.

    Raises:
        ConnectionError: the ranks cannot connect there, for example because another process has taken the port in the
            meantime; another address may work.
    """
    host, port = address.rsplit(":", 1)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        listening = _listening(host, int(port)) if rank == 0 else None
        store = dist.TCPStore(host, int(port), size, rank == 0, timeout, master_listen_fd=listening)  # type: ignore[attr-defined]
        bound = device if device is not None and device.type == "cuda" else None
        backend = "gloo" if bound is None else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
    except OSError as error:
        raise ConnectionError(f"no process group at {address}: {error.strerror}") from error
    except dist.DistNetworkError as error:
        raise ConnectionError(f"no process group at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield Comm(rank, size, timeout_s=timeout_s)
        dist.barrier()
    finally:
        _destroy()


def _listening(host: str, port: int) -> int:
    """A socket that listens at this address alone; by itself torch's store listens on all interfaces."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return server.detach()


def _destroy() -> None:
    """Ends the process group; through DeepSpeed where that uses the group, or it would keep handles to a dead one."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
