"""A run directory on an object store (`out: s3://bucket/runs/mine`): the bucket holds what is true, machines copies.

Every machine has a folder of the run whose name is the URL, so that any process that is given a path below it knows the
bucket from the path alone. A file of the folder has the same name in the bucket. What is read and not here is fetched
(`here`), what others need is sent by whom wrote it (`send`), a file that changes in place is looked for anew
(`refreshed`), and so is a folder, of which the file that is sent last, its marker, tells one content from another
(`refreshed_folder`). A bucket has no rename: what is whole has a marker, and the one of an artefact, its manifest, is
created only where none is there. Paths elsewhere are left as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from grappa_dist.files import make_folder, read_bytes, record_of, write_bytes
from grappa_dist.object_store import (
    BrokenAnswer,
    StoreUnavailable,
    check_url,
    describe,
    is_missing,
    is_passing,
    library_errors,
    patiently,
    status_of,
    store_of,
    whole,
)
from grappa_dist.storage import LASTING, Result, described, tried_again

EVENT_PARTS = "events"  # of the bucket: events.jsonl of the run in parts, 00000001.jsonl and so on
_OTHER_PLACE = "resources.copies_dir, or TMPDIR, names another place"
_ROOT = re.compile(r"(?P<root>.*/(?P<name>(?:s3|gs)%3A%2F%2F[^/]+))(/|$)")
_FINISHED = re.compile(r"-[0-9a-f]{10}$")
_LONGEST_NAME = 255  # bytes of a folder's name
_FREE_SHARE = 0.1  # of the disk, that copies leave free where nothing else is asked for
_IN_USE_S = 60.0  # after its last use a file stays
_LOOK_SHARE = 0.05  # of the bytes that may be kept: after so many more the folder is looked through again
_IN_FLIGHT = 16
_FETCHING = ".fetching"  # in the folder: files that come, and locks of processes that fetch the same one


def is_bucket(out: str) -> bool:
    """Whether a run directory is asked for on an object store."""
    return out.startswith(("s3://", "gs://"))


def own_folder(disk: str | None = None) -> str:
    """The folder in which this user's runs have theirs, on a disk; None: in the temporary folder."""
    return f"{disk or tempfile.gettempdir()}/grappa-runs-{os.getuid()}"


def folder_of(url: str, parent: str | None = None) -> Path:
    """The folder of a run on this machine, the same on all machines where `parent` is.

    Args:
        parent: None: `own_folder()`.

    Raises:
        ValueError: the URL has a secret, names no bucket, or is too long.
    """
    url = check_url(url, "out")
    name = quote(url, safe="")
    if url.count("/") < 2 or not url.partition("://")[2]:
        raise ValueError(f"out={url}: expected s3://<bucket>/<prefix> or gs://<bucket>/<prefix>")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"out={url}: {len(name)} bytes as the name of a folder, expected at most {_LONGEST_NAME}")
    return Path(parent or own_folder()).expanduser().absolute() / name


def bucket_of(path: Path | str) -> Bucket | None:
    """The bucket of the run that a path belongs to; None for any other path."""
    text = str(path)
    if "%3A%2F%2F" not in text:
        return None
    found = _ROOT.match(text)
    return None if found is None else _bucket(found["root"], unquote(found["name"]))


@lru_cache(maxsize=64)
def _bucket(root: str, url: str) -> Bucket:
    """The bucket of a folder, which this user alone can write to: in a temporary folder others can make its name first.

    Raises:
        ValueError: the folder cannot be made, or belongs to another user.
    """
    parent = Path(root).parent
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = parent.stat().st_uid == os.getuid()
    except OSError as error:
        raise ValueError(f"out={url}: {parent}: {error.strerror}; {_OTHER_PLACE}") from error
    if not is_own:
        raise ValueError(f"out={url}: {parent} belongs to another user; {_OTHER_PLACE}")
    return Bucket(Path(root), url)


def here(path: Path) -> Path:
    """The path of a file, which is fetched where it is not here; there is none at it if the bucket has none either."""
    bucket = bucket_of(path)
    if bucket is not None and not path.exists():
        bucket.fetch(path)
    return path


def fetched_anew(path: Path) -> bool:
    """Fetches a file that is not what was written, since the answer may have been wrong; False for one of no bucket."""
    bucket = bucket_of(path)
    if bucket is not None:
        bucket.fetch(path, anew=True)
    return bucket is not None


def refreshed(path: Path) -> Path:
    """The path of a file that changes in place, as the bucket has it now; without one there, none is here."""
    bucket = bucket_of(path)
    if bucket is not None:
        with bucket.fetching(path):
            data = bucket.read(bucket.name_of(path))
            if data is None:
                path.unlink(missing_ok=True)
            elif not path.exists() or read_bytes(path) != data:
                write_bytes(path, data)
    return path


def refreshed_folder(folder: Path, marker: str) -> Path:
    """The path of a folder; what is here of another content than the bucket's is removed, files are fetched later."""
    bucket = bucket_of(folder)
    if bucket is not None:
        with bucket.fetching(folder):
            data, path = bucket.read(bucket.name_of(folder / marker)), folder / marker
            if data is None or not path.exists() or read_bytes(path) != data:
                shutil.rmtree(folder, ignore_errors=True)
            if data is not None and not path.exists():
                write_bytes(path, data)
    return folder


