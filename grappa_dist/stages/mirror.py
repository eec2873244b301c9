"""The mirror of a run: its finished artefacts and the work in progress, copied to an object store.

A run that lacks them fetches them from there, so that a run on a new machine resumes in the middle of a job.

An object store has no rename, so the copy of an artefact counts as complete when its manifest is there, which is
written last. What a killed upload left has no manifest, is ignored, and is overwritten.

Of a folder that is not finished, what a restart can use (checkpoints, the log, k-NN graphs, the last update of k-means)
is copied, and then `state.json`, which lists the copies. A copy never changes under its name, and is removed only after
it is no longer listed: everything that `state.json` lists exists, whole and from one moment. All copies of a folder are
removed once the store has the finished artefact.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from grappa_dist.artifacts import Artifact, finished
from grappa_dist.checksums import MANIFEST, compare, names_aside, read_manifest, verified
from grappa_dist.console import METRICS_FILE, Console, pluralize
from grappa_dist.files import Sum, make_folder, parse_json, rename, sync
from grappa_dist.object_store import (
    BrokenAnswer,
    StoreUnavailable,
    check_url,
    describe,
    is_passing,
    library_errors,
    patiently,
    store_of,
)
from grappa_dist.stages.damages import Damage, Mending
from grappa_dist.stages.flow import Flow, artifacts_of
from grappa_dist.stages.multi_set_jobs import MULTI_SET_FILE, MULTI_SET_FOLDER, multi_set_members
from grappa_dist.storage import LASTING, Result, described

LATEST = "latest.json"  # names the report and the model of the run that ended last
STATE = "state.json"
ASIDE = ".mirror"  # in the run directory: links to the files being copied, which stay when the files are removed
_PERIOD_S = 20.0
_IN_FLIGHT = 8  # requests at a time
_TRIES = 5  # to list a folder while checkpoints come and go
_USED = (  # in this order: what belongs to a checkpoint is there before it
    *("progress.safetensors", "checkpoints/step-*[0-9]/*", "checkpoints/*.json"),
    *("knn/epoch-*[0-9]/*", MULTI_SET_FILE, METRICS_FILE),
)
_PROGRESS = ("progress.safetensors", "checkpoints/step-")  # without any of these a restart begins anew


@contextmanager
def mirrored(url: str | None, flow: Flow, mending: Mending) -> Iterator[None]:
    """Fetches what is on the store; while the block runs, and when it ends, copies what is new to the store."""
    if url is None:
        yield
        return
    mirror, artifacts, console = Mirror(url), artifacts_of(flow), mending.run.console
    work = WorkMirror(mirror.remote, mirror.found, artifacts)
    if fetched := mirror.fetch(artifacts, mending):
        console.log(f"{pluralize(len(fetched), 'artefact')} fetched from {mirror.remote.url}")
    if begun := work.fetch(console.log):
        console.log(f"fetched from {mirror.remote.url}, to go on with: {', '.join(begun)}")

    def save() -> None:
        mirror.save(artifacts)
        work.save(mirror.complete)

    stop = threading.Event()
    copier = threading.Thread(target=_copy, args=(save, stop, console), name="mirror")
    copier.start()
    try:
        yield
    finally:
        stop.set()
        copier.join()
    save()  # raises what has failed
    if flow.report.complete and flow.model.complete:  # not after a run that ends before them
        mirror.point({"report": flow.report.name, "model": flow.model.name})


def _copy(save: Callable[[], None], stop: threading.Event, console: Console) -> None:
    """Copies every _PERIOD_S until `stop` is set, and then once more: also of a run that fails or is stopped."""
    last = False
    while not last:
        last = stop.wait(_PERIOD_S)
        try:
            save()
        except (ValueError, OSError) as error:  # the run goes on; only a failure at its end is raised
            console.log(f"warning: {error}")


class Mirror:
    """Copies of finished artefacts below a URL."""

    def __init__(self, url: str) -> None:
        self.remote = RemoteFolder(url)
        self.found = self.remote.names()
        self.complete = {name.removesuffix(f"/{MANIFEST}") for name in self.found if name.endswith(f"/{MANIFEST}")}

    def fetch(self, artifacts: Iterable[Artifact], mending: Mending) -> list[Artifact]:
        """Fetches what the store has and the run directory lacks; each artefact appears by one rename.

        A copy that is not what was written is set aside on the store, and does not appear. So is one without checksums
        of an artefact that was damaged here, as the copy may have been made later.
        """
        fetched, damaged_here = list[Artifact](), {damage.artifact for damage in mending.damages}
        wanted = [artifact for artifact in artifacts if artifact.name in self.complete]
        for artifact in (a for a, there in zip(wanted, finished(wanted), strict=True) if not there):
            manifest = f"{artifact.name}/{MANIFEST}"
            try:
                sums = self.remote.read_manifest(manifest)
                if artifact.name in damaged_here and any(listed.xxh3 is None for listed in sums.values()):
                    raise DamagedCopy(MANIFEST, "has no checksums, and the artefact was damaged in the run directory")
                objects = {name: f"{artifact.name}/{name}" for name in (*sums, MANIFEST)}
                shutil.rmtree(artifact.partial, ignore_errors=True)  # of an attempt that is no longer needed
                self.remote.fetch(objects, sums, artifact.path, listed_in=manifest)
                fetched.append(artifact)
            except DamagedCopy as damage:
                aside = self._set_aside(artifact.name)
                mending.add(Damage(artifact.name, damage.file, damage.why, f"{self.remote.url}/{aside}"))
        return fetched

    def _set_aside(self, name: str) -> str:
        """Renames a copy, its manifest first; returns its new name."""
        aside = next(a for a in names_aside(name) if not any(found.startswith(f"{a}/") for found in self.found))
        files = [found.removeprefix(f"{name}/") for found in self.found if found.startswith(f"{name}/")]
        for file in sorted(files, key=lambda file: file != MANIFEST):
            self.remote.move(f"{name}/{file}", f"{aside}/{file}")
        self.complete.discard(name)
        return aside

    def save(self, artifacts: Iterable[Artifact]) -> None:
        """Copies what is finished and not there yet, each with its manifest last.

        Raises:
            DamagedArtifact: a file is not what was written; it is not copied.
        """
        left = [artifact for artifact in artifacts if artifact.name not in self.complete]
        for artifact in (a for a, there in zip(left, finished(left), strict=True) if there):
            _each(artifact.files, partial(self._put, artifact))
            self._put(artifact, MANIFEST)
            self.complete.add(artifact.name)

    def point(self, latest: Mapping[str, str]) -> None:
        """Writes which report and model are the latest, in one object."""
        text = (json.dumps(dict(latest), indent=1) + "\n").encode()
        self.remote.write(LATEST, text)

    def _put(self, artifact: Artifact, name: str) -> None:
        path = artifact.path / name
        self.remote.put(path if name == MANIFEST else verified(path), f"{artifact.name}/{name}")


@dataclass(frozen=True)
class _State:
    """The content of one state.json."""

    artifacts: tuple[str, ...]  # names of those that the folder becomes
    objects: Mapping[str, str]  # names of the copies, by the file of the folder
    sizes: Mapping[str, int]  # in bytes, likewise
    xxh3: Mapping[str, str] = field(default_factory=dict, compare=False)  # likewise; not of copies of older versions

    @staticmethod
    def read(remote: RemoteFolder, name: str) -> _State:
        """Raises DamagedCopy for what is none."""

        def parse(text: bytes) -> _State:
            found = parse_json(text, name)
            try:
                objects, sizes, xxh3 = (dict(found.get(key, {})) for key in ("objects", "sizes", "xxh3"))
                return _State(tuple(found["artifacts"]), objects, sizes, xxh3)
            except (LookupError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{name}: {found!r:.100}") from None

        return remote.read(name, parse)

    @property
    def sums(self) -> dict[str, Sum]:
        return {file: Sum(size, self.xxh3.get(file)) for file, size in self.sizes.items()}

    @property
    def digests(self) -> dict[str, str]:
        """Checksums by the names of the copies."""
        return {self.objects[file]: digest for file, digest in self.xxh3.items()}


@dataclass(frozen=True)
class _Snapshot:
    """The files of a folder at one moment, which stay the same while they are copied."""

    state: _State
    paths: Mapping[str, Path]
    read: Mapping[str, bytes]  # contents of those that change in place

    def digest(self, file: str) -> str:
        """The checksum of a file."""
        return xxhash.xxh3_128_hexdigest(self.read[file]) if file in self.read else str(Sum.of(self.paths[file]).xxh3)


class WorkMirror:
    """Copies of unfinished folders, each below its name in the run directory."""

    def __init__(self, remote: RemoteFolder, names: Iterable[str], artifacts: Sequence[Artifact]) -> None:
        """Reads which folders the store has.

        Args:
            names: of the objects on the store.
            artifacts: of the run, finished or not, at least one.
        """
        self._remote, self._root = remote, artifacts[0].root
        self._artifacts = {a.name: a for a in artifacts}
        there = sorted(names)
        self._saved, self._damaged = dict[str, _State](), dict[str, DamagedCopy]()
        for folder in (name.removesuffix(f"/{STATE}") for name in there if name.endswith(f"/{STATE}")):
            if self._is_named_as_ours(folder):
                try:
                    self._saved[folder] = _State.read(remote, f"{folder}/{STATE}")
                except DamagedCopy as damage:
                    self._damaged[folder] = damage
        self._saved = {f: state for f, state in self._saved.items() if set(state.artifacts) <= self._artifacts.keys()}
        ours = tuple(f"{folder}/" for folder in (*(f"{name}.partial" for name in self._artifacts), *self._saved))
        listed = {name for folder, s in self._saved.items() for name in (f"{folder}/{STATE}", *s.objects.values())}
        self._strays = {n for n in there if n.startswith(ours)} - listed  # of a run that was killed while it copied

    def fetch(self, log: Callable[[str], None]) -> list[str]:
        """Fetches every folder that is neither finished nor begun here, each by one rename; returns their names.

        A copy that is not what was written is no longer listed on the store, and that work begins anew.
        """
        fetched = []
        for folder, damage in self._damaged.items():
            self._refuse(folder, damage, log)
        for folder, state in list(self._saved.items()):
            here = self._root / folder
            if here.exists() or all(self._artifacts[name].complete for name in state.artifacts):
                continue
            try:
                self._remote.fetch(state.objects, state.sums, here, listed_in=f"{folder}/{STATE}")
                fetched.append(folder)
            except DamagedCopy as damage:
                del self._saved[folder]
                self._refuse(folder, damage, log)
        return fetched

    def _refuse(self, folder: str, damage: DamagedCopy, log: Callable[[str], None]) -> None:
        self._remote.move(f"{folder}/{STATE}", f"{folder}/{STATE}.damaged")
        log(f"warning: {self._remote.url}/{folder}: {damage}: not used, so this begins anew")

    def save(self, finished: Collection[str]) -> None:
        """Copies what has changed since the last call, and removes what is no longer needed.

        Args:
            finished: the artefacts that the store has.
        """
        unfinished = self._in_progress()
        for folder, state in list(self._saved.items()):
            if folder not in unfinished and set(state.artifacts) <= set(finished):
                self._remote.remove([f"{folder}/{STATE}"])
                self._strays |= set(self._saved.pop(folder).objects.values())
        self._remove_strays()
        for folder, artifacts in unfinished.items():
            # a folder that is gone is finished by now
            with suppress(FileNotFoundError), _snapshot(self._root, folder, artifacts) as snapshot:
                self._put(folder, snapshot)

    def _remove_strays(self) -> None:
        self._remote.remove(sorted(self._strays))
        self._strays = set()

    def _put(self, folder: str, snapshot: _Snapshot) -> None:
        state, before = snapshot.state, self._saved.get(folder)
        if before == state or not any(file.startswith(_PROGRESS) for file in state.objects):
            return
        old = set(before.objects.values()) if before else set[str]()
        new = [file for file, name in state.objects.items() if name not in old]
        self._strays |= {state.objects[file] for file in new}  # until they are listed
        _each(new, partial(self._copy, snapshot))
        known = before.digests if before else {}
        known |= {state.objects[file]: snapshot.digest(file) for file in new}
        state = replace(state, xxh3={file: known[name] for file, name in state.objects.items() if name in known})
        text = vars(state)
        self._remote.write(f"{folder}/{STATE}", (json.dumps(text, indent=1) + "\n").encode())
        self._saved[folder] = state
        self._strays = (self._strays | old) - set(state.objects.values())
        self._remove_strays()

    def _copy(self, snapshot: _Snapshot, file: str) -> None:
        name = snapshot.state.objects[file]
        if file in snapshot.read:
            self._remote.write(name, snapshot.read[file])
        else:
            self._remote.put(snapshot.paths[file], name)

    def _is_named_as_ours(self, folder: str) -> bool:
        """Whether a folder may be of this run, and is no path that the store should not name."""
        is_partial = folder.endswith(".partial") and folder.removesuffix(".partial") in self._artifacts
        return is_partial or re.fullmatch(rf"{MULTI_SET_FOLDER}/\w+", folder) is not None

    def _in_progress(self) -> dict[str, tuple[str, ...]]:
        """Unfinished folders, with the names of the artefacts that they become."""
        alone = {f"{name}.partial": (name,) for name, a in self._artifacts.items() if a.partial.exists()}
        jobs = {f"packs/{job}": sets for job, sets in multi_set_members(self._root).items()}
        return alone | {job: sets for job, sets in jobs.items() if set(sets) <= self._artifacts.keys()}


@contextmanager
def _snapshot(root: Path, folder: str, artifacts: tuple[str, ...]) -> Iterator[_Snapshot]:
    """What a restart can use of a folder.

    Raises:
        FileNotFoundError: the folder no longer exists.
    """
    try:
        yield _take_snapshot(root, folder, artifacts)
    finally:
        shutil.rmtree(root / ASIDE, ignore_errors=True)


def _take_snapshot(root: Path, folder: str, artifacts: tuple[str, ...]) -> _Snapshot:
    for left in reversed(range(_TRIES)):
        shutil.rmtree(root / ASIDE, ignore_errors=True)
        try:
            return _list_and_link(root, folder, artifacts)
        except FileNotFoundError:  # a checkpoint was replaced by a newer one
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _list_and_link(root: Path, folder: str, artifacts: tuple[str, ...]) -> _Snapshot:
    objects, sizes, paths, read = dict[str, str](), dict[str, int](), dict[str, Path](), dict[str, bytes]()
    for path in _usable(root / folder):
        file, stat = path.relative_to(root / folder).as_posix(), path.stat()
        objects[file], sizes[file] = f"{folder}/{file}@{stat.st_mtime_ns}", stat.st_size
        if path.suffix in (".json", ".jsonl"):  # small, and may change while it is copied
            read[file] = path.read_bytes()
            objects[file], sizes[file] = f"{objects[file]}-{len(read[file])}", len(read[file])
        else:
            paths[file] = _linked(path, root / ASIDE / file)
    return _Snapshot(_State(artifacts, objects, sizes), paths, read)


def _linked(path: Path, link: Path) -> Path:
    """A hard link to a file, which survives its removal; the file itself where the file system has no links."""
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:
        return path
    return link


def _usable(folder: Path) -> list[Path]:
    """The files that a restart can use; of the checkpoints only the newest."""
    newest = sorted(folder.glob("checkpoints/step-*[0-9]"))[-1:]
    found = [path for pattern in _USED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path for path in found if path.parent.parent.name != "checkpoints" or path.parent in newest]


class DamagedCopy(ValueError):
    """A copy on the store is not what was written.

    Args:
        file: in its folder.
        why: what follows it in a sentence.
    """

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file} {why}")
        self.file, self.why = file, why


class RemoteFolder:
    """Objects below a URL on an object store, by their names relative to it.

    Raises:
        ValueError: in every method, when the store refuses; the message has the request and the URL.
        StoreUnavailable: likewise, when it still fails after several attempts, in a way that may pass.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._fs, self._path = store_of(self.url)

    def names(self) -> set[str]:
        found = self._call("listed", lambda: self._fs.find(self._path))
        return {name.removeprefix(self._path).strip("/") for name in found}

    def read(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """What an object holds, by a function that raises a ValueError for what it cannot be.

        Raises:
            DamagedCopy: it is that at every attempt.
        """

        def read() -> Result:
            data = self._fs.cat_file(self._at(name))
            try:
                return parse(data)
            except ValueError as error:
                raise BrokenAnswer(str(error).removeprefix(f"{name}: ")) from None

        try:
            found: Result = self._call(f"{name} read", read)
            return found
        except StoreUnavailable as error:
            if isinstance(error.__cause__, BrokenAnswer):
                raise DamagedCopy(PurePosixPath(name).name, f"is damaged: {error.__cause__}") from None
            raise

    def write(self, name: str, data: bytes) -> None:
        self._call(f"{name} written", lambda: self._fs.pipe_file(self._at(name), data))

    def get(self, name: str, path: Path, size: int | None = None) -> None:
        """Copies an object to a file; an answer cut short of `size` is asked for again, if the object has that size."""

        def copy() -> None:
            self._fs.get_file(self._at(name), str(path))
            found = path.stat().st_size
            if size not in (None, found) and self._fs.info(self._at(name))["size"] == size:
                raise BrokenAnswer(f"{found} of {size} bytes came")

        self._call(f"{name} read", copy)

    def _fetch_file(self, file: str, name: str, path: Path, expected: Sum | None) -> None:
        """Gets a file, twice if it is not what was expected."""
        why = ""
        for _ in range(2):
            try:
                self.get(name, path, expected.bytes if expected else None)
            except ValueError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise DamagedCopy(file, "is missing") from None
                raise
            if expected is None or not (why := compare(path, expected)):
                return
        raise DamagedCopy(file, why)

    def put(self, path: Path, name: str) -> None:
        self._call(f"{name} written", lambda: self._fs.put_file(str(path), self._at(name)))

    def remove(self, names: Iterable[str]) -> None:
        """One after the other, in this order; missing ones are no error."""
        for name in names:
            self._call(f"{name} removed", partial(self._remove, name))

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def read_manifest(self, name: str) -> dict[str, Sum]:
        """The files that a manifest lists.

        Raises:
            DamagedCopy: the manifest is damaged.
        """
        return self.read(name, lambda text: read_manifest(text, name, PurePosixPath(name).parent.name))

    def move(self, name: str, to: str) -> None:
        """Copies an object on the store and removes it under its old name."""
        self._call(f"{name} copied", lambda: self._fs.cp_file(self._at(name), self._at(to)))
        self.remove([name])

    def fetch(self, objects: Mapping[str, str], sums: Mapping[str, Sum], target: Path, *, listed_in: str) -> None:
        """A folder of files, each from its object; it appears by one rename.

        Args:
            listed_in: the object that lists the files, for errors.

        Raises:
            DamagedCopy: a file is missing, or is not what `sums` says; nothing appears.
            ValueError: a file would lie outside of the folder.
        """
        fresh = target.with_name(f"{target.name}.fetched")
        shutil.rmtree(fresh, ignore_errors=True)
        for file in objects:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise ValueError(f"{self.url}/{listed_in}: names {file!r}, outside of its folder")
            make_folder((fresh / file).parent)
        try:
            _each(objects, lambda file: self._fetch_file(file, objects[file], fresh / file, sums.get(file)))
        except DamagedCopy:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        rename(fresh, target)
        sync(target.parent)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _call(self, what: str, do: Callable[[], Any]) -> Any:
        try:
            return patiently(do)
        except library_errors() as error:
            if isinstance(error, OSError) and error.errno in LASTING:  # of the run directory
                raise described(error) from error
            kind = StoreUnavailable if is_passing(error) else ValueError
            raise kind(f"mirror={self.url}: cannot be used ({what}): {describe(error)}") from error


def _each(names: Iterable[str], do: Callable[[str], None]) -> None:
    """Calls `do` for each name, _IN_FLIGHT at a time; the first failure is raised."""
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        list(pool.map(do, names))
