"""Batches of images on the device: read ahead in threads, copied there ahead of the work that takes them.

On a GPU the reading threads fill pinned memory. Batches are copied out of it on a stream of their own, at most
AHEAD before they are taken, so a copy runs beside the work on an earlier batch and no thread waits for it. Two orders
are kept by events: a batch is used after its copy has ended, and pinned memory is filled again after the copy out
of it has ended. On a CPU a batch is the memory that was read into; nothing is copied.

Shapes: B images of a batch.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.data.decoding import Pixels
from grappa_dist.data.loader import read_batches
from grappa_dist.prefetch import Threads, threads_here

AHEAD = 2  # batches on the device, or on their way, beside the one that is being used

Job = TypeVar("Job")
More = TypeVar("More")
Held = TypeVar("Held")  # the memory of a batch
Memory = Callable[[tuple[int, ...]], Pixels]  # shape -> memory for the pixels of a batch, whatever is in it
Read = Callable[[Job, Memory], More]  # fills that memory, for which it asks once -> what else belongs to the batch


def device_batches(
    jobs: Iterable[Job], read: Read[Job, More], device: torch.device, *, threads: Threads
) -> Generator[tuple[Tensor, More], None, None]:
    """The pixels of every job, uint8 on the device, and what else was read, in order; closing it ends the threads.

    Args:
        read: called in threads; asks once for the memory of its batch and fills it.
        threads: as of `read_batches`.
    """
    if device.type == "cuda":
        yield from _copied(jobs, read, _Copies(device), threads_here(threads))
        return

    into_memory = _reading(read, lambda shape: torch.empty(shape, dtype=torch.uint8), lambda pixels: pixels)
    with closing(read_batches(jobs, into_memory, threads=threads)) as batches:
        yield from batches


def _reading(
    read: Read[Job, More], allocate: Callable[[tuple[int, ...]], Held], pixels_of: Callable[[Held], Tensor]
) -> Callable[[Job], tuple[Held, More]]:
    """Reads a job into memory of its own, and returns that and what else was read."""

    def read_one(job: Job) -> tuple[Held, More]:
        taken = list[Held]()

        def memory(shape: tuple[int, ...]) -> Pixels:
            taken.append(allocate(shape))
            pixels: Pixels = pixels_of(taken[-1]).numpy()
            return pixels

        more = read(job, memory)
        (held,) = taken
        return held, more

    return read_one


def _copied(
    jobs: Iterable[Job], read: Read[Job, More], copies: _Copies, threads: int
) -> Generator[tuple[Tensor, More], None, None]:
    """The same, copied to a GPU."""

    into_pinned = _reading(read, copies.memory, lambda pinned: pinned.pixels)
    # A thread has one batch in work, and pinned memory is taken from all processes of the machine.
    depth = threads + 2 * AHEAD
    with closing(read_batches(jobs, into_pinned, threads=threads, depth=depth)) as batches:
        ahead: deque[tuple[_Copy, More]] = deque()
        while True:
            while not ahead or (len(ahead) <= AHEAD and batches.ready()):
                if (read_ahead := next(batches, None)) is None:
                    return
                pinned, more = read_ahead
                ahead.append((copies.begin(pinned), more))
                del read_ahead, pinned
            copy, more = ahead.popleft()
            yield copies.end(copy), more
            del copy, more  # or they would be kept here while the next batch is awaited


@dataclass(frozen=True)
class _Pinned:
    """A batch in pinned memory."""

    memory: Tensor  # flat, perhaps larger
    pixels: Tensor  # in it


@dataclass(frozen=True)
class _Copy:
    """A batch on its way to the device."""

    pixels: Tensor  # on the device
    ended: torch.cuda.Event


class _Copies:
    """Pinned memory, and the stream on which batches are copied out of it to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._used: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # memory, and the end of the last copy out of it

    def memory(self, shape: tuple[int, ...]) -> _Pinned:
        """Pinned memory that no copy reads any more; called by the reading threads."""
        size = math.prod(shape)
        with self._lock:
            for number, (memory, ended) in enumerate(self._used):
                if len(memory) >= size and ended.query():
                    del self._used[number]
                    break
            else:
                memory = torch.empty(max(1, size), dtype=torch.uint8).pin_memory()
        return _Pinned(memory, memory[:size].view(shape))

    def begin(self, batch: _Pinned) -> _Copy:
        """Begins to copy a batch."""
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            pixels = batch.pixels.to(self._device, non_blocking=True)
            ended.record(self._stream)
        with self._lock:
            self._used.append((batch.memory, ended))
        return _Copy(pixels, ended)

    def end(self, copy: _Copy) -> Tensor:
        """The batch, for the work that the caller queues next: that waits for the copy, the caller does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copy.ended)
        copy.pixels.record_stream(current)  # its memory is the other stream's, which must not use it again too early
        return copy.pixels


class HostCopy:
    """A tensor that is brought to the CPU while the device works on."""

    def __init__(self, tensor: Tensor) -> None:
        self._found = tensor.to("cpu", non_blocking=True)
        self._ended = torch.cuda.Event() if tensor.is_cuda else None
        if self._ended is not None:
            self._ended.record(torch.cuda.current_stream(tensor.device))

    def array(self) -> NDArray[Any]:
        """Its values, which are waited for."""
        if self._ended is not None:
            self._ended.synchronize()
        found: NDArray[Any] = self._found.numpy()
        return found
