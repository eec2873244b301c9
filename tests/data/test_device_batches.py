"""Batches on the device: the same on any device, in order, and never read or overwritten too early.

`FakeDevice` stands for a GPU whose streams run late: a copy takes place when something waits for it, and what was
queued behind it likewise, so that a copy or a use that no event orders sees wrong bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.data.device_batches import AHEAD, HostCopy, Memory, device_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIDE = 4


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def read(job: int, memory: Memory) -> str:
    """A batch of as many images as its number modulo 3, all bytes of which are that number."""
    time.sleep(0.001 * (job % 4))
    memory((job % 3, SIDE, SIDE, 3))[...] = job
    return f"job {job}"


class FakeStream:
    """Work that is done when it is waited for, in its order."""

    def __init__(self, device: object = None) -> None:
        self.work: list[Callable[[], None]] = []
        self.waited: list[FakeEvent] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waited.append(event)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.work.pop(0)()


class FakeEvent:
    """The end of what was queued on a stream when it was recorded."""

    def __init__(self) -> None:
        self.ended, self.stream = False, FakeStream()

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.work.append(self._end)

    def _end(self) -> None:
        self.ended = True

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        if not self.ended:
            self.stream.run(self.stream.work.index(self._end) + 1)


class FakeDevice:
    """Replaces what `device_batches` asks of CUDA, and counts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.copying = FakeStream(), FakeStream()
        self.pinned = self.copies = self.recorded = 0
        self.streams = [self.main]
        monkeypatch.setattr(torch.cuda, "Stream", self._stream)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "stream", self._inside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.streams[-1])
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self._record(stream))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: self._to(tensor, **how))

    def _stream(self, device: object = None) -> FakeStream:
        return self.copying

    @contextmanager
    def _inside(self, stream: FakeStream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned += 1
        return tensor

    def _record(self, stream: FakeStream) -> None:
        assert stream is self.main
        self.recorded += 1

    def _to(self, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        """A copy that is made later; until then there is something else in its place."""
        assert non_blocking
        assert self.streams[-1] is self.copying, "a copy on the stream of the computation"
        found = torch.full_like(tensor, 255)
        self.copying.work.append(lambda: found.copy_(tensor))
        self.copies += 1
        return found

    def use(self, pixels: Tensor) -> NDArray[np.uint8]:
        """What work on the main stream sees that is queued now: copies that it waits for are made first."""
        for event in self.main.waited:
            event.synchronize()
        self.main.waited.clear()
        seen: NDArray[np.uint8] = pixels.clone().numpy()
        return seen


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def expected(job: int) -> NDArray[np.uint8]:
    return np.full((job % 3, SIDE, SIDE, 3), job, np.uint8)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_batch_is_used_with_the_bytes_that_were_read(device: FakeDevice, threads: int) -> None:
    found = [(device.use(pixels), more) for pixels, more in device_batches(range(30), read, GPU, threads=threads)]
    for job, (pixels, more) in enumerate(found):
        np.testing.assert_array_equal(pixels, expected(job))
        assert more == f"job {job}"
    assert device.copies == device.recorded == 30
    assert readers() == []


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_memory_is_filled_again_only_after_the_copy_out_of_it(device: FakeDevice, threads: int) -> None:
    """The device lags behind: it makes no copy until all batches are taken."""
    taken = [pixels for pixels, _ in device_batches(range(12), read, GPU, threads=threads)]
    assert device.pinned == 12
    for event in device.main.waited:
        event.synchronize()
    for job, pixels in enumerate(taken):
        np.testing.assert_array_equal(pixels.numpy(), expected(job))


def test_memory_whose_copy_has_ended_is_filled_again(device: FakeDevice) -> None:
    def full(job: int, memory: Memory) -> None:
        memory((2, SIDE, SIDE, 3))[...] = job

    for pixels, _ in device_batches(range(100), full, GPU, threads=2):
        device.use(pixels)
    assert device.pinned <= 2 + 2 * AHEAD + AHEAD + 2  # under way or read, being copied, and in use


def test_an_event_that_is_not_waited_for_shows() -> None:
    """That the fake device finds the fault that it is made to find."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        device = FakeDevice(patched)
        patched.setattr(FakeStream, "wait_event", lambda stream, event: None)
        seen = [device.use(pixels) for pixels, _ in device_batches([1, 2], read, GPU, threads=1)]
    assert all((pixels == 255).all() for pixels in seen)


def test_memory_that_is_filled_too_early_shows() -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        device = FakeDevice(patched)
        patched.setattr(FakeEvent, "query", lambda event: True)
        taken = [pixels for pixels, _ in device_batches([2, 5, 8], read, GPU, threads=0)]
        for event in device.main.waited:
            event.synchronize()
    assert [int(pixels.max()) for pixels in taken] != [2, 5, 8]


def test_two_batches_are_on_the_device_before_they_are_asked_for(device: FakeDevice) -> None:
    batches = device_batches(range(10), read, GPU, threads=4)
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.05)  # for the readers
        next_ones = device.copies - taken
        assert next_ones <= AHEAD
    assert next_ones == AHEAD
    batches.close()
    assert readers() == []


@pytest.mark.parametrize("where", [CPU, GPU])
def test_an_error_comes_after_the_batches_before_it(device: FakeDevice, where: torch.device) -> None:
    def failing(job: int, memory: Memory) -> int:
        if job == 5:
            raise ValueError("job 5 is bad")
        memory((1,))[...] = job
        return job

    batches = device_batches(range(10), failing, where, threads=3)
    for job in range(5):
        assert next(batches)[1] == job
        time.sleep(0.01)
    with pytest.raises(ValueError, match="job 5 is bad"):
        next(batches)
    assert readers() == []


def test_on_a_cpu_nothing_is_copied_and_a_batch_is_the_memory_that_was_read_into() -> None:
    asked = dict[int, int]()

    def watched(job: int, memory: Memory) -> None:
        pixels = memory((2, SIDE, SIDE, 3))
        asked[job] = pixels.ctypes.data
        pixels[...] = job

    for job, (pixels, _) in enumerate(device_batches(range(8), watched, CPU, threads=2)):
        assert pixels.data_ptr() == asked[job]
        assert (pixels == job).all()
    assert readers() == []


def test_values_of_the_cpu_are_not_copied() -> None:
    values = torch.ones(3)
    assert HostCopy(values).array().ctypes.data == values.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_bytes_that_were_read_however_late_it_is() -> None:
    def large(job: int, memory: Memory) -> int:
        memory((8, 224, 224, 3))[...] = job
        return job

    busy = torch.rand(4096, 4096, device=GPU)
    sums = list[Tensor]()
    for pixels, _ in device_batches(range(40), large, GPU, threads=4):
        for _ in range(5):
            busy = (busy @ busy).clamp(0, 1)  # the device lags behind
        sums.append(pixels.float().mean())
    assert torch.stack(sums).round().tolist() == list(range(40))
