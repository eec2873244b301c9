"""What the driver does by itself: it lists shards, plans a run, and gives jobs and tasks to workers.

Shards are sparse tars with a header in front of the first and of the last image, and an index beside them, so that a
billion rows take a few kilobytes a shard. Workers are stand-ins that answer at once, so what is measured is the
driver's own work; what Ray itself needs comes on top. Everything is done at half the size as well: twice as many shards
or workers should take twice as long.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness import Log, aligned, aligned_header, check_positive, machine, memory_growth
from grappa_dist.artifacts import Store, label_rows
from grappa_dist.config import BackboneConfig, Config, DataConfig, Resources
from grappa_dist.data.epoch_order import EpochOrder
from grappa_dist.data.index import COMMITTED, INDEX_VERSION, ROW
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import EndedCalls, Job, Runner
from grappa_dist.plan import plan

LISTING, PLACEMENT = "listing", "placement"
IMAGE_BYTES = 1000  # of an image that a synthetic shard says that it has
_BLOCK, _BATCH = 512, 128
_BACKBONE = "grappa_dist.demo.backbone:create"


# Shards


def write_listing(folder: Path, shards: int, rows: int) -> None:
    """Sparse tars of `rows` images each, and the index of a finished folder: two files of some blocks for each."""
    folder.mkdir(parents=True)
    member = tarfile.TarInfo("x.jpg")
    member.size = IMAGE_BYTES
    header, step = member.tobuf(), _BLOCK + -(-IMAGE_BYTES // _BLOCK) * _BLOCK
    places = np.zeros(rows, ROW)
    places["offset"], places["size"] = np.arange(rows, dtype=np.uint64) * step + _BLOCK, IMAGE_BYTES
    buffer = io.BytesIO()
    np.save(buffer, places)
    index, size, lines = buffer.getvalue(), step * rows + 2 * _BLOCK, []
    of_first = len(index) - (rows - 1) * ROW.itemsize
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        _write_sparse(folder / name, {0: header, step * (rows - 1): header}, size)
        _write_sparse(
            folder / f"{name}.npy", {0: index[:of_first], len(index) - ROW.itemsize: index[-ROW.itemsize :]}, len(index)
        )
        fingerprint = hashlib.sha256(name.encode()).hexdigest()
        lines.append({"name": name, "rows": rows, "bytes": size, "fingerprint": fingerprint, "ignored": 0})
    time.sleep(0.01)  # the index is the newest file, as a writer leaves it
    (folder / COMMITTED).write_text(json.dumps({"version": INDEX_VERSION, "shards": lines}), encoding="utf-8")


def _write_sparse(path: Path, parts: dict[int, bytes], size: int) -> None:
    with path.open("wb") as file:
        for start, data in parts.items():
            file.seek(start)
            file.write(data)
        file.truncate(size)


@dataclass(frozen=True)
class Listing:
    """CPU seconds and bytes of one number of shards."""

    shards: int
    plan_s: float
    plan_bytes: int  # by which the process grows
    open_s: float
    order_s: float  # the order of an epoch, made
    batch_s: float  # the first batch of it
    images_bytes: int  # of the message that a job's ranks get: all shards
    part_bytes: int  # of one shard, which a task gets
    labels_bytes: int  # of the labels of all rows


def measure_listing(folder: Path) -> Listing:
    shards, opened_s, sizes = _of_images(folder)  # whose memory is free again
    config = Config(name="listing", data=DataConfig(train=(str(folder),)), backbone=BackboneConfig(name=_BACKBONE))
    (_, plan_s), grown = memory_growth(lambda: _cpu(lambda: plan(config, folder / "nowhere")))
    return Listing(shards, plan_s, grown, *opened_s, *sizes)


def _of_images(folder: Path) -> tuple[int, tuple[float, float, float], tuple[int, int, int]]:
    """The number of shards; CPU seconds to open them, to order an epoch and for a batch of it; bytes of messages."""
    images, open_s = _cpu(lambda: ImageShards.open([folder], None))
    order, order_s = _cpu(lambda: EpochOrder(images, np.zeros(0, np.int64), seed=0, epoch=0))
    _, batch_s = _cpu(lambda: order.batch(0, _BATCH))
    labels = label_rows(Store(folder).artifact("labels/k=64", {}, {}), images.starts, 64)
    of_all, of_one, of_labels = (len(pickle.dumps(one)) for one in (images, images.part(0), labels))
    return len(images.shards), (open_s, order_s, batch_s), (of_all, of_one, of_labels)


def _cpu(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and CPU seconds of this process."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


# Workers that answer at once


class _RayError(Exception):
    """A call failed; none does here."""


@dataclass(eq=False)
class _Ref:
    worker: StandIn
    method: str
    ended: Future[None] = field(default_factory=Future)

    def future(self) -> Future[None]:
        return self.ended


@dataclass(eq=False)
class StandIn:
    """The handle of a worker that answers at once, except that work ends when it is waited for."""

    ray: CountingRay
    node: str

    def __getattr__(self, method: str) -> Any:
        def remote(*_: Any) -> _Ref:
            self.ray.counts[method] += 1
            return self.ray.called(_Ref(self, method))

        call = SimpleNamespace(remote=remote)
        call.options = lambda **_: call
        return call


@dataclass
class CountingRay:
    """What the runner asks of Ray, counted. Each wait for an end that has not come lets one call of work end."""

    nodes_up: Sequence[str]
    counts: Counter[str] = field(default_factory=Counter)  # calls of workers' methods, and of Ray itself
    under_way: dict[_Ref, None] = field(default_factory=dict)  # work, the oldest first
    exceptions: ClassVar[Any] = SimpleNamespace(RayError=_RayError, GetTimeoutError=_RayError)

    def called(self, ref: _Ref) -> _Ref:
        if ref.method in ("run", "run_rank"):
            self.under_way[ref] = None
        else:
            ref.ended.set_result(None)
        return ref

    def end_one(self) -> None:
        """Ends the oldest call of work under way."""
        if self.under_way:
            ref = next(iter(self.under_way))
            del self.under_way[ref]
            ref.ended.set_result(None)

    def nodes(self) -> list[dict[str, Any]]:
        self.counts["nodes"] += 1
        have = {"Alive": True, "Resources": {"CPU": 1e6}}
        return [{"NodeID": name, "NodeManagerHostname": name, **have} for name in self.nodes_up]

    def wait(self, refs: list[_Ref], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[_Ref], list[_Ref]]:
        self.counts["wait"] += 1
        self.counts["references waited for"] += len(refs)
        ended = [ref for ref in refs if ref not in self.under_way][:num_returns]
        taken = set(ended)
        return ended, [ref for ref in refs if ref not in taken]

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        if isinstance(asked, list):
            return [self.get(ref) for ref in asked]
        return {"ready": asked.worker.node, "status": {}, "free_address": "node:1"}.get(asked.method, "done")

    def put(self, value: Any) -> Any:
        self.counts["put"] += 1
        return value

    def kill(self, worker: StandIn) -> None:
        self.counts["kill"] += 1


@dataclass
class _OneByOne(EndedCalls):
    """What has ended; a call of work ends when nothing else has."""

    ray: CountingRay = field(kw_only=True)

    def next(self, timeout_s: float) -> tuple[Any, Any, bool]:
        self.ray.counts["waits"] += timeout_s > 0
        if timeout_s and self.queue.empty():
            self.ray.end_one()
        return super().next(timeout_s)


@dataclass
class _StandInCluster(Cluster):
    """Workers that are stand-ins, on the nodes in turn."""

    def connect(self) -> None:
        pass

    def _new_worker(self) -> StandIn:
        ray: Any = sys.modules["ray"]
        ray.counts["actor"] += 1
        return StandIn(ray, ray.nodes_up[ray.counts["actor"] % len(ray.nodes_up)])


@contextmanager
def _instead_of_ray(ray: CountingRay) -> Iterator[None]:
    before = sys.modules.get("ray")
    sys.modules["ray"] = ray  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("ray")
        if before is not None:
            sys.modules["ray"] = before


@dataclass(frozen=True)
class Placing:
    """CPU seconds, and calls by their kind, of the start of all workers, of jobs, and of tasks."""

    workers: int
    jobs: int
    tasks: int
    seconds: tuple[float, float, float]
    counts: tuple[Counter[str], Counter[str], Counter[str]]
    grown: int  # bytes


def place(workers: int, nodes: int, jobs: tuple[int, int], tasks: int) -> Placing:
    """The driver's part of starting workers and running jobs (their number and ranks), then tasks, on stand-ins."""
    ray = CountingRay([f"node {n}" for n in range(nodes)])
    where = Resources(workers=workers, cpus_per_worker=1, gpus_per_worker=0)
    runner = Runner(_StandInCluster(where), where, ended=_OneByOne(ray=ray))
    parts: list[tuple[float, Counter[str]]] = []

    def measure(work: Callable[[], Any]) -> None:
        ray.counts.clear()
        _, seconds = _cpu(work)
        parts.append((seconds, Counter(ray.counts)))

    def work() -> None:
        measure(lambda: runner.num_workers)
        measure(lambda: runner.run_jobs([Job(f"job {n}", print, None, jobs[1]) for n in range(jobs[0])]))
        measure(lambda: runner.map(print, range(tasks)))

    with _instead_of_ray(ray):
        _, grown = memory_growth(work)
    (start_s, started), (jobs_s, of_jobs), (tasks_s, of_tasks) = parts
    return Placing(workers, jobs[0], tasks, (start_s, jobs_s, tasks_s), (started, of_jobs, of_tasks), grown)