def send(*paths: Path) -> None:
    """Puts files into the bucket, one after the other, each with the checksum that is recorded beside it."""
    for path in paths:
        bucket = bucket_of(path)
        if bucket is not None:
            bucket.put(path, bucket.name_of(path))
            if (beside := record_of(path)).exists():
                bucket.put(beside, bucket.name_of(beside))


def withdraw(folder: Path, marker: str | None = None) -> None:
    """Removes a folder, or a file, from the bucket: its marker first, so that what is left of it is not whole."""
    bucket = bucket_of(folder)
    if bucket is not None:
        name = bucket.name_of(folder)
        if marker is not None:
            bucket.remove([f"{name}/{marker}"])
        bucket.remove([name, *bucket.names(name)])


def marked(folder: Path, marker: str) -> list[Path] | None:
    """The folders in a folder whose marker the bucket has, by name; None for a folder of no bucket."""
    bucket = bucket_of(folder)
    if bucket is None:
        return None
    depth = len(folder.relative_to(bucket.root).parts)
    names = (name for name in bucket.names(bucket.name_of(folder)) if name.endswith(f"/{marker}"))
    return sorted({folder / Path(name).parts[depth] for name in names if len(Path(name).parts) == depth + 2})


@dataclass(frozen=True)
class Bucket:
    """Objects of one run by their names, which are paths in the folder `root`.

    Raises:
        ValueError: in every method, when the store refuses; the message has the request and the URL.
        StoreUnavailable: likewise, when it still fails after several attempts, in a way that may pass.
    """

    root: Path
    url: str

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def names(self, below: str = "") -> dict[str, int]:
        """The objects below a name, with their bytes."""
        found: dict[str, Any] = self._call(
            f"{below or 'all'} listed", lambda fs, path: fs.find(f"{path}/{below}".rstrip("/"), detail=True)
        )
        prefix = store_of(self.url)[1]
        return {name.removeprefix(prefix).strip("/"): int(info["size"]) for name, info in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """All bytes of a small object; None where there is none."""
        data: bytes | None = self._call(f"{name} read", lambda fs, path: whole(fs, f"{path}/{name}"), missing=None)
        return data

    def write(self, name: str, data: bytes) -> None:
        self._call(f"{name} written", lambda fs, path: fs.pipe_file(f"{path}/{name}", data))

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object where there is none; whether there was none, or this very content."""

        def attempt(fs: Any, path: str) -> bool:
            try:
                fs.pipe_file(f"{path}/{name}", data, mode="create")
            except library_errors() as error:
                if isinstance(error, FileExistsError) or 412 in (status_of(error), status_of(error.__cause__)):
                    return False
                raise
            return True

        created: bool = self._call(f"{name} created", attempt)
        return created or self.read(name) == data  # an answer may have been lost, and the request been made again

    def put(self, path: Path, name: str) -> None:
        self._call(f"{name} written", lambda fs, at: fs.put_file(str(path), f"{at}/{name}"))

    def copy(self, name: str, to: str) -> None:
        """Copies an object inside the bucket."""
        self._call(f"{name} copied", lambda fs, path: fs.cp_file(f"{path}/{name}", f"{path}/{to}"))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, the first one before the others; missing ones are no error."""
        first, *others = [*names] or [""]
        for some in ([first] if first else [], others):
            each(some, lambda name: self._call(f"{name} removed", lambda fs, at: fs.rm_file(f"{at}/{name}"), missing=0))

    def modified(self, name: str) -> Any:
        """When an object was written, by the clock of the store: a datetime."""
        return self._call(f"{name} looked at", lambda fs, path: fs.modified(f"{path}/{name}"))

    def fetch(self, path: Path, *, anew: bool = False) -> None:
        """Fetches a file unless another process has meanwhile; it appears by one rename.

        Args:
            anew: whether one that is here is replaced, if the bucket has it.

        Raises:
            ValueError: its name leads out of its folder.
        """
        if ".." in path.parts:
            raise ValueError(f"out={self.url}: names {path.relative_to(self.root)}, outside of its folder")
        with self.fetching(path):
            if path.exists() and not anew:
                return
            name = self.name_of(path)
            # Not beside it: a folder without a manifest would be taken for a damaged artefact
            fresh = self.root / _FETCHING / f"{os.getpid()}.{os.urandom(4).hex()}"
            try:
                if self._call(f"{name} read", lambda fs, at: _get(fs, f"{at}/{name}", fresh), missing=False):
                    make_folder(path.parent)
                    os.replace(fresh, path)
                    _kept(self.root).take(path.stat().st_size)
            finally:
                fresh.unlink(missing_ok=True)
        if not path.name.startswith(".") and ".partial/" in str(path):
            here(record_of(path))

    @contextmanager
    def fetching(self, path: Path) -> Iterator[None]:
        """Holds a lock that one process of this machine has at a time, for that path."""
        make_folder(self.root / _FETCHING)
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:2]
        handle = os.open(self.root / _FETCHING / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _call(self, what: str, do: Callable[[Any, str], Result], **missing: Any) -> Any:
        """What `do(file system, path)` returns; `missing=value` is returned where the object does not exist."""
        try:
            return patiently(lambda: do(*store_of(self.url)))
        except library_errors() as error:
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if missing and is_missing(cause) and "NoSuchBucket" not in describe(cause):
                return missing["missing"]
            if isinstance(error, OSError) and error.errno in LASTING:  # of this machine
                raise described(error) from error
            kind = StoreUnavailable if is_passing(error) else ValueError
            raise kind(f"out={self.url}: cannot be used ({what}): {describe(cause)}") from error


def _get(fs: Any, name: str, path: Path) -> bool:
    """Copies an object to a file; one that is cut short is asked for again."""
    fs.get_file(name, str(path))
    found = path.stat().st_size
    if found != (size := int(fs.info(name)["size"])):
        raise BrokenAnswer(f"{found} of {size} bytes came")
    return True


def each(names: Iterable[str], do: Callable[[str], object]) -> None:
    """Calls `do` for each name, _IN_FLIGHT at a time; the first failure is raised."""
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        list(pool.map(do, names))


def put_files(bucket: Bucket, partial: Path, name: str, files: Iterable[str]) -> None:
    """Puts the files of an unfinished folder below the name of the artefact that it becomes.

    Args:
        files: those that are not here were sent by other machines, below the name of the unfinished folder.
    """

    def put(file: str) -> None:
        if (partial / file).exists():
            bucket.put(partial / file, f"{name}/{file}")
        else:
            bucket.copy(f"{bucket.name_of(partial)}/{file}", f"{name}/{file}")

    each(files, put)


def move(bucket: Bucket, name: str, to: str, marker: str) -> None:
    """Renames all objects below a name, the marker first, so that a half moved folder is not whole."""
    files = sorted(bucket.names(name), key=lambda file: file != f"{name}/{marker}")
    for file in files:
        bucket.copy(file, f"{to}{file.removeprefix(name)}")
        bucket.remove([file])


def copy_folder(bucket: Bucket, name: str, to: str, marker: str) -> None:
    """Makes a folder of the bucket the copy of another one: the marker last, and what it does not have is removed."""
    files = [file.removeprefix(f"{name}/") for file in bucket.names(name)]
    before = [file for file in bucket.names(to) if file.removeprefix(f"{to}/") not in files]
    bucket.remove([f"{to}/{marker}", *before])
    each([file for file in files if file != marker], lambda file: bucket.copy(f"{name}/{file}", f"{to}/{file}"))
    bucket.copy(f"{name}/{marker}", f"{to}/{marker}")


class _Kept:
    """Bounds what a machine keeps of finished artefacts: files that were used longest ago go.

    A file that is mapped keeps its bytes for whoever maps it, and is fetched again for others.
    """

    most: int | None = None  # bytes; None: as many as leave _FREE_SHARE of the disk free

    def __init__(self, root: Path) -> None:
        self._root, self._lock, self._since = root, threading.Lock(), math.inf  # bytes since the last look

    def take(self, size: int) -> None:
        """Removes what is too much after a file of this size was fetched."""
        most = self.most
        with self._lock:
            self._since += size
            if (most is None and not _shortage(self._root)) or (most is not None and self._since < most * _LOOK_SHARE):
                return
            found, self._since = sorted(_copies(self._root)), 0
            excess = _shortage(self._root) if most is None else sum(size for _, size, _ in found) - most
            for at_ns, num_bytes, path in found:
                if excess <= 0 or time.time_ns() - at_ns < _IN_USE_S * 10**9:
                    return
                Path(path).unlink(missing_ok=True)
                excess -= num_bytes


def keep_at_most(num_bytes: int | None) -> None:
    """Bounds what this process lets its machine keep of finished artefacts; None: by what is free on the disk."""
    _Kept.most = num_bytes


def _copies(root: Path) -> Iterator[tuple[int, int, str]]:
    """Time of use (ns), bytes and path of the files of finished artefacts here, but for manifests."""
    for folder, _, files in os.walk(root):
        if any(_FINISHED.search(part) for part in Path(folder).relative_to(root).parts):
            for path in (os.path.join(folder, file) for file in files if file != "manifest.json"):
                with suppress(FileNotFoundError):
                    stat = os.stat(path)
                    yield stat.st_atime_ns, stat.st_size, path


def _shortage(root: Path) -> int:
    """Bytes that the disk lacks until _FREE_SHARE of it are free."""
    disk = tried_again(lambda: shutil.disk_usage(root), root)
    return int(max(0, _FREE_SHARE * disk.total - disk.free))


@lru_cache(maxsize=64)
def _kept(root: Path) -> _Kept:
    return _Kept(root)


def used(path: Path) -> None:
    """Notes that a file of a bucket's run is used, for the order in which files go."""
    if bucket_of(path) is not None:
        with suppress(OSError):
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
