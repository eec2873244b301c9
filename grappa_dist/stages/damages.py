"""Damaged artefacts of a run: found, set aside, recorded, and named at the end and in the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grappa_dist.artifacts import CONTENT_BYTES, Artifact, NotSeen, look_at
from grappa_dist.checksums import MANIFEST, DamagedArtifact, set_aside
from grappa_dist.console import Events, pluralize, read_events
from grappa_dist.stages.run import Run
from grappa_dist.storage import Result

DAMAGES_FILE = "damages.jsonl"  # in the run directory: what was set aside, once and for all


@dataclass(frozen=True)
class Damage:
    """A folder that was set aside."""

    artifact: str  # its name
    file: str  # in its folder
    why: str  # what follows the file in a sentence
    aside: str  # where it lies now, in the run directory

    def __str__(self) -> str:
        return f"{self.artifact}: {self.file} {self.why}; kept as {self.aside}"


def read_damages(root: Path) -> list[Damage]:
    """What was set aside in a run directory, by this run and by earlier ones."""
    keys = Damage.__dataclass_fields__.keys()
    events = (event for event in read_events(root / DAMAGES_FILE) if keys <= event.keys())
    return [Damage(**{key: str(event[key]) for key in keys}) for event in events]


@dataclass
class Mending:
    """What this run has set aside, each artefact once: a second time the storage is at fault."""

    run: Run
    damages: list[Damage] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # of the folders in the run directory
    unseen: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # artefacts without checksums

    def mended(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns; when it meets a damaged artefact, that is set aside, and `work` called again.

        The last line is what was damaged.

        Raises:
            DamagedArtifact, RuntimeError, NotSeen: as `mend` and `look_again`.
        """
        while True:
            try:
                found = work()
                if self.damages:
                    self.run.console.log(self.describe())
                return found
            except DamagedArtifact as damage:
                self.mend(damage)
            except NotSeen as error:
                self.look_again(error)
            self.run.runner.renew_workers()  # which may have mapped what was set aside

    def check(self, artifacts: Sequence[Artifact]) -> bool:
        """Sets aside what is damaged among finished artefacts: all sizes are checked, and contents within
        CONTENT_BYTES. Whether there was anything."""
        before, began = len(self.damages), time.monotonic()
        for artifact in artifacts:
            if os.path.lexists(artifact.path) and not artifact.complete:  # or a link to nothing
                self.mend(DamagedArtifact(str(artifact.path / MANIFEST), str(artifact.path), "is missing"))
        look = look_at(artifacts, CONTENT_BYTES)
        for damage in look.damages:
            self.mend(damage)
        self._tell_old(look.without_checksums)
        if look.all_bytes:
            took = round(time.monotonic() - began, 4)
            self.run.console.event("artefacts_checked", bytes=look.num_bytes, of_bytes=look.all_bytes, seconds=took)
        return len(self.damages) > before

    def _tell_old(self, artifacts: Iterable[Artifact]) -> None:
        old = {artifact.name for artifact in artifacts} - self.told
        if old:
            self.run.console.log(
                f"{pluralize(len(old), 'artefact')} made before there were checksums: sizes alone are checked"
            )
        self.told |= old

    def mend(self, damage: DamagedArtifact) -> None:
        """Sets the folder of a damaged artefact aside, so that it is made anew.

        Raises:
            DamagedArtifact: it does not belong to the run directory.
            RuntimeError: it was made anew by this run and is damaged again.
        """
        root, folder = self.run.store.root, Path(damage.folder)
        if root not in folder.parents:
            raise damage
        name = folder.relative_to(root).as_posix()
        if name in self.names:
            raise RuntimeError(
                f"{damage.path} {damage.why}, for the second time in this run: is the storage or the memory of the "
                f"machine that writes it at fault? Nothing was removed; {root / DAMAGES_FILE} lists what was set aside"
            ) from damage
        self.names.add(name)
        file = Path(damage.path).relative_to(folder).as_posix()
        found = Damage(name, file, damage.why, set_aside(folder).relative_to(root).as_posix())
        self.damages.append(found)
        self.run.console.log(f"damaged: {found}; it is made anew")
        events = Events(root / DAMAGES_FILE)
        events("damaged", **vars(found))
        events.close()

    def look_again(self, error: NotSeen) -> None:
        """Goes on after a finished artefact was not seen: what is there is used, and what is not is made.

        Raises:
            NotSeen: it is the same one as before.
        """
        if str(error) in self.unseen:
            raise error
        self.unseen.append(str(error))
        self.run.console.log(f"warning: {error}. This run looks again, and makes what it does not find")

    def describe(self) -> str:
        """A line for the end of the run."""
        names = ", ".join(damage.artifact for damage in self.damages)
        return f"damaged and made anew: {names}; {self.run.store.root / DAMAGES_FILE} has the reasons"


def damages_among(root: Path, names: Iterable[str]) -> Iterator[Damage]:
    """The damages of artefacts of these names, finished or not, in the order in which they were found."""
    known = set(names)
    for damage in read_damages(root):
        if damage.artifact.removesuffix(".partial") in known:
            yield damage
