"""How many workers a run will have, how adaptor sets form jobs, and which workers each job gets; without Ray.

Shapes: W workers on nodes; J jobs of R ranks, a worker each; N adaptor sets, S of them in a job.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from grappa_dist.config import Resources
from grappa_dist.console import pluralize
from grappa_dist.prefetch import CPU_THREADS

Item = TypeVar("Item")
Worker = TypeVar("Worker")


def known_workers(where: Resources) -> int | None:
    """How many workers there will be; None where that cannot be known without starting Ray."""
    if where.workers != "auto":
        return where.workers
    if os.environ.get("RAY_ADDRESS") or may_have_gpus(where):
        return None
    return max(1, cores_of_ray(where) // cpus_per_worker(where, ()))


def cores_of_ray(where: Resources) -> int:
    """CPUs of the Ray that a run starts on this machine."""
    return where.num_cpus or os.cpu_count() or 1


def cpus_per_worker(where: Resources, nodes: Iterable[tuple[float, float]]) -> int:
    """`resources.cpus_per_worker`, with `auto` resolved: a GPU's part of the CPUs of its node, or 1 without GPUs.

    Args:
        nodes: CPUs and GPUs of each; where their parts differ, the smallest counts.
    """
    if where.cpus_per_worker != "auto":
        return where.cpus_per_worker
    parts = [int(cpus // gpus) for cpus, gpus in nodes if gpus] if where.gpus_per_worker != 0 else []
    return max(1, min(parts, default=1))


def decode_threads(where: Resources, cpus: int, *, gpu: bool) -> int:
    """`resources.decode_threads`, with `auto` resolved: a thread for each CPU of a worker with a GPU, else CPU_THREADS.

    Args:
        cpus: of a worker.
    """
    if where.decode_threads != "auto":
        return where.decode_threads
    return cpus if gpu else CPU_THREADS


@dataclass(frozen=True)
class WorkerParts:
    """What a worker of a Ray on this machine has."""

    cpus: int
    decode_threads: int
    gpu: bool

    @staticmethod
    def here(where: Resources) -> WorkerParts:
        gpu = may_have_gpus(where) and torch.cuda.is_available()
        cpus = cpus_per_worker(where, [(cores_of_ray(where), torch.cuda.device_count() if gpu else 0)])
        return WorkerParts(cpus, decode_threads(where, cpus, gpu=gpu), gpu)

    def threads(self, where: Resources) -> int:
        """`resources.threads`, with `auto` resolved."""
        return self.cpus if where.threads == "auto" else where.threads


def may_have_gpus(where: Resources) -> bool:
    """Whether workers have GPUs; True also where a remote cluster may have some."""
    if where.gpus_per_worker != "auto":
        return where.gpus_per_worker > 0
    return bool(os.environ.get("RAY_ADDRESS")) or torch.cuda.is_available()


def has_gpus(where: Resources) -> bool:
    """Whether it is known that workers will have GPUs; False also where only a remote cluster knows."""
    return where.gpus_per_worker == 1 or (may_have_gpus(where) and not os.environ.get("RAY_ADDRESS"))


def ranks_of(where: Resources, workers: int | None) -> int:
    """Ranks of an adaptor job; with elastic at most the number of workers."""
    return max(1, min(where.adapt_ranks, workers)) if where.elastic and workers is not None else where.adapt_ranks


@dataclass(frozen=True)
class Rates:
    """Seconds per image on one worker: what a job does once for all of its sets, and what it does for each."""

    decode_s: float
    shared_s: float  # patch embedding and the first block
    set_s: float
    overlap: bool  # whether decoding runs beside the training (on a GPU) or takes time from it (CPUs do both)

    def image_s(self, num_sets: int) -> float:
        """Seconds per image in a job of `num_sets` sets."""
        train_s = self.shared_s + num_sets * self.set_s
        return max(self.decode_s, train_s) if self.overlap else self.decode_s + train_s


def sets_per_job(num_sets: int, slots: int, rates: Rates, most: int | None = None) -> int:
    """How many sets a job should train so that all of them are done soonest, with `slots` jobs side by side.

    The lowest of equally fast numbers: small jobs lose less when one dies.

    Args:
        most: sets that a job's memory holds.
    """
    numbers = range(1, min(num_sets, most or num_sets) + 1)

    def seconds(per_job: int) -> float:
        jobs = -(-num_sets // per_job)
        return -(-jobs // slots) * rates.image_s(per_job)

    fastest = min(map(seconds, numbers))
    return next(s for s in numbers if seconds(s) <= fastest * (1 + 1e-9))


def split_evenly(items: Sequence[Item], per_group: int) -> list[tuple[Item, ...]]:
    """The fewest groups of at most `per_group` items, in order, whose sizes differ by at most one."""
    if per_group < 1:
        raise ValueError(f"a group must hold at least one item, got {per_group}")
    count = -(-len(items) // per_group)
    bounds = [len(items) * i // count for i in range(count + 1)] if count else []
    return [tuple(items[a:b]) for a, b in pairwise(bounds)]


class FreeWorkers(Generic[Worker]):
    """The free workers by node. What adding and taking cost grows with the workers of a node, not with all of them.

    Args:
        node_of: the node of a worker.
    """

    def __init__(self, node_of: Callable[[Worker], Hashable], workers: Iterable[Worker] = ()) -> None:
        self._node_of, self._number = node_of, 0
        self._by_node: dict[Hashable, deque[Worker]] = {}
        self._nodes_with: dict[int, dict[Hashable, None]] = {}  # by how many free workers they have
        self.add(workers)

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Worker]:
        return (worker for of_node in self._by_node.values() for worker in of_node)

    def add(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            node = self._node_of(worker)
            of_node = self._by_node.setdefault(node, deque())
            of_node.append(worker)
            self._note(node, len(of_node) - 1)

    def take(self, ranks: int) -> list[Worker] | None:
        """The workers of the next job, which are free no more; None where there are too few.

        They are on one node if any node has enough of them, the one that is left with the fewest; else on the nodes
        with the most, so that the job spans as few nodes as possible.
        """
        if ranks < 1:
            raise ValueError(f"a job needs at least one worker, got {ranks}")
        if self._number < ranks:
            return None
        taken = list[Worker]()
        enough = min((count for count in self._nodes_with if count >= ranks), default=0)
        while len(taken) < ranks:
            count = enough or max(self._nodes_with)
            node = next(iter(self._nodes_with[count]))
            taken += [self._by_node[node].popleft() for _ in range(min(count, ranks - len(taken)))]
            self._note(node, count)
        return taken

    def _note(self, node: Hashable, before: int) -> None:
        """Notes how many free workers a node has, which it had `before`."""
        now = len(self._by_node[node])
        self._number += now - before
        if before:
            del self._nodes_with[before][node]
            if not self._nodes_with[before]:
                del self._nodes_with[before]
        if now:
            self._nodes_with.setdefault(now, {})[node] = None
        else:
            del self._by_node[node]


def waves(num_jobs: int, workers: int, ranks: int) -> list[int]:
    """How many jobs run at once, wave after wave, if all take equally long.

    Raises:
        ValueError: a job has more ranks than there are workers: it could never start.
    """
    check_capacity(workers, ranks)
    full, rest = divmod(num_jobs, workers // ranks)
    return [workers // ranks] * full + [rest] * (rest > 0)


def check_capacity(workers: int, ranks: int) -> None:
    """Raises ValueError where a job of so many ranks can never run."""
    if ranks > workers:
        raise ValueError(
            f"resources.adapt_ranks={ranks} is more than the {pluralize(workers, 'worker')}: "
            f"{ranks - workers} missing; lower it, or raise resources.workers"
        )


def describe_placement(num_jobs: int, workers: int, ranks: int) -> str:
    """One line: how many jobs run at once, in how many waves, and how many workers are idle.

    Raises:
        ValueError: a job has more ranks than there are workers.
    """
    sizes = waves(num_jobs, workers, ranks)
    if not sizes:
        return "nothing to place"
    several = "one after the other" if sizes[0] == 1 else f"{sizes[0]} at a time"
    order = several if len(sizes) > 1 else "all at once"
    rest = f", {sizes[-1]} in the last" if sizes[-1] != sizes[0] else ""
    idle = workers - sizes[0] * ranks
    line = f"{pluralize(num_jobs, 'job')} of {pluralize(ranks, 'rank')}, {order}{rest}"
    line += f", in {len(sizes)} waves" if len(sizes) > 1 else ""
    return line + (f"; {idle} of {workers} workers idle" if idle else "")
