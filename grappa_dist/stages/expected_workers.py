"""The workers that a run will have, as far as this machine can say without starting Ray, and what jobs make of them."""

from __future__ import annotations

import os

import torch

from grappa_dist.config import Resources


def known_workers(where: Resources) -> int | None:
    """How many workers there will be, as far as this machine can say without starting Ray."""
    if where.workers != "auto":
        return where.workers
    if os.environ.get("RAY_ADDRESS") or may_have_gpus(where):
        return None
    return max(1, (where.num_cpus or os.cpu_count() or 1) // where.cpus_per_worker)


def may_have_gpus(where: Resources) -> bool:
    """Whether workers have GPUs, or might where this machine cannot say."""
    if where.gpus_per_worker != "auto":
        return where.gpus_per_worker > 0
    return bool(os.environ.get("RAY_ADDRESS")) or torch.cuda.is_available()


def ranks_of(where: Resources, workers: int | None) -> int:
    """Ranks of an adaptor job on so many workers; with elastic no more than there are."""
    return max(1, min(where.adapt_ranks, workers)) if where.elastic and workers is not None else where.adapt_ranks
