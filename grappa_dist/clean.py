"""--clean: what a run directory holds that no result of this configuration needs, with sizes; removed where asked for.

Only what this program put there is named: artefacts, whose manifest or name says so, unfinished or set aside ones, the
jobs of several sets, entries of the index cache, and temporary files of killed processes. What a link in the run
directory points at stays, and so does every folder that has files which its manifest does not list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa_dist.artifacts import Artifact, Store, remove_artifact
from grappa_dist.bucket import bucket_of
from grappa_dist.checksums import MANIFEST
from grappa_dist.config import Config
from grappa_dist.console import format_bytes, pluralize
from grappa_dist.data.index import Shard
from grappa_dist.data.index_cache import IndexCache
from grappa_dist.data.open_images import generated_artifacts, is_generated, open_images
from grappa_dist.files import read_json
from grappa_dist.inputs import look
from grappa_dist.layout import lay_out
from grappa_dist.stages.flow import artifacts_of
from grappa_dist.stages.multi_set_jobs import MULTI_SET_FILE, MULTI_SET_FOLDER

_ARTIFACT = re.compile(r"(?P<name>.+-[0-9a-f]{10})(?P<state>(\.(partial|removed|fetched|damaged(-\d+)?))*)")
_KINDS = frozenset(  # first parts of the kinds of artefacts
    {
        *("features", "labels", "partitions", "adaptors", "fusion", "galleries", "truth", "scores", "insight"),
        *("models", "reports", "collection"),
    }
)
_DEEPEST = 3  # parts of an artefact's path, as of features/<model>/<shard>
_INDEX = re.compile(r"[0-9a-f]{32}(\.npy|\.sum|(\.unchanged|\.seen)?\.json)")
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")  # of files.replace
_WHY = {"partial": "unfinished", "removed": "half removed", "fetched": "half fetched", "": "of other settings or data"}


@dataclass(frozen=True)
class Unneeded:
    """A file or folder that no current result needs."""

    path: Path
    why: str
    size: int  # bytes


def clean(config: Config, root: Path, *, remove: bool) -> str:
    """Lists, and removes if asked to, what no result of this configuration needs; nothing else is touched.

    Raises:
        ValueError: there is no such run directory, a run writes to it, or its data cannot be read, so that it is
            unknown what is needed.
    """
    if (bucket := bucket_of(root)) is not None:
        raise ValueError(
            f"{bucket.url}: --clean looks through a directory and not through a bucket; expected a run in a directory. "
            "Whole runs may be removed by the tools of the store"
        )
    if not root.is_dir():
        raise ValueError(f"{root}: no such directory, so there is nothing to clean")
    store = Store(root)
    with store.lock():
        if not is_generated(config.data, store):
            raise ValueError(f"{config.data.collection} is not generated in {root} yet, so what is needed is unknown")
        inputs = look(config, root)
        if inputs.missing:
            raise ValueError(
                f"{pluralize(inputs.missing, 'image')} of data.train and data.test are in no shard yet, so what is "
                "needed is unknown; run it first"
            )
        config = inputs.config
        train, test = open_images(config.data, store, config.resources, write_index=False)
        made = (*generated_artifacts(store, config.data), *artifacts_of(lay_out(config, store, train, test)))
        needed = {artifact.name: artifact for artifact in made}
        shards = [*train.shards, *(test.shards if test else ())]
        strange = list[Path]()
        found = [*_artifacts(root, needed, strange), *_jobs(root, needed), *_index(root, shards), *_temporary(root)]
        found += [Unneeded(path, "shards of images that are not named now", _size(path)) for path in inputs.unneeded()]
        found.sort(key=lambda each: each.path)
        for each in found if remove else ():
            remove_artifact(each.path) if each.path.is_dir() else each.path.unlink(missing_ok=True)
    return _describe(root, found, strange, removed=remove)


def _artifacts(root: Path, needed: dict[str, Artifact], strange: list[Path]) -> Iterator[Unneeded]:
    """Folders of artefacts that are not needed; those with files of others are added to `strange` instead."""
    linked = {path.resolve() for path in root.iterdir() if path.is_symlink()}
    for path, match in _named_as_artifacts(root):
        name, state = path.with_name(match["name"]).relative_to(root).as_posix(), match["state"].rpartition(".")[2]
        is_work = match["state"] == ".partial" and name in needed and not needed[name].complete
        if is_work or (not state and name in needed) or path.resolve() in linked:
            continue
        if state == "":
            manifest = _manifest_of(path)
            if f"{manifest.get('kind')}-{manifest.get('fingerprint')}" != name:
                continue  # not ours
            if not _files(path) <= {*manifest.get("files", ()), MANIFEST}:
                strange.append(path)
                continue
        yield Unneeded(path, _WHY.get(state, "damaged, and made anew since"), _size(path))


def _named_as_artifacts(root: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Folders below a run directory that are named as artefacts of ours are; links are not followed."""
    folders = [root]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            parts = path.relative_to(root).parts
            if path.is_symlink() or not path.is_dir() or re.split(r"-[0-9a-f]{10}", parts[0])[0] not in _KINDS:
                continue
            if match := _ARTIFACT.fullmatch(path.name):
                yield path, match
            elif len(parts) < _DEEPEST:
                folders.append(path)


def _manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a finished artefact; empty where there is none that can be read."""
    try:
        found = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _jobs(root: Path, needed: dict[str, Artifact]) -> Iterator[Unneeded]:
    """Folders of multi-set jobs that train nothing which is needed and missing."""
    for path in sorted((root / MULTI_SET_FOLDER).glob("*")):
        sets = _sets_of(path)
        if sets is None or any(name in needed and not needed[name].complete for name in sets):
            continue
        yield Unneeded(path, "a job of sets that are finished, or of other settings", _size(path))


def _sets_of(job: Path) -> list[str] | None:
    """The artefacts that a multi-set job trains; None where the folder is none of ours."""
    try:
        found = read_json(job / MULTI_SET_FILE)["sets"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) else None


def _index(root: Path, shards: list[Shard]) -> Iterator[Unneeded]:
    """Entries of the index cache that are about other shards."""
    kept = IndexCache(root / "index").names_of(shards)
    for path in sorted((root / "index").glob("*")):
        if _INDEX.fullmatch(path.name) and path.name not in kept:
            yield Unneeded(path, "the index of other shards", path.stat().st_size)


def _temporary(root: Path) -> Iterator[Unneeded]:
    """Temporary files of processes that were killed: nobody writes while the lock is held."""
    for folder in (root, root / "index"):
        for path in sorted(folder.glob(".*")):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                yield Unneeded(path, "left by a process that was killed", path.stat().st_size)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _size(folder: Path) -> int:
    if folder.is_file():
        return folder.stat().st_size
    return sum(os.lstat(folder / file).st_size for file in _files(folder))


def _describe(root: Path, found: list[Unneeded], strange: list[Path], *, removed: bool) -> str:
    lines = [f"{format_bytes(each.size):>10}  {each.path.relative_to(root)}  ({each.why})" for each in found]
    lines += [f"{'kept':>10}  {path.relative_to(root)}  (it has files that are not ours)" for path in strange]
    total = (
        f"{pluralize(len(found), 'file or folder', 'files and folders')}, {format_bytes(sum(e.size for e in found))}"
    )
    if not found:
        return "\n".join([*lines, f"{root}: nothing that this configuration does not need"])
    return "\n".join([*lines, f"{total} removed" if removed else f"{total}; nothing is removed without --yes"])
