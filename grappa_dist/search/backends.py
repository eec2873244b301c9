"""Which float search runs on this machine: faiss or torch, bfloat16 or float32. A matter of speed, never of the result.

A search only generates candidates (search/rerank.py and knn/block_search.py decide in exact integers): faiss on the
CPU, faiss on a GPU where it was built for one, and torch wherever it is not installed or not built for GPUs. Whether
bfloat16 is faster is measured once per process.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import time
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from grappa_dist.progress import trial_lost
from grappa_dist.search.bf16 import Bf16Generator, TritonGenerator
from grappa_dist.search.candidates import (
    CandidateGenerator,
    Candidates,
    Centroids,
    Float32Generator,
    largest_float32,
    nearest_float32,
)
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid

_KNOWN_SUMS = ("x86_64", "AMD64")  # processors that round each sum to the nearest float32, as the error bound requires
_TRIED_ROWS, _TRIALS, _RUNS = 2048, 12, 2
_GPU_ROWS, _GPU_CENTROIDS, _DIM = 16384, 4096, 384
_KERNEL = "the fused kernel of k-means"
_GAIN = 1.3  # bfloat16 is used where it is faster by this factor, since it leaves more rows to exact integers


def nearest(x: Tensor, targets: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t smallest float32 squared distances per row, (P, t), ascending, and their indices."""
    if not _has_faiss(on_gpu=x.is_cuda):
        return nearest_float32(x, targets, t)
    return _faiss_search(x, targets, t, "METRIC_L2")


def largest(x: Tensor, targets: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t largest float32 inner products per row, (P, t), descending, and their indices."""
    if not _has_faiss(on_gpu=x.is_cuda):
        return largest_float32(x, targets, t)
    return _faiss_search(x, targets, t, "METRIC_INNER_PRODUCT")


def _faiss_search(x: Tensor, targets: Tensor, t: int, metric: str) -> tuple[Tensor, Tensor]:
    import faiss

    if x.is_cuda:
        return _gpu_search().knn(x, targets, t, getattr(faiss, metric))
    faiss.omp_set_num_threads(torch.get_num_threads())  # its own default is every core, also those of other ranks
    values, indices = faiss.knn(x.numpy(), targets.numpy(), t, metric=getattr(faiss, metric))
    return torch.from_numpy(values), torch.from_numpy(indices)


@cache
def _has_faiss(*, on_gpu: bool) -> bool:
    """Whether faiss is installed, and searches there."""
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    return not on_gpu or (hasattr(faiss, "StandardGpuResources") and int(faiss.get_num_gpus()) > 0)


class _GpuSearch:
    """faiss's search on GPUs, for any thread.

    Its resources (streams and temporary memory) must not be used by two threads at a time, so nothing else sees them,
    and one search after the other is given to the GPU, which works on one at a time anyway. faiss makes a search wait
    for the one before where their streams differ.
    """

    def __init__(self) -> None:
        import faiss
        import faiss.contrib.torch_utils  # lets knn_gpu take tensors, on torch's stream of the current device

        self._knn, self._resources, self._lock = faiss.knn_gpu, faiss.StandardGpuResources(), Lock()

    def knn(self, x: Tensor, targets: Tensor, t: int, metric: int) -> tuple[Tensor, Tensor]:
        """True float32 products (no TF32), as the error bound requires."""
        with self._lock, torch.cuda.device(x.device):
            return self._knn(self._resources, x, targets, t, metric=metric, device=x.device.index)


@cache
def _gpu_search() -> _GpuSearch:
    return _GpuSearch()


def bf16_is_faster(device: torch.device) -> bool:
    """Whether candidates are generated faster from rows rounded to bfloat16 on this device."""
    return triton_is_faster(device) if device.type == "cuda" else bf16_products_are_faster(device)


def bf16_generator(device: torch.device, residual: float) -> Bf16Generator:
    """The generator of this device, for rows from which rounding takes at most `residual`."""
    return TritonGenerator(residual) if device.type == "cuda" else Bf16Generator(residual)


@cache
def bf16_products_are_faster(device: torch.device) -> bool:
    """Whether products in bfloat16, with their sums in float32, are faster than those in float32 on this processor.

    A processor without them emulates them, slowly.
    """
    if device.type != "cpu" or platform.machine() not in _KNOWN_SUMS or not torch.backends.mkldnn.is_available():
        return False
    x, c = torch.ones(_TRIED_ROWS, _DIM), torch.ones(256, _DIM)
    x_bf16, c_bf16 = x.bfloat16(), c.bfloat16()
    float32_s = bf16_s = math.inf
    for _ in range(_TRIALS):  # some of them may be disturbed by other work of the machine
        bf16_s = min(bf16_s, least_seconds(lambda: x_bf16 @ c_bf16.T, _RUNS))
        float32_s = min(float32_s, least_seconds(lambda: x @ c.T, _RUNS))
        if _GAIN * bf16_s < float32_s:
            return True
    return False


@cache
def triton_is_faster(device: torch.device) -> bool:
    """Whether the fused kernel compiles on this GPU, satisfies its error bound, and is faster than float32.

    Where it does not work, a trial is lost (`progress.lost_trials`).
    """
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        trial_lost(_KERNEL, "triton is not installed")
        return False
    rng = torch.Generator().manual_seed(0)
    x, c = (
        to_grid(torch.nn.functional.normalize(torch.randn(n, _DIM, generator=rng), dim=1)).to(device)
        for n in (_GPU_ROWS, _GPU_CENTROIDS)
    )
    fused, float32 = TritonGenerator(TritonGenerator.residual_norm(x)), Float32Generator(nearest)
    try:
        if not within_error_bound(fused, x[:256], c):
            trial_lost(_KERNEL, "its scores are further from the exact ones than its error bound allows")
            return False
    except Exception as error:  # whatever a compiler for another GPU may raise: then the kernel is not used
        trial_lost(_KERNEL, error)
        return False
    fused_s, float32_s = (least_seconds(_candidate_search(way, x, c), 3 * _RUNS) for way in (fused, float32))
    return _GAIN * fused_s < float32_s


def within_error_bound(generator: CandidateGenerator, x: Tensor, c: Tensor) -> bool:
    """Whether a generator's estimates for grid rows satisfy its error bound, by exact integers."""
    exact = (exact_square(x)[:, None] + exact_square(c) - 2 * exact_dot(x, c)) / GRID**2
    found = _candidate_search(generator, x, c)()
    over = found.distances.double() - exact.gather(1, found.labels)
    first_is_near = over[:, 0].abs() <= found.error
    others_are_not_above = (over <= found.error) | found.distances.isinf()
    none_is_missed = exact.min(1).values >= found.distances[:, 0].double() - found.error
    return bool(first_is_near.all() and others_are_not_above.all() and none_is_missed.all())


def _candidate_search(generator: CandidateGenerator, x: Tensor, c: Tensor) -> Callable[[], Candidates]:
    centroids, squares = Centroids.of(c, generator), exact_square(x)
    rows = generator.rows([x], squares, squares / GRID**2, within_base=False)
    return lambda: generator.nearest(rows, centroids, min(generator.num_candidates, len(c)))


def least_seconds(work: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of several runs, each until a GPU has finished its work.

    A process that has not used CUDA yet, such as a worker on CPUs beside GPUs, does not begin to: a context would take
    half a GiB of a GPU that others use.
    """
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)
