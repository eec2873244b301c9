"""Float searches on what this machine has.

A search only proposes (search/rerank.py, knn/block_search.py decide), so which library answers, with how many threads,
cannot change a result: faiss on the CPU, faiss on a GPU where it was built for one, torch on a GPU where it was not.

What is the fastest way to propose centroids on this machine: asked of the machine itself, once.

A trial decides about speed alone, since whatever is proposed, exact integers decide.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grappa_dist.search.bf16 import Bf16Generator, TritonGenerator
from grappa_dist.search.candidates import (
    CandidateGenerator,
    Candidates,
    Centroids,
    Float32Generator,
    largest_in_floats,
    nearest_in_floats,
)
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square, to_grid


def nearest(x: Tensor, targets: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t smallest float32 squared distances per row, (P, t), ascending, and their indices."""
    if x.is_cuda and not _faiss_gpus():
        return nearest_in_floats(x, targets, t)
    return _faiss_search(x, targets, t, "METRIC_L2")


def largest(x: Tensor, targets: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t largest float32 inner products per row, (P, t), descending, and their indices."""
    if x.is_cuda and not _faiss_gpus():
        return largest_in_floats(x, targets, t)
    return _faiss_search(x, targets, t, "METRIC_INNER_PRODUCT")


def _faiss_search(x: Tensor, targets: Tensor, t: int, metric: str) -> tuple[Tensor, Tensor]:
    import faiss

    if x.is_cuda:
        import faiss.contrib.torch_utils  # lets knn_gpu take tensors, on torch's stream

        # faiss keeps true float32 products (no TF32), as the error bound wants.
        return faiss.knn_gpu(_gpu_resources(), x, targets, t, metric=getattr(faiss, metric), device=x.device.index)
    faiss.omp_set_num_threads(torch.get_num_threads())  # its own default is every core, also those of other ranks
    values, indices = faiss.knn(x.numpy(), targets.numpy(), t, metric=getattr(faiss, metric))
    return torch.from_numpy(values), torch.from_numpy(indices)


@cache
def _faiss_gpus() -> int:
    try:
        import faiss
    except ModuleNotFoundError:
        return 0
    return int(faiss.get_num_gpus())


@cache
def _gpu_resources() -> Any:
    import faiss

    return faiss.StandardGpuResources()


_KNOWN_SUMS = ("x86_64", "AMD64")
_TRIED_ROWS, _TRIALS, _RUNS = 2048, 12, 2
_GPU_ROWS, _GPU_CENTROIDS, _DIM = 16384, 4096, 384
_GAIN = 1.3  # what is less sharp must be so much faster


def bf16_pays(device: torch.device) -> bool:
    """Whether rows are better rounded to bfloat16 here."""
    return triton_pays(device) if device.type == "cuda" else bf16_products_pay(device)


def bf16_generator(device: torch.device, rest: float) -> Bf16Generator:
    """The one for rows of which rounding takes at most `rest`."""
    return TritonGenerator(rest) if device.type == "cuda" else Bf16Generator(rest)


@cache
def bf16_products_pay(device: torch.device) -> bool:
    """Whether products in bfloat16, with their sums in float32, are the faster ones on this processor.

    One without them imitates them, slowly. And processors other than those of x86 do not round each sum to the nearest
    float32, as the error bound wants.
    """
    if device.type != "cpu" or platform.machine() not in _KNOWN_SUMS or not torch.backends.mkldnn.is_available():
        return False
    x, c = torch.ones(_TRIED_ROWS, _DIM), torch.ones(256, _DIM)
    halves = x.bfloat16(), c.bfloat16().T
    full = half = math.inf
    for _ in range(_TRIALS):  # some of them may be disturbed by what else the machine does
        half = min(half, least_seconds(lambda: halves[0] @ halves[1], _RUNS))
        full = min(full, least_seconds(lambda: x @ c.T, _RUNS))
        if _GAIN * half < full:
            return True
    return False


@cache
def triton_pays(device: torch.device) -> bool:
    """Whether the fused kernel compiles on this GPU, keeps to the error that it states, and is the faster way."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    draws = torch.Generator().manual_seed(0)
    x, c = (
        to_grid(torch.nn.functional.normalize(torch.randn(n, _DIM, generator=draws), dim=1)).to(device)
        for n in (_GPU_ROWS, _GPU_CENTROIDS)
    )
    fused, floats = TritonGenerator(TritonGenerator.left_out(x)), Float32Generator(nearest)
    try:
        if not within_error_bound(fused, x[:256], c):
            return False
    except Exception:  # whatever a compiler for another GPU may raise: then it is not used
        return False
    fast, sharp = (least_seconds(_proposing(way, x, c), 3 * _RUNS) for way in (fused, floats))
    return _GAIN * fast < sharp


def within_error_bound(generator: CandidateGenerator, x: Tensor, c: Tensor) -> bool:
    """Whether a proposer's estimates for grid rows keep to the error that it states, by exact integers."""
    exact = (exact_square(x)[:, None] + exact_square(c) - 2 * exact_dot(x, c)) / GRID**2
    found = _proposing(generator, x, c)()
    over = found.distances.double() - exact.gather(1, found.labels)
    first_is_near = over[:, 0].abs() <= found.error
    others_are_not_above = (over <= found.error) | found.distances.isinf()
    none_is_missed = exact.min(1).values >= found.distances[:, 0].double() - found.error
    return bool(first_is_near.all() and others_are_not_above.all() and none_is_missed.all())


def _proposing(generator: CandidateGenerator, x: Tensor, c: Tensor) -> Callable[[], Candidates]:
    centroids, squares = Centroids.of(c, generator), exact_square(x)
    rows = generator.rows([x], squares, squares / GRID**2, within_base=False)
    return lambda: generator.nearest(rows, centroids, min(generator.places, len(c)))


def least_seconds(work: Callable[[], object], runs: int) -> float:
    """Of the fastest of so many runs, each until a GPU has done what it was asked for."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)
