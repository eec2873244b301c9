"""Work under way on the mirror: from what is copied here, a run on a new machine goes on in the middle of a job.

What a restart can use of a folder that is not finished (checkpoints, the log, k-NN graphs, the last update of k-means)
is copied there, and then `state.json`, which lists the copies. A copy never changes under its name, and one that is no
longer listed goes only afterwards: whatever `state.json` says is there, whole and of one moment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from grappa_dist.artifacts import Artifact
from grappa_dist.stages.packs import PACK_FILE, pack_members
from grappa_dist.stages.remote_folder import RemoteFolder, each

STATE = "state.json"
_USED = (  # in this order: what belongs to a checkpoint is there before it, so it is listed after it
    *("progress.safetensors", "checkpoints/step-*[0-9]/*", "checkpoints/*.json"),
    *("knn/epoch-*[0-9]/*", "knn/features-*[0-9]/*", PACK_FILE, "metrics.jsonl"),
)
_PROGRESS = ("progress.safetensors", "checkpoints/step-")  # without any of these a restart begins anew


@dataclass(frozen=True)
class _State:
    """What one state.json says."""

    artifacts: tuple[str, ...]  # that the folder becomes
    objects: Mapping[str, str]  # by the file that each is a copy of
    sizes: Mapping[str, int]


class WorkMirror:
    """Copies of folders under way, each below its name in the run directory."""

    def __init__(self, remote: RemoteFolder, names: Iterable[str], artifacts: Sequence[Artifact]) -> None:
        """Args: names: of the objects that are there; artifacts: of the run, finished or not, at least one."""
        self._remote, self._root = remote, artifacts[0].root
        self._artifacts = {a.name: a for a in artifacts}
        there = sorted(names)
        states = {n.removesuffix(f"/{STATE}"): _read(remote, n) for n in there if n.endswith(f"/{STATE}")}
        self._saved = {folder: state for folder, state in states.items() if self._is_ours(folder, state)}
        listed = {name for folder, s in self._saved.items() for name in (f"{folder}/{STATE}", *s.objects.values())}
        begun = (n for n in there if ".partial/" in n and n.partition(".partial/")[0] in self._artifacts)
        self._strays = [name for name in begun if name not in listed]  # of a run that was killed while it copied

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

    def save(self) -> None:
        """Copies what has changed since the last time, and removes what is finished."""
        self._remote.remove(self._strays)
        self._strays, going = [], self._going()
        for folder in [folder for folder in self._saved if folder not in going]:
            gone = self._saved.pop(folder)
            self._remote.remove([f"{folder}/{STATE}", *gone.objects.values()])  # in this order
        for folder, artifacts in going.items():
            found = _usable(self._root / folder)
            try:
                self._put(folder, _state(self._root, folder, artifacts, found))
            except (ValueError, FileNotFoundError):
                if all((self._root / folder / file).exists() for file in found):
                    raise  # else a checkpoint made room for a newer one, or all is done: seen the next time

    def _put(self, folder: str, state: _State) -> None:
        before = self._saved.get(folder)
        if before == state or not any(file.startswith(_PROGRESS) for file in state.objects):
            return
        old = set(before.objects.values()) if before else set[str]()
        each([file for file, name in state.objects.items() if name not in old], partial(self._copy, folder, state))
        self._remote.write(f"{folder}/{STATE}", (json.dumps(asdict(state), indent=1) + "\n").encode())
        self._saved[folder] = state
        self._remote.remove(sorted(old - set(state.objects.values())))

    def _copy(self, folder: str, state: _State, file: str) -> None:
        path = self._root / folder / file
        if path.suffix == ".jsonl":  # it grows while it is copied
            self._remote.write(state.objects[file], path.read_bytes()[: state.sizes[file]])
        else:
            self._remote.put(path, state.objects[file])

    def _is_ours(self, folder: str, state: _State) -> bool:
        """Whether it is a folder of this run; and not, whatever the store says, some other place."""
        is_pack = re.fullmatch(r"packs/\w+", folder) and set(state.artifacts) <= self._artifacts.keys()
        return bool(is_pack) or (folder.removesuffix(".partial") in self._artifacts and folder.endswith(".partial"))

    def _going(self) -> dict[str, tuple[str, ...]]:
        """Folders under way, with the names of the artefacts that they become."""
        alone = {f"{name}.partial": (name,) for name, a in self._artifacts.items() if a.partial.exists()}
        packs = {f"packs/{pack}": sets for pack, sets in pack_members(self._root).items()}
        return alone | {pack: sets for pack, sets in packs.items() if set(sets) <= self._artifacts.keys()}


def _usable(folder: Path) -> list[str]:
    """The files that a restart can use; of the checkpoints those of the newest."""
    newest = sorted(folder.glob("checkpoints/step-*[0-9]"))[-1:]
    found = [path for pattern in _USED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [
        path.relative_to(folder).as_posix()
        for path in found
        if path.parent.parent.name != "checkpoints" or path.parent in newest
    ]


def _state(root: Path, folder: str, artifacts: tuple[str, ...], files: Sequence[str]) -> _State:
    """The state of a folder as it is: a file that changes gets another object."""
    stats = {file: (root / folder / file).stat() for file in files}
    objects = {file: f"{folder}/{file}@{stat.st_mtime_ns}" for file, stat in stats.items()}
    return _State(artifacts, objects, {file: stat.st_size for file, stat in stats.items()})


def _read(remote: RemoteFolder, name: str) -> _State:
    found = json.loads(remote.read(name))
    return _State(tuple(found["artifacts"]), found["objects"], found["sizes"])
