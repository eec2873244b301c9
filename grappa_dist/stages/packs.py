"""Which adaptor sets share a job, and the files of such a job until each set's artefact is committed.

A job of one set works in that set's own unfinished artefact. A job of several has a folder of its own below `packs/`
with one checkpoint for all, and goes when they are done. What has begun goes on as it began, whatever the settings say
now, so nothing is lost and a resumed job ends with the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays, replacing, write_json
from grappa_dist.config import fingerprint
from grappa_dist.observe import read_events
from grappa_dist.ops.placement import shared_out
from grappa_dist.stages.modelling import ADAPTORS_FILE

PACK_FILE, LOG_FILE = "pack.json", "metrics.jsonl"


@dataclass(frozen=True)
class AdaptSet:
    """One partition and the adaptor set that it makes."""

    num_labels: int
    labels: RowArrays
    artifact: Artifact
    centroids: Path | None = None  # (K, D) of the partition, where the classifier starts; None: at random

    @property
    def name(self) -> str:
        return f"k={self.num_labels}"


def figure(name: str, of: AdaptSet) -> str:
    """What a figure of one set is called in the log of a job of several."""
    return f"{name} {of.name}"


def pack_folder(sets: Sequence[AdaptSet]) -> Path:
    """Where a job keeps its checkpoints and its log."""
    if len(sets) == 1:
        return sets[0].artifact.partial
    return sets[0].artifact.root / "packs" / fingerprint([s.artifact.name for s in sets])


def begin(sets: Sequence[AdaptSet]) -> Path:
    """The job's folder; what an earlier attempt left there is kept."""
    if len(sets) == 1:
        return sets[0].artifact.begin()
    folder = pack_folder(sets)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PACK_FILE).exists():
        write_json(folder / PACK_FILE, {"sets": [s.artifact.name for s in sets]})
    return folder


def begun(sets: Sequence[AdaptSet]) -> list[tuple[AdaptSet, ...]]:
    """The groups among unfinished sets that have checkpoints, as they were packed."""
    left = {s.artifact.name: s for s in sets}
    groups = list[tuple[AdaptSet, ...]]()
    for path in sorted(sets[0].artifact.root.glob(f"packs/*/{PACK_FILE}")) if sets else ():
        names = json.loads(path.read_text())["sets"]
        if all(name in left for name in names) and _has_checkpoint(path.parent):
            groups.append(tuple(left.pop(name) for name in names))
    return groups + [(s,) for s in left.values() if _has_checkpoint(s.artifact.partial)]


def group(sets: Sequence[AdaptSet], per_job: int) -> list[tuple[AdaptSet, ...]]:
    """The sets of each job: groups that have begun, then the others, at most `per_job` together."""
    old = begun(sets)
    taken = {s.artifact.name for of_job in old for s in of_job}
    return old + shared_out([s for s in sets if s.artifact.name not in taken], per_job)


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def finish(sets: Sequence[AdaptSet], adaptors: Sequence[Mapping[str, Tensor]]) -> None:
    """Saves every set of a job that is trained, then commits one after the other.

    All files are there before the first set is committed, so `commit_trained` can go on from a kill in between.
    """
    for number, one in enumerate(sets):
        if one.artifact.complete:
            continue
        folder = one.artifact.begin()
        if len(sets) > 1:
            _write_log(pack_folder(sets) / LOG_FILE, folder / LOG_FILE, one)
        with replacing(folder / ADAPTORS_FILE) as temporary:
            save_file(dict(adaptors[number]), temporary)
    commit_trained(sets)


def commit_trained(sets: Sequence[AdaptSet]) -> None:
    """Commits the sets whose weights are saved: that happens last of all."""
    for one in sets:
        if not one.artifact.complete and (one.artifact.partial / ADAPTORS_FILE).exists():
            one.artifact.commit(discard=["checkpoints"])
    if len(sets) > 1 and all(one.artifact.complete for one in sets):
        shutil.rmtree(pack_folder(sets), ignore_errors=True)


def _write_log(source: Path, target: Path, one: AdaptSet) -> None:
    """The log of one set, as if it had been trained alone."""
    with replacing(target) as temporary, open(temporary, "w") as file:
        for event in read_events(source):
            file.write(json.dumps(_of_set(event, one)) + "\n")


def _of_set(event: Mapping[str, Any], one: AdaptSet) -> dict[str, Any]:
    own = f" {one.name}"
    plain = {key: value for key, value in event.items() if " " not in key}
    return plain | {"job": one.name} | {k.removesuffix(own): v for k, v in event.items() if k.endswith(own)}
