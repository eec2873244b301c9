"""Artefacts on storage: what exists is complete. And arrays of rows in them, one file per shard.

A finished artefact is a folder `<kind>-<fingerprint>/` with a manifest. While it is being made it is called
`<kind>-<fingerprint>.partial/`, which keeps what a restart can use (shards done, checkpoints); one rename commits it.
An array of rows, such as features or labels, is a .npy file per shard. Shapes: P rows of one shard, B rows asked for,
K centroids, D dimensions.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from grappa_dist import bucket
from grappa_dist.bucket import bucket_of, here
from grappa_dist.checksums import (
    MANIFEST,
    DamagedArtifact,
    compare_size,
    damaged,
    digest_of,
    forget,
    forget_maps,
    manifest_in,
    map_rows,
    set_aside,
    verified,
)
from grappa_dist.config import fingerprint
from grappa_dist.files import (
    Sum,
    lock_file,
    make_folder,
    read_bytes,
    record_of,
    recorded,
    remove_folder,
    rename,
    sync,
    write_json,
)
from grappa_dist.lease import Lease, leased
from grappa_dist.storage import tried_again

LOCK = ".lock"
CENTROIDS_FILE = "centroids.npy"  # (K, D) float32, in an artefact of labels
SEEN_S = 90.0  # network file systems cache for at most 60 s, by default, that a file was not there
LOOK_S = 0.5
UNIT_ERROR = 2**-6  # of the squared norm of a unit row; search.fixed_point takes no more
CONTENT_BYTES = 2**30  # of finished artefacts, read when a run starts; the rest is read when it is first used
CONTENT_FILES = 2**14  # likewise: opening a small file takes longer than reading it
_AT_ONCE = 8  # files looked at side by side
_TOGETHER = 32  # of them, that a thread takes at a time
_T = TypeVar("_T")
_R = TypeVar("_R")


class NotSeen(TimeoutError):
    """What another process has finished cannot be seen here."""


@dataclass(frozen=True)
class Artifact:
    """A handle; its fingerprint is that of `kind`, `settings` and `inputs`."""

    root: Path
    kind: str  # e.g. "labels/k=64"
    settings: Mapping[str, Any] = field(compare=False)
    inputs: Mapping[str, str] = field(compare=False)  # role -> fingerprint
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.fingerprint}"

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def partial(self) -> Path:
        return self.root / f"{self.name}.partial"

    @property
    def complete(self) -> bool:
        manifest = f"{self.root}/{self.name}/{MANIFEST}"  # asked of every shard: making paths takes longer than looking
        if bucket_of(manifest) is not None:
            here(Path(manifest))
        return tried_again(lambda: _exists(manifest), manifest)

    def begin(self) -> Path:
        """The folder to write into; what an earlier attempt left there is kept."""
        make_folder(self.partial)
        return self.partial

    def commit(self, discard: Sequence[str] = (), expected: Sequence[str] = ()) -> None:
        """Drops `discard`ed patterns (such as checkpoints), writes the manifest; one rename makes the artefact appear.

        Args:
            expected: files that other machines wrote, which may become visible here some time later; in the run of a
                bucket they have sent them there.
        """
        of_run = bucket_of(self.root)
        if of_run is None:
            _wait((self.partial / name for name in expected), SEEN_S)
        for path in (self.partial / name for name in expected):
            if not here(record_of(path)).exists():
                here(path)
        for pattern in (*discard, MANIFEST):
            for path in list(self.partial.glob(pattern)):
                remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
        found = {p.relative_to(self.partial) for p in self.partial.rglob("*") if p.is_file()}
        seen = {p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)}
        names = sorted(seen | set(expected))  # files of other machines may exist and not be listed yet
        paths = {name: self.partial / name for name in names}
        # What a writer has recorded holds even where the file has another size by now: then it is damaged
        files = {name: vars(recorded(path) or Sum.of(path)) for name, path in paths.items()}
        for path in list(self.partial.glob("**/.*")):  # checksums, and what a killed attempt left unfinished
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in paths.values():
            if of_run is None or path.exists():
                sync(path)
        self._write_manifest(files)
        if of_run is not None:
            self._commit_to(of_run, files)
            return
        if os.path.lexists(self.path) and not self.complete:  # somebody has removed its manifest
            set_aside(self.path)
        rename(self.partial, self.path)
        sync(self.path.parent)

    def _commit_to(self, of_run: bucket.Bucket, files: Iterable[str]) -> None:
        """Puts the files into the bucket, then the manifest unless somebody has made the artefact meanwhile."""
        if of_run.read(f"{self.name}/{MANIFEST}") is None:  # else the files are those of whom was first
            bucket.put_files(of_run, self.partial, self.name, files)
        with of_run.fetching(self.path / MANIFEST):
            remove_folder(self.path)  # of a manifest that was removed
            if of_run.create(f"{self.name}/{MANIFEST}", read_bytes(self.partial / MANIFEST)):
                rename(self.partial, self.path)
                sync(self.path.parent)
        bucket.withdraw(self.partial)
        remove_folder(self.partial)
        forget_maps(self.path)

    def _write_manifest(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        content = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "files": dict(files),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.partial / MANIFEST, {**content, "xxh3": digest_of(json.loads(json.dumps(content)))})

    @property
    def files(self) -> Mapping[str, Sum]:
        """The files of a finished artefact by their names, as its manifest lists them.

        Raises:
            DamagedArtifact: the manifest cannot be read.
        """
        return manifest_in(str(self.path))

    def check(self, content_bytes: int | None = 0) -> None:
        """Holds the files against the manifest: sizes, and the contents of the smallest up to so many bytes.

        Args:
            content_bytes: None: all.

        Raises:
            DamagedArtifact: one of them is damaged or missing.
        """
        if not self.complete:
            raise ValueError(f"{self.path} is not finished: it has no {MANIFEST}")
        for damage in look_at([self], content_bytes).damages:
            raise damage


def finished(artifacts: Iterable[Artifact]) -> list[bool]:
    """Which of them are finished, by one listing of each folder that they lie in, however many they are; by one in all
    of a run on an object store.

    `complete` asks for each manifest, which takes long where there are many. A folder whose manifest somebody has
    removed counts here; a run has set such aside when it starts (`look_at`).
    """
    artifacts = list(artifacts)
    if (there := _objects_of(artifacts)) is not None:
        return [f"{artifact.name}/{MANIFEST}" in there for artifact in artifacts]
    listed, found = dict[tuple[Path, str], frozenset[str]](), list[bool]()
    for artifact in artifacts:  # without a Path for each, which takes longer than all else
        parent, _, name = artifact.kind.rpartition("/")
        if (where := (artifact.root, parent)) not in listed:
            folder = artifact.root / parent
            listed[where] = tried_again(partial(_names_in, folder), folder)
        found.append(f"{name}-{artifact.fingerprint}" in listed[where])
    return found


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _objects_of(artifacts: Sequence[Artifact]) -> dict[str, int] | None:
    """The objects in a bucket below what the artefacts of its run have in common, with their bytes, by one listing;
    None of a run that is on no object store."""
    of_run = bucket_of(artifacts[0].root) if artifacts else None
    if of_run is None:
        return None
    parents = {artifact.kind.rpartition("/")[0] for artifact in artifacts}
    in_one = parents.pop() if len(parents) == 1 else ""
    return of_run.names(artifacts[0].name if len(artifacts) == 1 else in_one)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@dataclass(frozen=True)
class Look:
    """What looking at finished artefacts has found."""

    damages: list[DamagedArtifact]  # at most one of each artefact
    without_checksums: list[Artifact]  # made before manifests had them
    num_bytes: int  # whose content was looked at
    all_bytes: int


def look_at(artifacts: Iterable[Artifact], content_bytes: int | None = None) -> Look:
    """Holds finished artefacts against their manifests: all sizes, and contents, the smallest files first.

    Nothing counts that this process has found before.

    Args:
        content_bytes: to be read at most, of CONTENT_FILES files at most; None: all of all.
    """
    forget()
    artifacts = list(artifacts)
    there = _objects_of(artifacts)
    artifacts = _whole(artifacts, there)
    found = dict(zip(artifacts, _side_by_side(partial(_check_sizes, there or {}), artifacts), strict=True))
    listed = {a: a.files for a, damage in found.items() if damage is None}
    files = sorted((s.bytes, a.name, name) for a, of_one in listed.items() for name, s in of_one.items() if s.xxh3)
    if content_bytes is not None:
        ends = itertools.accumulate(size for size, _, _ in files)
        files = [f for f, end in zip(files, ends, strict=True) if end <= content_bytes][:CONTENT_FILES]
    home = {a.name: a for a in artifacts}
    paths = [home[of].path / name for _, of, name in files]
    for (_, of, _), damage in zip(files, _side_by_side(_check_content, paths), strict=True):
        found[home[of]] = found[home[of]] or damage
    return Look(
        damages=[damage for damage in found.values() if damage is not None],
        without_checksums=[a for a, of_one in listed.items() if any(s.xxh3 is None for s in of_one.values())],
        num_bytes=sum(size for size, _, _ in files),
        all_bytes=sum(s.bytes for of_one in listed.values() for s in of_one.values()),
    )


def _whole(artifacts: Sequence[Artifact], there: Mapping[str, int] | None) -> list[Artifact]:
    """Those that are finished.

    Args:
        there: the objects of a bucket; None: the artefacts are those of a directory.
    """
    if there is None:
        return [artifact for artifact in artifacts if artifact.complete]
    listed = [artifact for artifact in artifacts if f"{artifact.name}/{MANIFEST}" in there]
    fetched = _side_by_side(lambda artifact: artifact.complete, listed)
    return [artifact for artifact, is_whole in zip(listed, fetched, strict=True) if is_whole]


def _side_by_side(check: Callable[[_T], _R], things: Sequence[_T]) -> Iterator[_R]:
    """The results in order, by threads that take some _TOGETHER: a future for each takes longer than a small file."""
    parts = (things[start : start + _TOGETHER] for start in range(0, len(things), _TOGETHER))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for results in pool.map(lambda part: [check(one) for one in part], parts):
            yield from results


def _check_sizes(there: Mapping[str, int], artifact: Artifact) -> DamagedArtifact | None:
    """What is wrong with the sizes of an artefact's files.

    Args:
        there: bytes of the objects of a bucket; {} of a run that is on none.
    """
    folder = str(artifact.path)
    try:
        for name, expected in artifact.files.items():
            path, size = f"{folder}/{name}", there.get(f"{artifact.name}/{name}")
            if size is not None and not os.path.exists(path):  # it is fetched when it is read
                why = "" if size == expected.bytes else f"has {size} bytes, its manifest says {expected.bytes}"
            else:
                why = compare_size(path, expected)
            if why:
                return DamagedArtifact(path, folder, why)
    except DamagedArtifact as damage:  # of the manifest
        return damage
    return None


def _check_content(path: Path) -> DamagedArtifact | None:
    try:
        verified(path)
    except DamagedArtifact as damage:
        return damage
    return None


def remove_artifact(folder: Path) -> None:
    """Removes a folder, finished or not; one that is only half removed never has the name of a finished artefact."""
    bucket.withdraw(folder, MANIFEST)
    gone = folder.with_name(f"{folder.name.removesuffix('.removed')}.removed")
    if gone != folder:
        remove_folder(gone)
        rename(folder, gone)
    remove_folder(gone)


def numbered(role: str, artifacts: Iterable[Artifact]) -> dict[str, Artifact]:
    """Several inputs of one role, by names in their order: "shard 0", "shard 1", ..."""
    return {f"{role} {i}": artifact for i, artifact in enumerate(artifacts)}


def wait_until_seen(artifacts: Iterable[Artifact], timeout_s: float = SEEN_S) -> None:
    """Waits for artefacts that other machines have finished: a network file system may show them some time later.

    Raises:
        NotSeen: one of them is still not visible.
    """
    _wait((here(artifact.path / MANIFEST) for artifact in artifacts), timeout_s)


def wait_for_files(paths: Iterable[Path], timeout_s: float = SEEN_S) -> None:
    """The same for files in an unfinished artefact; in the run of a bucket they are fetched."""
    _wait(map(here, paths), timeout_s)


def _wait(paths: Iterable[Path], timeout_s: float) -> None:
    """Looks for the files; counts looks, not seconds, as a process may be held up or its clock set."""
    left = round(timeout_s / LOOK_S)
    for path in paths:
        while not path.exists():
            if not left:
                raise NotSeen(f"{path} was written and is not seen here after {timeout_s:g} s{_seen_instead(path)}")
            left -= 1
            time.sleep(LOOK_S)
            with suppress(OSError):
                os.scandir(path.parent).close()  # opening a folder refreshes what a network file system has cached


def _seen_instead(path: Path) -> str:
    """What lies where a file is not seen, and what to do."""
    folder = path.parent
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.is_dir():
        return f"; its job has ended and left {partial} unfinished: run again, which goes on from there"
    if folder.is_dir():
        return f"; {folder} is there without it: run again, which sets it aside and makes it anew"
    return f"; is {folder.parent} on storage that all machines share? Look for {folder.name} there, then run again"


@dataclass(frozen=True)
class Store:
    """The run directory."""

    root: Path

    def artifact(self, kind: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact | str]) -> Artifact:
        """The artefact of these settings and inputs, finished or not."""
        prints = {role: i.fingerprint if isinstance(i, Artifact) else i for role, i in inputs.items()}
        return Artifact(self.root, kind, settings, prints, fingerprint(kind, dict(settings), prints))

    @contextmanager
    def lock(self) -> Iterator[Lease | None]:
        """One driver at a time; a second one is refused at once. Yields the lease of a run on an object store."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = lock_file(self.root / LOCK)
        except BlockingIOError as held:
            raise ValueError(
                f"another run is writing to {self.root}{held}; wait for it, or choose another directory"
            ) from None
        except (FileExistsError, NotADirectoryError):
            file = next(path for path in (self.root, *self.root.parents) if path.exists() and not path.is_dir())
            raise ValueError(f"{self.root}: {file} is a file, expected a folder, or a new name") from None
        except OSError as error:
            raise ValueError(f"{self.root} cannot be written to: {error.strerror}") from error
        with handle, leased(self.root) as lease:
            yield lease

    def publish(self, link: str, artifact: Artifact) -> Path:
        """Points `<root>/<link>` at a finished artefact, replacing the old link atomically; in a bucket, copies it."""
        of_run = bucket_of(self.root)
        if of_run is not None:
            for name in artifact.files:
                here(artifact.path / name)
            bucket.copy_folder(of_run, artifact.name, link, MANIFEST)
        return self.point(link, artifact.name)

    def point(self, link: str, target: str) -> Path:
        """Points `<root>/<link>` at what lies in the run directory under the name `target`."""
        path, fresh = self.root / link, self.root / f".{link}.new"
        if path.is_dir() and not path.is_symlink():
            raise ValueError(
                f"{path} is a folder, expected a link that the run can replace (a copy without links has folders in "
                "their place): remove or rename it, then run the same command again"
            )
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        os.replace(fresh, path)
        return path