# The command


@dataclass(frozen=True)
class DriverSettings:
    """Options of `bench.py driver`."""

    sections: tuple[str, ...] = (LISTING, PLACEMENT)
    shards: int = 2000
    rows: int = 10_000  # of a shard
    workers: int = 256
    nodes: int = 32
    jobs: int = 64
    ranks: int = 4  # of a job
    tasks: int = 4000

    def check(self) -> None:
        check_positive(self, "shards", "rows", "workers", "nodes", "jobs", "ranks", "tasks")
        if self.ranks > self.workers // 2:
            raise ValueError(f"--ranks must be at most {self.workers // 2}, half of --workers, got {self.ranks}")


def measure_listings(settings: DriverSettings, log: Log) -> list[Listing]:
    """Of half the shards, and of all."""
    found = []
    for shards in (max(1, settings.shards // 2), settings.shards):
        with tempfile.TemporaryDirectory(prefix="grappa-listing-") as folder:
            log(f"{shards} shards are made")
            write_listing(Path(folder) / "shards", shards, settings.rows)
            log(f"{shards} shards are listed")
            found.append(measure_listing(Path(folder) / "shards"))
    return found


def measure_placing(settings: DriverSettings, log: Log) -> list[Placing]:
    """With half of the workers, nodes, jobs and tasks, and with all."""
    found = []
    for part in (2, 1):
        log(f"{settings.workers // part} workers")
        workers, nodes = settings.workers // part, max(1, settings.nodes // part)
        jobs = max(1, settings.jobs // part)
        found.append(place(workers, nodes, (jobs, settings.ranks), max(1, settings.tasks // part)))
    return found


def listing_text(listings: Sequence[Listing], rows: int) -> str:
    half, whole = listings
    figures = {
        "open, CPU s": [one.open_s for one in (half, whole)],
        "--dry-run, CPU s": [one.plan_s for one in (half, whole)],
        "--dry-run, MB more memory": [one.plan_bytes / 1e6 for one in (half, whole)],
        "order of an epoch, CPU s": [one.order_s for one in (half, whole)],
        "its first batch, CPU ms": [1e3 * one.batch_s for one in (half, whole)],
        "message with all shards, MB": [one.images_bytes / 1e6 for one in (half, whole)],
        "message with one shard, kB": [one.part_bytes / 1e3 for one in (half, whole)],
        "message with labels of all rows, MB": [one.labels_bytes / 1e6 for one in (half, whole)],
    }
    head = [f"shards of {rows:,} rows", *(f"{one.shards:,}" for one in (half, whole)), "ratio"]
    return aligned([head, *(_line(name, values) for name, values in figures.items())])


def _line(name: str, values: Sequence[float]) -> list[str]:
    ratio = f"{values[1] / values[0]:.1f}" if values[0] else "-"
    return [name, *(f"{value:.4g}" for value in values), ratio]


def placement_text(placings: Sequence[Placing]) -> str:
    half, whole = placings
    lines = [["workers, jobs, tasks", *(f"{p.workers}, {p.jobs}, {p.tasks}" for p in (half, whole)), "ratio"]]
    for part, name in enumerate(("start", "jobs", "tasks")):
        lines.append(_line(f"{name}, CPU s", [one.seconds[part] for one in (half, whole)]))
        kinds = sorted({*half.counts[part], *whole.counts[part]})
        lines += [_line(f"{name}: {kind}", [one.counts[part][kind] for one in (half, whole)]) for kind in kinds]
    lines.append(_line("MB more memory", [one.grown / 1e6 for one in (half, whole)]))
    return aligned(lines)


SHORT = "what the driver does alone: lists shards, places jobs"
DESCRIPTION = """\
The driver's own work: listing many shards (sparse files, a few kilobytes each) and planning a run of them; starting
workers and giving them jobs and tasks, on stand-ins for Ray's workers that answer at once. Prints CPU seconds, memory,
bytes of messages and numbers of calls at half the size and at the whole: a ratio of 2 is linear."""
EXAMPLE = """example, a minute or two and 1 GB of disk:
  python launch/bench.py driver --shards 100000"""


def arguments(add: Callable[..., Any]) -> None:
    given = DriverSettings()
    add("--sections", nargs="+", choices=given.sections, default=list(given.sections))
    add("--shards", type=int, default=given.shards, metavar="N", help="default: %(default)s")
    add("--rows", type=int, default=given.rows, metavar="N", help="of a shard; default: %(default)s")
    add("--workers", type=int, default=given.workers, metavar="N", help="default: %(default)s")
    add("--nodes", type=int, default=given.nodes, metavar="N", help="of the workers; default: %(default)s")
    add("--jobs", type=int, default=given.jobs, metavar="N", help="default: %(default)s")
    add("--ranks", type=int, default=given.ranks, metavar="N", help="of a job; default: %(default)s")
    add("--tasks", type=int, default=given.tasks, metavar="N", help="of one worker each; default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = DriverSettings(**{**options, "sections": tuple(options["sections"])})
    settings.check()
    header = machine(1, "ray")
    blocks, numbers = [aligned_header(header)], dict[str, Any](machine=header)
    if LISTING in settings.sections:
        listings = measure_listings(settings, log)
        blocks.append(listing_text(listings, settings.rows))
        numbers[LISTING] = [vars(one) for one in listings]
    if PLACEMENT in settings.sections:
        placings = measure_placing(settings, log)
        blocks.append(placement_text(placings))
        numbers[PLACEMENT] = [vars(one) for one in placings]
    return "\n\n".join(blocks), numbers
