"""Float searches on what this machine has.

A search only proposes (search/rerank.py, ops/knn.py decide), so which library answers, with how many threads, cannot
change a result: faiss on the CPU, faiss on a GPU where it was built for one, torch on a GPU where it was not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from grappa_dist.ops.knn import largest_in_floats
from grappa_dist.search.candidates import nearest_in_floats


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
