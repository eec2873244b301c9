"""Streams, events and pinned memory of the pretend GPU, and copies that are late.

A copy that the host does not wait for is done at the last moment: when a kernel reads what it wrote, or when the host
waits for a stream or an event. So whoever fills a pinned buffer again too early, or reads one before it was waited for,
gets wrong numbers here as well. What two streams do is not ordered by itself: a kernel that reads what another stream
copied, without having waited for it, is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from tests.gpu.counting import add

Clock = dict[int, int]  # stream: how much of it has been waited for


class _Thread(threading.local):
    current: Stream | None = None


_thread = _Thread()
_lock = threading.RLock()
_streams: list[Stream] = []
_host: Clock = {}  # what the host has waited for: everything that is asked for later comes after that


class Stream:
    """A queue of work, by its clock."""

    def __init__(self, device: Any = None, priority: int = 0, **rest: Any) -> None:
        with _lock:
            _streams.append(self)
            self.number = len(_streams)
        self.device = torch.device("cuda", 0)
        self.cuda_stream = self.stream_id = self.number
        self._clock: Clock = {self.number: 0}
        self._before: list[Stream | None] = []

    def clock(self) -> Clock:
        with _lock:
            return _joined(self._clock, _host)

    def work(self) -> tuple[int, int]:
        """One more piece of work: its stream and number."""
        with _lock:
            self._clock = _joined(self._clock, _host)
            self._clock[self.number] += 1
            return self.number, self._clock[self.number]

    def has_seen(self, work: tuple[int, int]) -> bool:
        return self.clock().get(work[0], 0) >= work[1]

    def wait_event(self, event: Event) -> None:
        with _lock:
            self._clock = _joined(self._clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        with _lock:
            self._clock = _joined(self._clock, stream.clock())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        add("waits", "stream.synchronize")
        host_waits_for(self.clock())

    def query(self) -> bool:
        host_waits_for(self.clock())
        return True

    def __enter__(self) -> Stream:
        self._before.append(_thread.current)
        _thread.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.current = self._before.pop()


class Event:
    """A place in a stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or current_stream()).clock()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        add("waits", "event.synchronize")
        host_waits_for(self.clock)

    def query(self) -> bool:
        """Always finished, which the host then knows."""
        host_waits_for(self.clock)
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


DEFAULT = Stream()


def current_stream(device: Any = None) -> Stream:
    return _thread.current or DEFAULT


def set_stream(stream: Stream) -> None:
    _thread.current = stream


def synchronize(device: Any = None) -> None:
    add("waits", "torch.cuda.synchronize")
    host_waits_for_all()


def _joined(one: Clock, other: Clock) -> Clock:
    return {stream: max(one.get(stream, 0), other.get(stream, 0)) for stream in {*one, *other}}


class Late:
    """A copy that was asked for and is not done yet."""

    def __init__(self, copy: Callable[[], Any]) -> None:
        self._copy: Callable[[], Any] | None = copy
        self.work = current_stream().work()

    def do(self) -> None:
        with _lock:
            copy, self._copy = self._copy, None
        if copy is not None:
            with _disable_current_modes():  # they would see that the memory has not arrived
                copy()


_late: list[Late] = []  # in the order in which they were asked for
_filling: list[tuple[StorageWeakRef, Late]] = []  # memory of the device that a copy will write to
_arriving: list[tuple[StorageWeakRef, Late]] = []  # the same of the host
_written: dict[int, tuple[int, int]] = {}  # memory of the device, by its storage: what wrote to it last


def later(copy: Callable[[], Any], into: Tensor, *, on_host: bool) -> None:
    """Does a copy later. `into` is the memory that it writes to."""
    late = Late(copy)
    with _lock:
        _late.append(late)
        (_arriving if on_host else _filling).append((StorageWeakRef(into.untyped_storage()), late))
        if not on_host:
            _written[into.untyped_storage()._cdata] = late.work


def used(elements: Tensor) -> None:
    """A kernel of the current stream is about to read or write this memory of the device.

    Raises:
        RuntimeError: another stream wrote to it, and this one has not waited for that.
    """
    storage = elements.untyped_storage()._cdata
    if storage in _written and not current_stream().has_seen(_written[storage]):
        raise RuntimeError("a stream uses what another stream wrote, and has not waited for it")
    if _filling:
        with _lock:
            for late in [late for ref, late in _filling if ref.cdata == storage]:
                late.do()
            _filling[:] = [entry for entry in _filling if entry[0].cdata != storage]


def wrote(elements: Tensor) -> None:
    """A kernel of the current stream has written to this memory."""
    _written[elements.untyped_storage()._cdata] = current_stream().work()


def host_waits_for(clock: Clock) -> None:
    """The host has seen that this much is done."""
    with _lock:
        _host.update(_joined(_host, clock))
        done = [late for late in _late if _host.get(late.work[0], 0) >= late.work[1]]
        for late in done:
            late.do()
        _late[:] = [late for late in _late if late not in done]
        for waiting in (_filling, _arriving):
            waiting[:] = [entry for entry in waiting if entry[1] in _late]


def host_waits_for_current() -> None:
    """A call that ends when the current stream is done."""
    host_waits_for(current_stream().clock())


def host_waits_for_all() -> None:
    with _lock:
        for stream in _streams:
            host_waits_for(stream.clock())


def check_arrived(tensor: Tensor) -> None:
    """Raises RuntimeError where a copy to this memory of the host has not been waited for."""
    if _arriving:
        storage = tensor.untyped_storage()._cdata
        with _lock:
            if any(ref.cdata == storage for ref, _ in _arriving):
                raise RuntimeError("the host reads what a copy from the device has not been waited for")


_pinned: list[tuple[int, int, StorageWeakRef]] = []  # first byte, end


def pin(tensor: Tensor) -> Tensor:
    """The same tensor, whose memory counts as pinned from now on."""
    storage = tensor.untyped_storage()
    first = storage.data_ptr()
    with _lock:
        _pinned[:] = [entry for entry in _pinned if not entry[2].expired()]
        _pinned.append((first, first + storage.nbytes(), StorageWeakRef(storage)))
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """By its address, as CUDA tells it: memory that numpy sees of a pinned tensor is pinned too."""
    if not tensor.numel():
        return True
    at = tensor.data_ptr()
    with _lock:
        return any(first <= at < end and not storage.expired() for first, end, storage in _pinned)
