"""mirror: finished artefacts are copied to an object store, and fetched from there by a run that lacks them.

An object store has no rename, so a copy counts as complete when its manifest is there, which is written last. What a
killed upload left has no manifest, is not looked at, and is overwritten. Work under way is copied by mirror_work.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from grappa_dist.artifacts import MANIFEST, Artifact
from grappa_dist.console import Console
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.mirror_work import WorkMirror
from grappa_dist.stages.remote_folder import RemoteFolder, each

LATEST = "latest.json"  # names the report and the model of the run that ended last
_PERIOD_S = 20.0


class Mirror:
    """Copies of finished artefacts below a URL."""

    def __init__(self, url: str) -> None:
        self.remote = RemoteFolder(url)
        self.found = self.remote.names()
        self.complete = {name.removesuffix(f"/{MANIFEST}") for name in self.found if name.endswith(f"/{MANIFEST}")}

    def fetch(self, artifacts: Iterable[Artifact]) -> list[Artifact]:
        """Brings what the store has and the run directory lacks; each appears by one rename."""
        wanted = [a for a in artifacts if a.name in self.complete and not a.complete]
        for artifact in wanted:
            manifest = f"{artifact.name}/{MANIFEST}"
            sizes: dict[str, int] = json.loads(self.remote.read(manifest))["files"]
            objects = {name: f"{artifact.name}/{name}" for name in (*sizes, MANIFEST)}
            shutil.rmtree(artifact.partial, ignore_errors=True)  # of an attempt that is not needed any more
            self.remote.fetch(objects, sizes, artifact.path, said_by=manifest)
        return wanted

    def save(self, artifacts: Iterable[Artifact]) -> None:
        """Copies what is finished and not there yet, each with its manifest last."""
        for artifact in artifacts:
            if artifact.name not in self.complete and artifact.complete:
                files: dict[str, int] = json.loads((artifact.path / MANIFEST).read_text())["files"]
                each(files, partial(self._put, artifact))
                self._put(artifact, MANIFEST)
                self.complete.add(artifact.name)

    def point(self, latest: Mapping[str, str]) -> None:
        """Says which report and model are the latest, in one object."""
        text = (json.dumps(dict(latest), indent=1) + "\n").encode()
        self.remote.write(LATEST, text)

    def _put(self, artifact: Artifact, name: str) -> None:
        self.remote.put(artifact.path / name, f"{artifact.name}/{name}")


@contextmanager
def mirrored(url: str | None, flow: Flow, console: Console) -> Iterator[None]:
    """Fetches what is on the store; while the block runs, and when it ends, copies there what gets finished."""
    if url is None:
        yield
        return
    mirror, artifacts = Mirror(url), artifacts_of(flow)
    work = WorkMirror(mirror.remote, mirror.found, artifacts)
    if fetched := mirror.fetch(artifacts):
        console.say(f"{len(fetched)} artefacts fetched from {mirror.remote.url}")
    if begun := work.fetch():
        console.say(f"fetched from {mirror.remote.url}, to go on with: {', '.join(begun)}")

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
    save()  # raises what went wrong
    if flow.report.complete and flow.model.complete:  # not after a run that was to end before them
        mirror.point({"report": flow.report.name, "model": flow.model.name})


def _copy(save: Callable[[], None], stop: threading.Event, console: Console) -> None:
    """Copies now and then until told to stop, and then once more: also of a run that fails or is stopped."""
    last = False
    while not last:
        last = stop.wait(_PERIOD_S)
        try:
            save()
        except (ValueError, OSError) as error:  # the run goes on; what fails at its end ends it
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
