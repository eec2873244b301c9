"""mirror: finished artefacts are copied to an object store, and fetched from there by a run that lacks them.

An object store has no rename, so a copy counts as complete when its manifest is there, which is written last. What a
killed upload left has no manifest, is not looked at, and is overwritten. Work under way stays in the run directory.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from grappa_dist.artifacts import MANIFEST, Artifact, sync_folder
from grappa_dist.data.remote import check_url, library_errors, store_of
from grappa_dist.observe import Console
from grappa_dist.stages.flow import Flow

LATEST = "latest.json"  # names the report and the model of the run that ended last
_PERIOD_S = 20.0
_IN_FLIGHT = 8


class Mirror:
    """Copies of finished artefacts below a URL."""

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._fs, self._path = store_of(self.url)
        found = self._call("listed", lambda: self._fs.find(self._path))
        below = (name.removeprefix(self._path).strip("/") for name in found)
        self._complete = {name.removesuffix(f"/{MANIFEST}") for name in below if name.endswith(f"/{MANIFEST}")}

    def fetch(self, artifacts: Iterable[Artifact]) -> list[Artifact]:
        """Brings what the store has and the run directory lacks; each appears by one rename."""
        wanted = [a for a in artifacts if a.name in self._complete and not a.complete]
        for artifact in wanted:
            folder = artifact.root / f"{artifact.name}.fetched"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._get(artifact, folder, MANIFEST)
            sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())["files"]
            for name in sizes:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{self.url}/{artifact.name}/{MANIFEST}: names {name!r}, outside of its folder")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._each(sizes, partial(self._get, artifact, folder))
            for name, size in sizes.items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(
                        f"{self.url}/{artifact.name}/{name}: {(folder / name).stat().st_size} bytes, its manifest says "
                        f"{size}; remove {self.url}/{artifact.name}/{MANIFEST} to have it made again"
                    )
            shutil.rmtree(artifact.partial, ignore_errors=True)  # of an attempt that is not needed any more
            os.rename(folder, artifact.path)
            sync_folder(artifact.path.parent)
        return wanted

    def save(self, artifacts: Iterable[Artifact]) -> None:
        """Copies what is finished and not there yet, each with its manifest last."""
        for artifact in artifacts:
            if artifact.name not in self._complete and artifact.complete:
                files: dict[str, int] = json.loads((artifact.path / MANIFEST).read_text())["files"]
                self._each(files, partial(self._put, artifact))
                self._put(artifact, MANIFEST)
                self._complete.add(artifact.name)

    def point(self, latest: Mapping[str, str]) -> None:
        """Says which report and model are the latest, in one object."""
        text = (json.dumps(dict(latest), indent=1) + "\n").encode()
        self._call(f"{LATEST} written", lambda: self._fs.pipe_file(f"{self._path}/{LATEST}", text))

    def _each(self, names: Iterable[str], do: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            list(pool.map(do, names))

    def _get(self, artifact: Artifact, folder: Path, name: str) -> None:
        place = f"{artifact.name}/{name}"
        self._call(f"{place} read", lambda: self._fs.get_file(f"{self._path}/{place}", str(folder / name)))

    def _put(self, artifact: Artifact, name: str) -> None:
        place = f"{artifact.name}/{name}"
        self._call(f"{place} written", lambda: self._fs.put_file(str(artifact.path / name), f"{self._path}/{place}"))

    def _call(self, what: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except library_errors() as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"mirror={self.url}: cannot be used ({what}): {type(error).__name__}: {said}") from error


@contextmanager
def mirrored(url: str | None, flow: Flow, console: Console) -> Iterator[None]:
    """Fetches what is on the store; while the block runs, and when it ends, copies there what gets finished."""
    if url is None:
        yield
        return
    mirror, artifacts = Mirror(url), artifacts_of(flow)
    fetched = mirror.fetch(artifacts)
    if fetched:
        console.say(f"{len(fetched)} artefacts fetched from {mirror.url}")
    stop = threading.Event()
    copier = threading.Thread(target=_copy, args=(mirror, artifacts, stop, console), name="mirror")
    copier.start()
    try:
        yield
    finally:
        stop.set()
        copier.join()
    mirror.save(artifacts)  # raises what went wrong
    mirror.point({"report": flow.report.name, "model": flow.model.name})


def _copy(mirror: Mirror, artifacts: list[Artifact], stop: threading.Event, console: Console) -> None:
    """Copies now and then until told to stop, and then once more: also of a run that fails or is stopped."""
    last = False
    while not last:
        last = stop.wait(_PERIOD_S)
        try:
            mirror.save(artifacts)
        except ValueError as error:  # the run goes on; what is missing is tried again, and fails it at its end
            console.say(f"warning: {error}")


def artifacts_of(flow: Flow) -> list[Artifact]:
    """All artefacts of a run, each once, in the order in which they are made."""
    found: dict[str, Artifact] = {}

    def add(value: Any) -> None:
        if isinstance(value, Artifact):
            found[value.name] = value
        elif isinstance(value, Mapping | tuple):
            for part in value.values() if isinstance(value, Mapping) else value:
                add(part)

    for field in fields(flow):
        add(getattr(flow, field.name))
    return list(found.values())
