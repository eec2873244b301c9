"""How fast rows are clustered and compared: k-means, its assignment, the exact k-NN graph, and the one through lists.

Shapes: P rows, D dimensions, K centroids, k neighbours, m rows of a sample.
"""

from __future__ import annotations

import os
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from grappa_dist.config import ClusteringConfig
from grappa_dist.console import pluralize
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.device_rows import memory_for_rows
from grappa_dist.gpu_check.checks import BF16, FP32, TERA, Figure, Found, Machine
from grappa_dist.gpu_check.limits import fastest_s, wait_for
from grappa_dist.gpu_check.rows import SEED, sharded
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, kmeans
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Graph, approximate_knn
from grappa_dist.search.candidates import Centroids, largest_float32
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.search.rerank import assign

FLASH_FLOPS = 2 * 268e6 * 128 * 16384 / 7.7  # of flash-kmeans, as published for one H200: an iteration in 7.7 s
SLOWER = 1.5  # than that an iteration is to be at most
GRAPH_S, RECALL = 60.0, 0.95  # that the graph of 10^6 rows is to take at most, and to reach
SAMPLE = 512  # rows whose neighbours are compared with the true ones
_SAMPLE_ERROR = 0.02  # three standard errors of a share of 0.95 of so many lists
_GROUP_ROWS = 250
_BLOCK = 2**17  # rows drawn at once
_FORM_BYTES = 3  # of each value in bfloat16, with what fills whole tiles
_HOST_SHARE = 0.4  # of free memory, for the rows


def drawn_rows(num: int, dim: int, groups: int, device: torch.device) -> NDArray[np.float32]:
    """Unit rows (P, D) on the grid, in groups: drawn on the device, in seconds, and others on every kind of device."""
    torch.manual_seed(SEED)
    centres, rows = torch.randn(groups, dim, device=device), torch.empty(num, dim)
    for some in rows.split(_BLOCK):
        group = torch.randint(groups, (len(some),), device=device)
        drawn = centres.index_select(0, group).add_(torch.randn(len(some), dim, device=device))
        some.copy_(to_grid(F.normalize(drawn, dim=1)))
    found: NDArray[np.float32] = rows.numpy()
    return found


