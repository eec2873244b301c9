"""Work under way on the mirror: from what is copied here, a run on a new machine goes on in the middle of a job.

What a restart can use of a folder that is not finished (checkpoints, the log, k-NN graphs, the last update of k-means)
is copied there, and then `state.json`, which lists the copies. A copy never changes under its name, and one that is no
longer listed goes only afterwards: whatever `state.json` says is there, whole and of one moment. All copies of a folder
go once the store has the finished artefact.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grappa_dist.artifacts import Artifact
from grappa_dist.console import METRICS_FILE
from grappa_dist.stages.adapt_packs import PACK_FILE, pack_members
from grappa_dist.stages.remote_folder import RemoteFolder, each

STATE = "state.json"
ASIDE = ".mirror"  # in the run directory: links to what is being copied, which stay when it goes
_USED = (  # in this order: what belongs to a checkpoint is there before it, and features go when their graph is there
    *("progress.safetensors", "checkpoints/step-*[0-9]/*", "checkpoints/*.json"),
    *("knn/features-*[0-9]/*", "knn/epoch-*[0-9]/*", PACK_FILE, METRICS_FILE),
)
_PROGRESS = ("progress.safetensors", "checkpoints/step-")  # without any of these a restart begins anew
_TRIES = 5  # to list a folder while checkpoints come and go


@dataclass(frozen=True)
class _State:
    """What one state.json says."""

    artifacts: tuple[str, ...]  # that the folder becomes
    objects: Mapping[str, str]  # by the file that each is a copy of
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class _Moment:
    """The files of a folder at one moment, whatever becomes of them while they are copied."""

    state: _State
    paths: Mapping[str, Path]
    read: Mapping[str, bytes]  # those that change in place


class WorkMirror:
    """Copies of folders under way, each below its name in the run directory."""

    def __init__(self, remote: RemoteFolder, names: Iterable[str], artifacts: Sequence[Artifact]) -> None:
        """Args: names: of the objects that are there; artifacts: of the run, finished or not, at least one."""
        self._remote, self._root = remote, artifacts[0].root
        self._artifacts = {a.name: a for a in artifacts}
        there = sorted(names)
        states = {n.removesuffix(f"/{STATE}"): _read(remote, n) for n in there if n.endswith(f"/{STATE}")}
        self._saved = {folder: state for folder, state in states.items() if self._is_ours(folder, state)}
        ours = tuple(f"{folder}/" for folder in (*(f"{name}.partial" for name in self._artifacts), *self._saved))
        listed = {name for folder, s in self._saved.items() for name in (f"{folder}/{STATE}", *s.objects.values())}
        self._strays = {n for n in there if n.startswith(ours)} - listed  # of a run that was killed while it copied

    def fetch(self) -> list[str]:
        """Brings every folder that is neither finished nor begun here; each appears by one rename. Their names."""
        fetched = []
        for folder, state in self._saved.items():
            here = self._root / folder
            if here.exists() or all(self._artifacts[name].complete for name in state.artifacts):
                continue
            self._remote.fetch(state.objects, state.sizes, here, said_by=f"{folder}/{STATE}")
            fetched.append(folder)
        return fetched

    def save(self, finished: Collection[str]) -> None:
        """Copies what has changed since the last time, and removes what is not needed any more.

        Args:
            finished: the artefacts that the store has.
        """
        going = self._going()
        for folder, state in list(self._saved.items()):
            if folder not in going and set(state.artifacts) <= set(finished):
                self._remote.remove([f"{folder}/{STATE}"])
                self._strays |= set(self._saved.pop(folder).objects.values())
        self._remote.remove(sorted(self._strays))
        self._strays = set()
        for folder, artifacts in going.items():
            with suppress(FileNotFoundError), _moment(self._root, folder, artifacts) as moment:  # it is done by now
                self._put(folder, moment)

    def _put(self, folder: str, moment: _Moment) -> None:
        state, before = moment.state, self._saved.get(folder)
        if before == state or not any(file.startswith(_PROGRESS) for file in state.objects):
            return
        old = set(before.objects.values()) if before else set[str]()
        new = [file for file, name in state.objects.items() if name not in old]
        self._strays |= {state.objects[file] for file in new}  # until they are listed
        each(new, partial(self._copy, moment))
        text = {"artifacts": state.artifacts, "objects": state.objects, "sizes": state.sizes}
        self._remote.write(f"{folder}/{STATE}", (json.dumps(text, indent=1) + "\n").encode())
        self._saved[folder] = state
        self._strays = (self._strays | old) - set(state.objects.values())
        self._remote.remove(sorted(self._strays))
        self._strays = set()

    def _copy(self, moment: _Moment, file: str) -> None:
        name = moment.state.objects[file]
        if file in moment.read:
            self._remote.write(name, moment.read[file])
        else:
            self._remote.put(moment.paths[file], name)

    def _is_ours(self, folder: str, state: _State) -> bool:
        """Whether it is a folder of this run; and not, whatever the store says, some other place."""
        is_pack = re.fullmatch(r"packs/\w+", folder) and set(state.artifacts) <= self._artifacts.keys()
        return bool(is_pack) or (folder.removesuffix(".partial") in self._artifacts and folder.endswith(".partial"))

    def _going(self) -> dict[str, tuple[str, ...]]:
        """Folders under way, with the names of the artefacts that they become."""
        alone = {f"{name}.partial": (name,) for name, a in self._artifacts.items() if a.partial.exists()}
        packs = {f"packs/{pack}": sets for pack, sets in pack_members(self._root).items()}
        return alone | {pack: sets for pack, sets in packs.items() if set(sets) <= self._artifacts.keys()}


@contextmanager
def _moment(root: Path, folder: str, artifacts: tuple[str, ...]) -> Iterator[_Moment]:
    """What a restart can use of a folder.

    Raises:
        FileNotFoundError: the folder is not there any more.
    """
    try:
        yield _taken(root, folder, artifacts)
    finally:
        shutil.rmtree(root / ASIDE, ignore_errors=True)


def _taken(root: Path, folder: str, artifacts: tuple[str, ...]) -> _Moment:
    for left in reversed(range(_TRIES)):
        shutil.rmtree(root / ASIDE, ignore_errors=True)
        try:
            return _taken_at_once(root, folder, artifacts)
        except FileNotFoundError:  # a checkpoint made room for a newer one
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _taken_at_once(root: Path, folder: str, artifacts: tuple[str, ...]) -> _Moment:
    objects, sizes, paths, read = dict[str, str](), dict[str, int](), dict[str, Path](), dict[str, bytes]()
    for path in _usable(root / folder):
        file, stat = path.relative_to(root / folder).as_posix(), path.stat()
        objects[file], sizes[file] = f"{folder}/{file}@{stat.st_mtime_ns}", stat.st_size
        if path.suffix in (".json", ".jsonl"):  # small, and may change while it is copied
            read[file] = path.read_bytes()
            objects[file], sizes[file] = f"{objects[file]}-{len(read[file])}", len(read[file])
        else:
            paths[file] = _linked(path, root / ASIDE / file)
    return _Moment(_State(artifacts, objects, sizes), paths, read)


def _linked(path: Path, link: Path) -> Path:
    """Another name of a file, which outlives it; the file itself where there are no such links."""
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:
        return path
    return link


def _usable(folder: Path) -> list[Path]:
    """The files that a restart can use; of the checkpoints those of the newest."""
    newest = sorted(folder.glob("checkpoints/step-*[0-9]"))[-1:]
    found = [path for pattern in _USED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path for path in found if path.parent.parent.name != "checkpoints" or path.parent in newest]


def _read(remote: RemoteFolder, name: str) -> _State:
    found = json.loads(remote.read(name))
    return _State(tuple(found["artifacts"]), found["objects"], found["sizes"])
