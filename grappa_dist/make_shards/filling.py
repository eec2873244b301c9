"""Shards from lists of files, each finished or absent, written by several processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from grappa_dist.data.index import Shard, entry, shard_of
from grappa_dist.data.loader import read_batches
from grappa_dist.data.writer import TarShard, members
from grappa_dist.files import read_json, write_json
from grappa_dist.make_shards.sources import Encoded, Readable, encoded

UNFINISHED_DIR = "making"  # in an unfinished folder: its plan, its lock, unfinished shards, records of finished ones
THREADS = 2  # one reads while the other decodes; processes do the rest in parallel
_NAMED = 20  # undecodable files of a shard that are named
_POLL_S = 0.5
_counter: Any = None  # in a worker process: images written by all workers
_stop: Any = None  # in a worker process: the event that stops it


class Stopped(Exception):
    """The writing was asked to stop."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image on its way into a shard."""

    place: Readable
    suffix: str
    label: str | None
    task: str | None
    name: str  # of its file
    where: str  # it was listed, for messages


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written."""

    folder: str  # the unfinished one
    number: int
    first_row: int
    rows: Sequence[Row]
    image_size: int | None


@dataclass(frozen=True)
class Filled:
    """A finished shard, and the files in it that do not decode (where that was tried)."""

    folder: str
    number: int
    shard: Shard
    bad: Counter[str]  # by reason
    named: tuple[str, ...]  # lines about the first of them
    bad_files: tuple[tuple[str, str], ...] = ()  # name and reason of each


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def fill(job: ShardJob, count: Callable[[int], None], stopped: Callable[[], bool], *, threads: int = THREADS) -> Filled:
    """Writes a shard and commits it; the same job makes the same bytes.

    Args:
        count: called with the number of images that were written.
    """
    unfinished = Path(job.folder) / UNFINISHED_DIR / f"unfinished-{os.getpid()}-{os.urandom(4).hex()}"
    unfinished.mkdir()
    tar = TarShard(unfinished / shard_name(job.number))
    bad: Counter[str] = Counter()
    named: list[str] = []
    bad_files: list[tuple[str, str]] = []
    try:
        contents = read_batches(job.rows, lambda row: _content(row, job.image_size), threads=threads)
        for number, (row, content) in enumerate(zip(job.rows, contents, strict=True), start=job.first_row):
            if stopped():
                raise Stopped
            tar.add(number, members(content.data, content.suffix, row.label, row.task, name=row.name))
            if content.bad is not None:
                bad[_kind(content.bad)] += 1
                bad_files.append((row.name, content.bad))
                named.append(f"{row.where} does not decode; it keeps row {number}")
            count(1)
        filled = Filled(job.folder, job.number, tar.finish(), bad, tuple(named[:_NAMED]), tuple(bad_files))
        _commit(filled, unfinished)
        return filled
    finally:
        tar.close()
        shutil.rmtree(unfinished, ignore_errors=True)


def _content(row: Row, image_size: int | None) -> Encoded:
    return encoded(row.place.read(), row.suffix, image_size)


def _kind(reason: str) -> str:
    """A reason without what differs from file to file: numbers, and the name of an object."""
    return re.sub(r"\d+", "#", re.sub(r" <[^>]*>", "", reason))


def _commit(filled: Filled, unfinished: Path) -> None:
    """Moves the index, then the tar into the folder, then writes the record that both are there."""
    folder, name = Path(filled.folder), filled.shard.name
    for file in (f"{name}.npy", name):
        (unfinished / file).replace(folder / file)
    found = {"bad": dict(filled.bad), "named": list(filled.named), "bad_files": list(map(list, filled.bad_files))}
    write_json(_record(folder, filled.number), {"shard": entry(filled.shard), **found})


def _record(folder: Path, number: int) -> Path:
    return folder / UNFINISHED_DIR / f"{shard_name(number)}.json"


def already_filled(folder: Path, number: int) -> Filled | None:
    """What an earlier run finished, if tar and index are as its record says."""
    record = _record(folder, number)
    if not record.is_file():
        return None
    tar = folder / shard_name(number)
    try:
        content: dict[str, Any] = read_json(record)
        shard = shard_of(content["shard"], str(tar), record)
        bad, named = Counter[str](content["bad"]), tuple(content["named"])
        bad_files = tuple((str(name), str(why)) for name, why in content["bad_files"])
    except (ValueError, TypeError, KeyError):  # it is damaged, and the shard is made again
        return None
    if not tar.is_file() or tar.stat().st_size != shard.bytes or not tar.with_name(f"{tar.name}.npy").is_file():
        return None
    return Filled(str(folder), number, shard, bad, named, bad_files)


class WorkerDied(RuntimeError):
    """A worker process was killed; what it had finished is kept."""


def fill_all(
    jobs: Iterable[ShardJob], workers: int, add_images: Callable[[int], None], *, threads: int = THREADS
) -> Generator[Filled, None, None]:
    """The filled shards as they are finished, in any order; closing it stops the rest.

    Args:
        workers: processes; 1 works in this one.
        add_images: called with the number of images that were written since the last call, perhaps 0.
        threads: that read and decode, where this process alone works.
    """
    if workers > 1:
        return _in_processes(iter(jobs), workers, add_images)
    return (fill(job, add_images, lambda: False, threads=threads) for job in jobs)


def _in_processes(
    jobs: Iterable[ShardJob], workers: int, add_images: Callable[[int], None]
) -> Generator[Filled, None, None]:
    os.environ["PYTHONSAFEPATH"] = "1"  # else a process that is spawned imports from the current directory first
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of our threads
    counter, stop, counted = context.Value("q", 0), context.Event(), 0
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counter, stop))
    try:
        pending: set[Future[Filled]] = {pool.submit(_fill, job) for job in islice(jobs, 2 * workers)}
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            written = counter.value
            add_images(written - counted)
            counted = written
            for future in done:
                yield future.result()
            pending |= {pool.submit(_fill, job) for job in islice(jobs, len(done))}
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process was killed, perhaps for lack of memory; run the same again to go on"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(counter: Any, stop: Any) -> None:
    """Makes a worker end with its parent, however that ends, and leaves Ctrl-C to the parent."""
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker waits for its parent"
    parent.join()
    os._exit(1)


def _fill(job: ShardJob) -> Filled:
    return fill(job, _count, _stop.is_set)


def _count(images: int) -> None:
    with _counter.get_lock():
        _counter.value += images
