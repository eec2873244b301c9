"""Checks on the pretend GPU: no tensors of mixed devices, no operation that CUDA refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grappa_dist.gpu_check.report import OK
from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu

pytestmark = pytest.mark.long

CHECKED = ("limit-bf16", "memory", "copy-h2d", "copy-d2h", "softmax", "kmeans", "knn", "algorithm-1", "resume")
CHECKED += ("rate-forward", "rate-step", "rate-assign", "rate-knn", "rate-graph", "rate-kmeans", "adapt-2")


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