@dataclass(frozen=True)
class RowArrays:
    """An array over all rows, one .npy per shard, memory-mapped where it is read; small enough to be pickled."""

    paths: tuple[str, ...]
    starts: tuple[int, ...]  # first row id of every shard and, last, the number of rows
    below: int | None = None  # of labels: what every value is below, and none is below -1

    @staticmethod
    def of(paths: Iterable[Path], starts: NDArray[np.int64], below: int | None = None) -> RowArrays:
        """The array in the files of the shards, in order, with `starts` and `below` as above."""
        return RowArrays(tuple(map(str, paths)), tuple(starts.tolist()), below)

    def __reduce__(self) -> tuple[Any, ...]:
        """As few bytes: every rank of a job is sent it, with a path for each shard."""
        return _unpacked_rows, (packed_texts(self.paths), np.array(self.starts, np.int64).tobytes(), self.below)

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        """`starts`, as an array: made of a long tuple anew, it would take longer than a batch."""
        return np.array(self.starts, dtype=np.int64)

    def _shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._edges, rows, side="right") - 1

    def shard(self, index: int) -> NDArray[Any]:
        """The rows of one shard, (P, ...).

        Raises:
            DamagedArtifact: the file is not what was written, does not have the shard's number of rows, or has labels
                out of range.
        """
        rows: NDArray[Any] = map_rows(self.paths[index], self.below)
        expected = self.starts[index + 1] - self.starts[index]
        if len(rows) != expected:
            raise damaged(Path(self.paths[index]), f"has {len(rows)} rows, its shard has {expected}")
        return rows

    def take_unit(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features of some rows that decode, (B, D).

        Raises:
            DamagedArtifact: as `shard`, or one of them is no unit row.
        """
        values: NDArray[np.float32] = self.take(rows)
        for place, norm in _not_unit(values):
            shard = int(self._shard_of(rows[place]))
            self._refuse(shard, int(rows[place]) - self.starts[shard], norm)
        return values

    def unit_shard(self, index: int, good: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The features of one shard, (P, D), of which those that are `good`, (P,), are unit rows.

        Raises:
            DamagedArtifact: as `shard`, or one of them is no unit row.
        """
        values: NDArray[np.float32] = self.shard(index)
        for position, norm in _not_unit(values):
            if good[position]:
                self._refuse(index, position, norm)
        return values

    def _refuse(self, shard: int, position: int, norm: float) -> None:
        raise damaged(Path(self.paths[shard]), f"has a row {position} of norm {norm:.6g}, features must be unit rows")

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The values at some row ids, (B, ...)."""
        shards = self._shard_of(rows)
        values = np.empty((len(rows), *self.shard(0).shape[1:]), self.shard(0).dtype)
        order = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1))  # where the next shard's rows begin
        for inside in np.split(order, edges[1:]) if len(rows) else ():
            shard = int(shards[inside[0]])
            values[inside] = self.shard(shard)[rows[inside] - self.starts[shard]]
        return values


def _unpacked_rows(paths: bytes, starts: bytes, below: int | None) -> RowArrays:
    return RowArrays(unpacked_texts(paths), tuple(np.frombuffer(starts, np.int64).tolist()), below)


def packed_texts(texts: Sequence[str]) -> bytes:
    """Texts without NUL, such as paths, in few bytes where they are alike."""
    joined = "\0".join([str(len(texts)), *texts])
    return zlib.compress(joined.encode("utf-8", "surrogateescape"), 1)


def unpacked_texts(packed: bytes) -> tuple[str, ...]:
    """What `packed_texts` was given."""
    return tuple(zlib.decompress(packed).decode("utf-8", "surrogateescape").split("\0")[1:])


def _not_unit(values: NDArray[np.float32]) -> Iterator[tuple[int, float]]:
    """Positions and norms of rows that are no unit rows."""
    squares = np.einsum("bd,bd->b", values, values)
    for position in np.flatnonzero(~(np.abs(squares - 1) < UNIT_ERROR)).tolist():  # NaN as well
        yield position, float(squares[position]) ** 0.5


def rows_file(shard: int) -> str:
    """The name of the file with one shard's rows: labels are (P,) int32."""
    return f"rows-{shard:06d}.npy"


def label_rows(artifact: Artifact, starts: NDArray[np.int64], num_labels: int | None = None) -> RowArrays:
    """The labels of all rows, with `starts` as in RowArrays; -1 for rows that do not decode."""
    return RowArrays.of((artifact.path / rows_file(i) for i in range(len(starts) - 1)), starts, num_labels)


def own_shards(starts: Sequence[int], rank: int, size: int) -> range:
    """This rank's consecutive shards, about equal in rows: shard i belongs to the rank that its middle row falls to."""
    middles = (np.asarray(starts[:-1]) + np.asarray(starts[1:])) / 2
    owners = np.minimum((middles * size / max(1, starts[-1])).astype(int), size - 1)
    return range(int(np.searchsorted(owners, rank)), int(np.searchsorted(owners, rank, side="right")))
