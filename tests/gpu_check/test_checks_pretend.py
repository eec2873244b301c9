"""Checks on the pretend GPU: no tensors of mixed devices, no operation that CUDA refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grappa_dist.gpu_check.checks import CHECKS, THREADS
from grappa_dist.gpu_check.report import OK
from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu

pytestmark = pytest.mark.long

LEFT_OUT = {  # what it cannot pretend: a compiler's output that runs on it, and a memory that is full
    "kernel",
    "compile",
    "lack-of-memory",
}
MORE_THREADS = {f"{rate}-{threads}" for rate in ("embed", "adapt") for threads in THREADS[:-1]}
CHECKED = [check.name for check in CHECKS if check.name not in LEFT_OUT | MORE_THREADS]


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendGpu]:
    if reason := why_not():
        pytest.skip(reason)
    with PretendGpu() as process:
        yield process


@pytest.mark.parametrize("name", CHECKED)
def test_a_check_passes_on_the_pretend_gpu(gpu: PretendGpu, name: str) -> None:
    ((state, line),) = gpu.run("tests.gpu_check.pretended:state_of", name=name)
    assert state == OK, line
