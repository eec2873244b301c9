"""Which search runs on a GPU, and that faiss's resources there are used by one thread at a time: by a faiss that looks
as if it was built for GPUs, and refuses what faiss forbids."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from threading import Barrier, Lock
from types import ModuleType

import pytest
import torch
from torch import Tensor

from grappa_dist.search import backends
from grappa_dist.search.candidates import largest_float32, nearest_float32
from tests.search.test_backends import unit_rows

THREADS = 4


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def on_gpu(num: int) -> Tensor:
    return torch.from_numpy(unit_rows(num, 8)).as_subclass(OnGpu)


class Resources:
    """As faiss's StandardGpuResources: not for two threads at a time."""

    def __init__(self) -> None:
        self.in_use = Lock()


def knn_gpu(resources: Resources, x: Tensor, y: Tensor, t: int, *, metric: str, device: int) -> tuple[Tensor, Tensor]:
    if not resources.in_use.acquire(blocking=False):
        raise RuntimeError("these resources are used by another thread")
    try:
        time.sleep(0.01)
        search = nearest_float32 if metric == "L2" else largest_float32
        return search(torch.Tensor(x), torch.Tensor(y), t)
    finally:
        resources.in_use.release()


class Faiss(ModuleType):
    """A faiss that was built for GPUs, as far as we use it."""

    StandardGpuResources, knn_gpu = Resources, staticmethod(knn_gpu)
    METRIC_L2, METRIC_INNER_PRODUCT = "L2", "inner product"

    def __init__(self, gpus: int) -> None:
        super().__init__("faiss")
        self.gpus, self.__path__, self.__spec__ = gpus, list[str](), ModuleSpec("faiss", None)

    def get_num_gpus(self) -> int:
        return self.gpus


@pytest.fixture(autouse=True)
def current_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The devices that were made torch's current one."""
    found: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(found.append(device)))
    monkeypatch.setitem(sys.modules, "faiss.contrib", ModuleType("faiss.contrib"))
    monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", ModuleType("faiss.contrib.torch_utils"))
    for cached in (backends._has_faiss, backends._gpu_search):
        cached.cache_clear()
    yield found
    for cached in (backends._has_faiss, backends._gpu_search):
        cached.cache_clear()


def test_threads_search_one_after_the_other_on_a_gpus_resources(
    monkeypatch: pytest.MonkeyPatch, current_devices: list[object]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", Faiss(gpus=1))
    x, y, together = on_gpu(12), on_gpu(30), Barrier(THREADS)

    def search(number: int) -> Tensor:
        together.wait(timeout=60)
        found = [(backends.nearest if number % 2 else backends.largest)(x, y, 3)[1] for _ in range(3)]
        return found[0]

    with ThreadPoolExecutor(THREADS) as pool:
        for number, found in enumerate(pool.map(search, range(THREADS))):
            expected = (nearest_float32 if number % 2 else largest_float32)(torch.Tensor(x), torch.Tensor(y), 3)[1]
            assert torch.equal(found, expected)
    assert len(current_devices) == 3 * THREADS  # faiss takes the stream of the current device, which must be the rows'
    assert set(current_devices) == {x.device}


@pytest.mark.parametrize("faiss", [None, Faiss(gpus=0), ModuleType("faiss")], ids=["none", "no GPU", "built for CPUs"])
def test_torch_searches_on_a_gpu_where_faiss_does_not(
    monkeypatch: pytest.MonkeyPatch, faiss: ModuleType | None, current_devices: list[object]
) -> None:
    if faiss is not None:
        faiss.__spec__ = ModuleSpec("faiss", None)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    x, y = on_gpu(5), on_gpu(20)
    if faiss is None:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(backends.nearest(x, y, 3)[1], nearest_float32(torch.Tensor(x), torch.Tensor(y), 3)[1])
    assert torch.equal(backends.largest(x, y, 3)[1], largest_float32(torch.Tensor(x), torch.Tensor(y), 3)[1])
    assert current_devices == []


def test_torch_searches_on_a_processor_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    x, y = torch.Tensor(on_gpu(5)), torch.Tensor(on_gpu(20))
    assert torch.equal(backends.nearest(x, y, 3)[1], nearest_float32(x, y, 3)[1])


def test_a_worker_on_processors_beside_gpus_begins_no_use_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*args: object) -> None:
        raise AssertionError("a context on a GPU was made")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_lazy_init", "synchronize", "current_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, begin)
    backends.bf16_products_are_faster.__wrapped__(torch.device("cpu"))
    assert backends.least_seconds(lambda: None, 2) >= 0
    assert not backends.triton_is_faster.__wrapped__(torch.device("cpu"))
