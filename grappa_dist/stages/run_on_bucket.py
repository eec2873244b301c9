"""The run directory of a driver whose run is on an object store: what of it comes from the bucket, and goes there.

Artefacts and checkpoints are sent by whom makes them. The driver fetches what says where a run stands (manifests, the
sets of jobs, which checkpoints are whole), and sends the small files of the run: settings, logs, lists, indexes of
shards, shards made of images, and the events, as numbered parts that are only added.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grappa_dist.bucket import EVENT_PARTS, Bucket, bucket_of, each, here
from grappa_dist.checksums import MANIFEST
from grappa_dist.console import EVENTS_FILE
from grappa_dist.files import write_bytes
from grappa_dist.inputs.entries import SHARDS_DIR
from grappa_dist.lease import FOLDER, Lease
from grappa_dist.stages.multi_set_jobs import MULTI_SET_FILE, MULTI_SET_FOLDER
from grappa_dist.training.checkpoints import SUMS_FILE

LINKS = ("model", "report")  # copies in the bucket, links here
EVENTS_S, FILES_S = 5.0, 20.0  # between looks for new events, and for other files
_SMALL = 2**20  # bytes of a file that is sent again at each start
_FOLDERS = ("index", SHARDS_DIR)
_MARKERS = (MANIFEST, MULTI_SET_FILE, SUMS_FILE)
_FINISHED = re.compile(r".+-[0-9a-f]{10}")
_PATIENCE_S = 30.0  # of the end of a run, for what is being sent


def restored(root: Path, lease: Lease | None) -> RunFiles | None:
    """Brings the folder of a run to what its bucket has; None for a run that is on no object store."""
    bucket = bucket_of(root)
    if bucket is None or lease is None:
        return None
    names = bucket.names()
    _remove_unknown(root, names, unfinished=not lease.resumed)
    wanted = [name for name in names if Path(name).name in _MARKERS and not name.startswith((*LINKS, ".", FOLDER))]
    if not lease.resumed:
        files = [name for name in names if _is_file_of_run(Path(name))]
        for name in files:
            (root / name).unlink(missing_ok=True)
        wanted += files
    each(wanted, lambda name: here(root / name))
    parts = sorted(name for name in names if name.startswith(f"{EVENT_PARTS}/"))
    if not lease.resumed and parts:
        write_bytes(root / EVENTS_FILE, b"".join(bucket.read(part) or b"" for part in parts))
    return RunFiles(bucket, names)


def _remove_unknown(root: Path, names: dict[str, int], *, unfinished: bool) -> None:
    """Removes finished artefacts that the bucket does not have; and, if asked to, all unfinished work, which another
    machine may have gone on with."""
    for folder, inside, _ in os.walk(root):
        for name in list(inside):
            path = Path(folder) / name
            place = path.relative_to(root).as_posix()
            is_work = place == MULTI_SET_FOLDER or name.endswith(".partial")
            if is_work or _FINISHED.fullmatch(name):
                inside.remove(name)
                gone = unfinished if is_work else f"{place}/{MANIFEST}" not in names
                if gone and not path.is_symlink():
                    shutil.rmtree(path)


def _is_file_of_run(name: Path) -> bool:
    """Whether a path in the folder of a run is a small file that the driver keeps in the bucket."""
    if name.name.startswith(".") or name.name in (EVENTS_FILE, f"{EVENTS_FILE}.old"):
        return False
    return len(name.parts) == 1 or name.parts[0] == "index"


class RunFiles:
    """The files that the driver of a run sends to the bucket."""

    def __init__(self, bucket: Bucket, names: dict[str, int]) -> None:
        """`names` are the objects of the bucket, with their bytes."""
        self._bucket, self._sent, self._lock = bucket, dict[str, tuple[int, int]](), threading.Lock()
        self._there = {name: size for name, size in names.items() if size >= _SMALL}
        self._parts = [(name, size) for name, size in sorted(names.items()) if name.startswith(f"{EVENT_PARTS}/")]
        self._reached = sum(size for _, size in self._parts)

    def send(self) -> None:
        """Sends the files that have changed since they were sent last, and new events."""
        with self._lock:
            self._send_files()
            self._send_events()

    def send_events(self) -> None:
        with self._lock:
            self._send_events()

    def _send_files(self) -> None:
        changed = dict[str, tuple[int, int]]()
        for path in self._files():
            with suppress(FileNotFoundError):  # removed meanwhile
                stat, name = path.stat(), self._bucket.name_of(path)
                state = (stat.st_size, stat.st_mtime_ns)
                known = self._sent.get(name) == state or self._there.get(name) == stat.st_size
                if not known:
                    changed[name] = state
        each(changed, self._put)
        self._sent |= changed

    def _put(self, name: str) -> None:
        try:
            self._bucket.put(self._bucket.root / name, name)
        except ValueError:
            if (self._bucket.root / name).exists():  # else it was removed meanwhile
                raise

    def _files(self) -> Iterator[Path]:
        root = self._bucket.root
        yield from (path for path in root.iterdir() if path.is_file() and _is_file_of_run(path.relative_to(root)))
        for folder in _FOLDERS:
            for path in (root / folder).rglob("*"):
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
                    yield path

    def _send_events(self) -> None:
        path, old = self._bucket.root / EVENTS_FILE, list[str]()
        if not path.exists():
            return
        if path.stat().st_size < self._reached:  # begun anew, with what it carries over
            old, self._reached = [name for name, _ in self._parts], 0
        with open(path, "rb") as file:
            file.seek(self._reached)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        if data:
            number = int(Path(self._parts[-1][0]).stem) + 1 if self._parts else 1
            self._parts.append((f"{EVENT_PARTS}/{number:08d}.jsonl", len(data)))
            self._bucket.write(self._parts[-1][0], data)
            self._reached += len(data)
        self._bucket.remove(old)


@contextmanager
def sending(files: RunFiles | None, log: Callable[[str], None]) -> Iterator[None]:
    """Sends what is new now and then while the block runs; what fails is logged, and tried again."""
    if files is None:
        yield
        return
    stop = threading.Event()

    def work() -> None:
        looks = 0
        while not stop.wait(EVENTS_S):
            looks += 1
            try:
                files.send() if looks * EVENTS_S % FILES_S == 0 else files.send_events()
            except (ValueError, OSError) as error:
                log(f"warning: {error}")

    thread = threading.Thread(target=work, name="bucket", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_PATIENCE_S)