def assign_rate(machine: Machine) -> Found:
    """Rows/s assigned to the nearest of K random rows, exactly; 2 P K D operations, against the bfloat16 limit."""
    num, k, dim = machine.sized((2**20, 16384, 384), (2048, 64, 24))
    x = drawn_rows(num, dim, 4096, machine.device)
    rows = sharded(x, machine.device)
    centroids = Centroids.of(torch.from_numpy(x[:: num // k][:k].copy()).to(machine.device), rows.generator)
    blocks = [(block.x, block.squares) for block in rows.row_blocks()]

    def work() -> None:
        for some, squares in blocks:
            assign(some, centroids, squares=squares)

    speed = num / fastest_s(work, machine.device, 3)
    flops = 2.0 * speed * k * dim
    share = machine.share(flops, BF16)
    reached = Figure("", flops / TERA, "TFLOP/s", share, BF16)
    what = f"{num:,} x {dim} to K = {k:,} by {type(rows.generator).__name__}"
    return Found(what, (Figure("", speed, "rows/s"), reached, *_anchor(machine, flops)))


def _anchor(machine: Machine, flops: float) -> tuple[Figure, ...]:
    what = "of flash-kmeans' published operations/s on an H200:"
    return () if machine.tiny else (Figure(what, flops / FLASH_FLOPS, "x"),)


def kmeans_rate(machine: Machine) -> Found:
    """Seconds of an iteration of k-means, its update included, on as many rows as memory holds; 2 P K D operations."""
    wanted, k, dim = machine.sized((10**7, 10**5, 384), (2048, 64, 24))
    num = wanted if machine.tiny else min(wanted, rows_that_fit(machine.device, dim))
    machine.log(f"drawing {num:,} rows")
    x = drawn_rows(num, dim, k, machine.device)
    rows, ended = sharded(x, machine.device, _BLOCK), list[float]()

    def on_update(state: KMeansState) -> None:
        wait_for(machine.device)
        ended.append(time.monotonic())
        machine.log(f"{pluralize(len(ended) - 1, 'update')} of K = {k:,}")

    config = ClusteringConfig(num_labels=(k,), iterations=2, tolerance=0.0)
    kmeans(rows, k, KMeansTask(config, initial=x[:: num // k][:k].copy(), on_update=on_update))
    seconds = ended[-1] - ended[-2]
    flops = 2.0 * num * k * dim / seconds
    figures = [
        Figure("an iteration", seconds, "s"),
        Figure("", flops / TERA, "TFLOP/s", machine.share(flops, BF16), BF16),
    ]
    figures += [] if machine.tiny else against_the_aim(num, wanted, seconds, flops)
    return Found(f"{num:,} x {dim}, K = {k:,}", (*figures, *_anchor(machine, flops)))


def against_the_aim(num: int, wanted: int, seconds: float, flops: float) -> list[Figure]:
    """The time as a multiple of the one aimed at; where fewer rows were taken, also the time of all by that."""
    aim = Figure("of the time aimed at:", FLASH_FLOPS / SLOWER / flops, "x")
    return [aim] if num == wanted else [Figure(f"by that, of {wanted:,} rows", seconds * wanted / num, "s"), aim]


def rows_that_fit(device: torch.device, dim: int) -> int:
    """Rows that stay on the device, and that the host has memory for; in steps of 10^5, and at least as many."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**35
    of_device = memory_for_rows(device) // ((4 + _FORM_BYTES) * dim)
    return max(1, min(int(_HOST_SHARE * host) // (4 * dim), of_device) // 10**5) * 10**5


def knn_rate(machine: Machine) -> Found:
    """Rows/s of the exact graph; each pair of rows once, P^2 D operations, against the bfloat16 limit."""
    num, dim, k = machine.sized((200_000, 384, 10), (1024, 24, 5))
    x = drawn_rows(num, dim, 4096, machine.device)
    ids = np.arange(num, dtype=np.int64)
    search = partial(sharded_knn, Comm(), x, ids, k, device=machine.device)
    seconds = fastest_s(search, machine.device, 1)
    flops = float(num) ** 2 * dim / seconds
    reached = Figure("", flops / TERA, "TFLOP/s", machine.share(flops, BF16), BF16)
    return Found(f"{pluralize(num, 'row')} x {dim}, {k} neighbours", (Figure("", num / seconds, "rows/s"), reached))


def graph_rate(machine: Machine) -> Found:
    """Seconds of the graph through lists, as a run makes it, and its recall, measured here as well.

    Compared pairs take 2 D operations, in float32; those by which lists are found are not counted.
    """
    num, dim, k = machine.sized((10**6, 384, 10), (1500, 24, 5))
    machine.log(f"drawing {num:,} rows")
    x, ids = drawn_rows(num, dim, -(-num // _GROUP_ROWS), machine.device), np.arange(num, dtype=np.int64)
    wait_for(machine.device)
    began = time.monotonic()
    graph = approximate_knn(
        Comm(), x, ids, k, recall_floor=RECALL, key=(SEED, 0), log=machine.log, device=machine.device
    )
    seconds = time.monotonic() - began
    recall = true_share(x, graph, machine.device)
    flops = 2.0 * float(num) ** 2 * graph.recall.searched_share * dim / seconds
    figures = (
        Figure("", seconds, "s", None if machine.tiny else seconds / GRAPH_S, f"the {GRAPH_S:.0f} s aimed at"),
        Figure("", num / seconds, "rows/s"),
        Figure("", flops / TERA, "TFLOP/s", machine.share(flops, FP32), FP32),
        Figure("recall", recall, ""),
    )
    found = graph.recall
    how = (
        f"{found.probes} of {found.lists} lists" if found.searched == "lists" else "all pairs, as lists do not suffice"
    )
    wrong = f"of the true neighbours {recall:.1%} were found" if recall < RECALL - _SAMPLE_ERROR else ""
    return Found(f"{pluralize(num, 'row')} x {dim}, {k} neighbours, by {how}", figures, wrong)


def true_share(x: NDArray[np.float32], graph: Graph, device: torch.device) -> float:
    """The share of the true neighbours of some rows that a graph has, by products in float32."""
    places, k = np.arange(0, len(x), max(1, len(x) // SAMPLE))[:SAMPLE], graph.ids.shape[1]
    queries, near = torch.from_numpy(x[places]).to(device), list[tuple[torch.Tensor, torch.Tensor]]()
    for start in range(0, len(x), _BLOCK):
        some = torch.from_numpy(x[start : start + _BLOCK]).to(device)
        values, columns = largest_float32(queries, some, min(k + 1, len(some)))
        near.append((values, columns + start))
    values, columns = (torch.cat(parts, 1) for parts in zip(*near, strict=True))
    found = columns.gather(1, values.topk(k + 1, dim=1).indices).cpu().numpy()  # one of them is the row itself
    shares = [
        len(set(graph.ids[place].tolist()) & set(true.tolist()) - {place}) / k
        for place, true in zip(places.tolist(), found, strict=True)
    ]
    return float(np.mean(shares))
