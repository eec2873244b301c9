"""Work on a device in pieces that need a few counts on the host: several are under way, so the device never idles.

How many rows a first step leaves for a second one is known on the device alone. Work that read it at once would wait
for all that is queued, and the device would then wait for the host. Here a piece of work hands over the tensor with its
counts, is put aside while another piece queues its own, and goes on when the copy of its counts has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

DEPTH = 2  # pieces under way

Result = TypeVar("Result")
Work = Generator[Tensor, list[int], Result]
"""Yields tensors of integers (m,), is sent their values, and returns its result; nothing else in it waits."""


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way to the host: whoever takes it later has less to wait for."""

    host: Tensor
    copied: torch.cuda.Event | None  # after the copy; None where it is on the host already

    @staticmethod
    def of(tensor: Tensor) -> Arriving:
        if not tensor.is_cuda:
            return Arriving(tensor, None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Arriving(host, copied)

    def take(self) -> Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host


def in_flight(works: Iterable[Work[Result]], depth: int = DEPTH) -> Generator[Result, None, None]:
    """The results of the works, each when it is there; `depth` of them are under way at a time.

    A work is taken from `works` when it begins, and begins before those taken earlier have ended.
    """
    waiting = deque[tuple[Work[Result], Arriving]]()
    left = iter(works)
    while True:
        while len(waiting) < depth and (work := next(left, None)) is not None:
            try:
                waiting.append((work, Arriving.of(next(work))))
            except StopIteration as end:
                yield end.value
        if not waiting:
            return
        work, counts = waiting.popleft()
        try:
            waiting.append((work, Arriving.of(work.send(counts.take().tolist()))))
        except StopIteration as end:
            yield end.value


def a_step_later(items: Iterable[Result]) -> Generator[Result, None, None]:
    """The items, each when the next one is there: what is on its way to the host then arrives meanwhile."""
    waiting = deque[Result]()
    for item in items:
        waiting.append(item)
        if len(waiting) == DEPTH:
            yield waiting.popleft()
    yield from waiting


def finish(work: Work[Result]) -> Result:
    """The result of a single piece of work."""
    return next(in_flight([work]))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, from pinned memory where that is a GPU: the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def compact(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The places where `wanted` (P,) bool holds, ascending, followed by others: (P,) int64, and their number, (1,).

    As `nonzero`, which waits because its result has that many rows.
    """
    ends = wanted.cumsum(0)
    num = len(wanted)
    places = torch.arange(num, device=wanted.device)
    found = torch.zeros(num + 1, dtype=torch.int64, device=wanted.device)
    found.scatter_(0, torch.where(wanted, ends - 1, num), places)
    return found[:num], ends[-1:] if num else torch.zeros(1, dtype=torch.int64, device=wanted.device)
