"""Artefacts on storage: what exists is complete. And arrays of rows in them, one file per shard.

A finished artefact is a folder `<kind>-<fingerprint>/` with a manifest. While it is being made it is called
`<kind>-<fingerprint>.partial/`, which keeps what a restart can use (shards done, checkpoints); one rename commits it.
An array of rows, such as features or labels, is a .npy file per shard. Shapes: P rows of one shard, B rows asked for,
K centroids, D dimensions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.config import fingerprint
from grappa_dist.files import lock_file, make_folder, map_array, read_json, remove_folder, rename, sync, write_json

MANIFEST, LOCK = "manifest.json", ".lock"
CENTROIDS_FILE = "centroids.npy"  # (K, D) float32, in an artefact of labels
SEEN_S = 90.0  # network file systems cache for at most 60 s, by default, that a file was not there
LOOK_S = 0.5


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
        return (self.path / MANIFEST).exists()

    def begin(self) -> Path:
        """The folder to write into; what an earlier attempt left there is kept."""
        make_folder(self.partial)
        return self.partial

    def commit(self, discard: Sequence[str] = (), expected: Sequence[str] = ()) -> None:
        """Drops `discard`ed patterns (such as checkpoints), writes the manifest; one rename makes the artefact appear.

        Args:
            expected: files that other machines wrote, which may become visible here some time later.
        """
        _wait((self.partial / name for name in expected), SEEN_S)
        for pattern in (*discard, MANIFEST, "**/.*"):  # also what a killed attempt left unfinished
            for path in list(self.partial.glob(pattern)):
                remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
        found = {p.relative_to(self.partial).as_posix() for p in self.partial.rglob("*") if p.is_file()}
        names = sorted(found | set(expected))  # files of other machines may exist and not be listed yet
        files = {name: (self.partial / name).stat().st_size for name in names}
        manifest = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "files": files,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        for name in files:
            sync(self.partial / name)
        write_json(self.partial / MANIFEST, manifest)
        rename(self.partial, self.path)
        sync(self.path.parent)

    def check(self) -> None:
        """Raises ValueError when a file of the manifest is missing or has another size."""
        if not self.complete:
            raise ValueError(f"{self.path} is not finished: it has no {MANIFEST}")
        manifest = read_json(self.path / MANIFEST)
        for name, size in manifest["files"].items():
            path = self.path / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, its manifest says {size}"
                raise ValueError(f"{path} {state}; remove {self.path} to have it made again")


def remove_artifact(folder: Path) -> None:
    """Removes a folder, finished or not; one that is only half removed never has the name of a finished artefact."""
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
        TimeoutError: one of them is still not visible.
    """
    _wait((artifact.path / MANIFEST for artifact in artifacts), timeout_s)


def _wait(paths: Iterable[Path], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    for path in paths:
        while not path.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"{path} was written on another machine and is not seen here after {timeout_s:g} s")
            time.sleep(LOOK_S)


@dataclass(frozen=True)
class Store:
    """The run directory."""

    root: Path

    def artifact(self, kind: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact | str]) -> Artifact:
        """The artefact of these settings and inputs, finished or not."""
        prints = {role: i.fingerprint if isinstance(i, Artifact) else i for role, i in inputs.items()}
        return Artifact(self.root, kind, settings, prints, fingerprint(kind, dict(settings), prints))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One driver at a time; a second one is refused at once."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = lock_file(self.root / LOCK)
        except BlockingIOError as held:
            raise ValueError(
                f"another run is writing to {self.root}{held}; wait for it or choose another --out"
            ) from None
        except OSError as error:
            raise ValueError(f"--out {self.root} cannot be written to: {error.strerror}") from error
        with handle:
            yield

    def publish(self, link: str, artifact: Artifact) -> Path:
        """Points `<root>/<link>` at a finished artefact, replacing the old link atomically."""
        path, fresh = self.root / link, self.root / f".{link}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(artifact.name)
        os.replace(fresh, path)
        return path


@dataclass(frozen=True)
class RowArrays:
    """An array over all rows, one .npy per shard, memory-mapped where it is read; small enough to be pickled."""

    paths: tuple[str, ...]
    starts: tuple[int, ...]  # first row id of every shard and, last, the number of rows

    @staticmethod
    def of(paths: Iterable[Path], starts: NDArray[np.int64]) -> RowArrays:
        """The array in the files of the shards, in order, with `starts` as above."""
        return RowArrays(tuple(map(str, paths)), tuple(starts.tolist()))

    def shard(self, index: int) -> NDArray[Any]:
        """The rows of one shard, (P, ...).

        Raises:
            ValueError: the file does not have the shard's number of rows.
        """
        rows: NDArray[Any] = _map(self.paths[index])
        expected = self.starts[index + 1] - self.starts[index]
        if len(rows) != expected:
            raise ValueError(
                f"{self.paths[index]} has {len(rows)} rows, its shard has {expected}; "
                "remove its folder to have it made anew"
            )
        return rows

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The values at some row ids, (B, ...)."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        values = np.empty((len(rows), *self.shard(0).shape[1:]), self.shard(0).dtype)
        order = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1))  # where the next shard's rows begin
        for inside in np.split(order, edges[1:]) if len(rows) else ():
            shard = int(shards[inside[0]])
            values[inside] = self.shard(shard)[rows[inside] - self.starts[shard]]
        return values


@lru_cache(maxsize=512)
def _map(path: str) -> NDArray[Any]:
    # Torch takes no read-only memory; with "c" the file is not changed either. Slicing a plain array is ten times as
    # fast as slicing a numpy.memmap.
    return np.asarray(map_array(path, "c"))


def forget_maps() -> None:
    """Drops the maps of arrays that are kept for further reading: a disk keeps the bytes of removed files for them."""
    _map.cache_clear()


def rows_file(shard: int) -> str:
    """The name of the file with one shard's rows: labels are (P,) int32."""
    return f"rows-{shard:06d}.npy"


def label_rows(artifact: Artifact, starts: NDArray[np.int64]) -> RowArrays:
    """The labels of all rows, with `starts` as in RowArrays; -1 for rows that do not decode."""
    return RowArrays.of((artifact.path / rows_file(i) for i in range(len(starts) - 1)), starts)


def own_shards(starts: Sequence[int], rank: int, size: int) -> range:
    """This rank's consecutive shards, about equal in rows: shard i belongs to the rank that its middle row falls to."""
    middles = (np.asarray(starts[:-1]) + np.asarray(starts[1:])) / 2
    owners = np.minimum((middles * size / max(1, starts[-1])).astype(int), size - 1)
    return range(int(np.searchsorted(owners, rank)), int(np.searchsorted(owners, rank, side="right")))
