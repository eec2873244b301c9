"""What every stage is given: the settings, the storage, the workers and the console."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.artifacts import LOCK, Store
from grappa_dist.bucket import bucket_of, folder_of, is_bucket, keep_at_most, own_folder, refreshed
from grappa_dist.config import CONFIG_FILE, Config, Resources, load
from grappa_dist.console import EVENTS_BYTES, EVENTS_FILE, LOG_FILE, Console, Events, LogFile, read_events
from grappa_dist.data.block_cache import DAMAGED_LOG, count_damaged
from grappa_dist.data.open_images import cache_of
from grappa_dist.distributed.connection import SUBMITTED_JOB
from grappa_dist.distributed.machine import origin
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Runner
from grappa_dist.extras import RUNS, require
from grappa_dist.files import is_locked, write_utf8
from grappa_dist.object_store import is_remote
from grappa_dist.output import printable, without_secrets
from grappa_dist.stages.run_on_bucket import RunFiles, restored, sending
from grappa_dist.storage import raise_open_files


@dataclass(frozen=True)
class Run:
    config: Config
    store: Store
    runner: Runner
    console: Console
    given: Config | None = None  # the settings as they were given, where `config` has shards in place of folders
    files: RunFiles | None = None  # of a run on an object store


@contextmanager
def running(config: Config, root: Path) -> Iterator[Run]:
    """A run that alone writes to its directory; workers start when they are first needed and end with it.

    Raises:
        ValueError: a package is not installed; the directory cannot be written to, or another run writes to it.
        Terminated: after SIGTERM, SIGHUP or Ctrl-C; jobs have saved their state, unless its `waited_s` is set.
    """
    require(*RUNS)  # before a folder is made
    raise_open_files()
    root = root.expanduser()  # of callers in Python: no folder is ever called "~"
    store, new = Store(root), [path for path in (root, *root.parents) if not path.exists()]
    keep_at_most(config.resources.copies_bytes)
    with store.lock() as lease:
        files = restored(root, lease)
        try:
            with _working(config, store, files) as context:
                yield context
        except BaseException as error:
            if files is not None and lease is not None and not lease.lost:
                with contextlib.suppress(ValueError, OSError):  # the first error says more
                    files.send()
            if isinstance(error, ValueError):
                _remove_unused(root, new)
            raise
        if files is not None:
            files.send()


@contextmanager
def _working(config: Config, store: Store, files: RunFiles | None) -> Iterator[Run]:
    console = Console(
        Events(store.root / EVENTS_FILE, EVENTS_BYTES), log_file=LogFile(store.root / LOG_FILE, EVENTS_BYTES)
    )
    cluster = Cluster(config.resources, log=console.log, on_phase=console.phase)
    runner = Runner(cluster, config.resources, console.jobs, console.event)
    cache = cache_of(config.resources)
    damaged = count_damaged(cache)
    with console.run():
        try:
            with runner.handle_signals():
                console.event("origin", **origin())
                with sending(files, console.log):
                    yield Run(config, store, runner, console, files=files)
                if new_ones := count_damaged(cache) - damaged:
                    log = cache.path / DAMAGED_LOG
                    console.log(f"warning: {new_ones} cached blocks of shards were damaged and fetched again: {log}")
        finally:
            cluster.close()


@contextmanager
def keeping_config(context: Run) -> Iterator[None]:
    """Writes the settings into the run directory; undone where they are refused before more than shards is made."""
    root = context.store.root
    path, settings = root / CONFIG_FILE, context.config.absolute(root)
    text = settings.model_copy(update={"out": str(place_of(root))}).yaml()
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before != text:
        write_utf8(path, text)
    try:
        yield
    except ValueError:
        if before != text and context.console.begun <= {"shards"}:
            path.unlink() if before is None else write_utf8(path, before)
        raise


def read_config(root: Path, overrides: Iterable[str] = ()) -> Config:
    """The settings of the latest run in a directory, into which the overrides are written.

    Raises:
        ValueError: there is no such run, or an override is wrong.
    """
    if not (root / CONFIG_FILE).is_file():
        there = "it has none" if root.is_dir() else "there is no such folder"
        if several := configs_of_seeds(root):
            there = f"it has runs of several seeds, which have theirs: {_names(several)}"
        raise ValueError(f"{root}: expected a run directory with its {CONFIG_FILE}, but {there}")
    return load(str(root / CONFIG_FILE).replace("$", "$$"), overrides)


def configs_of_seeds(root: Path) -> list[Path]:
    """The settings of each run in a folder of runs that differ in their seed, by seed."""
    found = [path for path in root.glob(f"seed-*/{CONFIG_FILE}") if path.parent.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.parent.name[5:]))


def refuse_seeds(root: Path) -> None:
    """Raises ValueError where a single run would write into a folder of runs that differ in their seed."""
    several = configs_of_seeds(root)
    if several and not (root / CONFIG_FILE).exists():
        raise ValueError(f"{root} has runs of several seeds: expected one of {_names(several)}, or another directory")


def _names(configs: Sequence[Path]) -> str:
    return ", ".join(str(path.parent) for path in configs)


def _remove_unused(root: Path, new: Sequence[Path]) -> None:
    """Removes the folders that a run has made, if it was refused before it began any work."""
    told = {root / name for name in (LOCK, EVENTS_FILE, LOG_FILE)}
    events = {event["name"] for event in read_events(root / EVENTS_FILE)} - {"run_begins", "origin", "run_ends"}
    if events or set(root.iterdir()) - told or root not in new:
        return
    with contextlib.suppress(OSError):  # another process has put something there meanwhile
        for path in told:
            path.unlink(missing_ok=True)
        for path in new:
            path.rmdir()


def place_of(root: Path) -> Path | str:
    """Where a run is, as its settings and messages have it: its URL on an object store, else its directory."""
    bucket = bucket_of(root)
    return root if bucket is None else bucket.url


def name_after(images: Sequence[str]) -> str:
    """What a run is called that was given no directory: as the folder of its images, however that is written."""
    return os.path.basename(os.path.abspath(images[0])) if images else ""


def run_root(out: str | None, name: str, where: Resources | None = None) -> Path:
    """The run directory, absolute, or this machine's folder of a run on an object store.

    Warns if it is in the temporary folder of a submitted job, which Ray removes.

    Args:
        where: None: before the settings are known, which may put that folder elsewhere (`placed`).
    """
    if out is not None and is_bucket(out):
        disk = None if where is None else where.copies_dir
        root = folder_of(out, own_folder(disk))
        with contextlib.suppress(OSError):  # no driver has been here
            if is_locked(root / LOCK):
                return root  # of a driver that is at work: its settings may not have been sent yet
        return refreshed(root / CONFIG_FILE).parent
    if out is not None and is_remote(out):
        shown = without_secrets(out)
        raise ValueError(
            f"out={shown}: expected a folder on a file system that all nodes share, s3://<bucket>/<prefix> or "
            "gs://<bucket>/<prefix>"
        )
    root = Path(out or f"runs/{name}").expanduser().absolute()
    if SUBMITTED_JOB in os.environ and root.is_relative_to(Path.cwd()):
        line = f"warning: {root} lies in the job's temporary folder and goes with it; give --out an absolute path"
        print(printable(line), file=sys.stderr)
    return root


def placed(root: Path, where: Resources) -> Path:
    """The run directory, where the settings want it: that of a run on an object store may be on another disk."""
    bucket = bucket_of(root)
    if bucket is None or where.copies_dir is None:
        return root
    return folder_of(bucket.url, own_folder(where.copies_dir))
