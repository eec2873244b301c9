"""Which adaptor sets share a job, and the files of such a job until each set's artefact is committed.

A job of one set works in that set's own unfinished artefact. A multi-set job has a folder below `packs/` with one
checkpoint for all of its sets, which is removed when the sets are committed. The states of a job, as its files show:

    fresh        no checkpoint: the sets may share a job with any others
    under way    there is a checkpoint: the job goes on with the same sets under any settings, so that nothing is lost
                 and it ends with the same bits
    saved        the weights of all of its sets are written, each in its unfinished artefact (`finish_job`)
    committed    the artefacts are complete, and the folder is gone (`commit_trained`)

A kill may come between any two. Before jobs begin, `commit_leftovers` commits the sets of those that were saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays
from grappa_dist.bucket import send, withdraw
from grappa_dist.checksums import DamagedArtifact
from grappa_dist.config import fingerprint
from grappa_dist.console import METRICS_FILE, read_events
from grappa_dist.distributed.placement import split_evenly
from grappa_dist.files import make_folder, read_json, save_tensors, write_json, write_utf8
from grappa_dist.models.spec import ADAPTORS_FILE

MULTI_SET_FOLDER, MULTI_SET_FILE = "packs", "pack.json"  # of all multi-set jobs; in the folder of each: its sets


@dataclass(frozen=True)
class AdaptSet:
    """One partition and the adaptor set that is trained on it."""

    num_labels: int
    labels: RowArrays
    artifact: Artifact
    centroids: Path | None = None  # (K, D) of the partition, where the classifier starts; None: at random
    title: str = ""  # of a set that is not trained on a partition

    @property
    def name(self) -> str:
        return self.title or f"k={self.num_labels}"


def jobs_of(sets: Sequence[AdaptSet], per_job: int) -> list[tuple[AdaptSet, ...]]:
    """The sets of each job: first the jobs that are under way, then fresh sets, at most `per_job` together."""
    return _under_way(sets) + split_evenly(fresh_sets(sets), per_job)


def fresh_sets(sets: Sequence[AdaptSet]) -> list[AdaptSet]:
    """The sets that are neither complete nor in a job that is under way."""
    taken = {s.artifact.name for of_job in _under_way(sets) for s in of_job}
    return [s for s in sets if not s.artifact.complete and s.artifact.name not in taken]


def _under_way(sets: Sequence[AdaptSet]) -> list[tuple[AdaptSet, ...]]:
    """The sets of each job that has a checkpoint and lacks one of them; no set is in two of these jobs."""
    jobs, taken = list[tuple[AdaptSet, ...]](), set[str]()
    for members in [*_multi_set_jobs(sets), *((s,) for s in sets)]:
        names = {s.artifact.name for s in members}
        lacks = any(not s.artifact.complete for s in members)
        if lacks and not names & taken and any((job_folder(members) / "checkpoints").glob("step-*")):
            jobs.append(members)
            taken |= names
    return jobs


def _multi_set_jobs(sets: Sequence[AdaptSet]) -> list[tuple[AdaptSet, ...]]:
    """The sets of each multi-set job that has a folder and whose sets are all among `sets`, finished or not."""
    known = {s.artifact.name: s for s in sets}
    of_jobs = multi_set_members(sets[0].artifact.root).values() if sets else []
    return [tuple(known[name] for name in names) for names in of_jobs if all(name in known for name in names)]


def multi_set_members(root: Path) -> dict[str, tuple[str, ...]]:
    """The names of the artefacts that each multi-set job trains, by the name of its folder.

    Raises:
        DamagedArtifact: a file of names cannot be read.
    """
    paths = [path for path in sorted(root.glob(f"{MULTI_SET_FOLDER}/*/{MULTI_SET_FILE}")) if not path.parent.suffix]
    return {path.parent.name: _members_in(path) for path in paths}  # a suffix: it was set aside


def _members_in(path: Path) -> tuple[str, ...]:
    try:
        return tuple(map(str, read_json(path)["sets"]))
    except (ValueError, KeyError, TypeError) as error:
        why = f"does not name the sets of a job: {str(error).removeprefix(f'{path}: ')}"
        raise DamagedArtifact(str(path), str(path.parent), why) from None


def job_folder(sets: Sequence[AdaptSet]) -> Path:
    """Where a job keeps its checkpoints and its log."""
    if len(sets) == 1:
        return sets[0].artifact.partial
    return sets[0].artifact.root / MULTI_SET_FOLDER / fingerprint([s.artifact.name for s in sets])


def short_name(sets: Sequence[AdaptSet]) -> str:
    """A job's name of a few dozen characters at most, which no job of other sets or settings has."""
    more = f"+{len(sets) - 1}" if len(sets) > 1 else ""
    which = fingerprint([s.artifact.name for s in sets]) if more else sets[0].artifact.fingerprint
    return f"{sets[0].name}{more}-{which}"


def figure_name(figure: str, one: AdaptSet) -> str:
    """The name of one set's figure in the log of a multi-set job."""
    return f"{figure} {one.name}"


def begin_job(sets: Sequence[AdaptSet]) -> Path:
    """Makes the job's folder; what an earlier attempt left there is kept."""
    if len(sets) == 1:
        return sets[0].artifact.begin()
    folder = job_folder(sets)
    make_folder(folder)
    if not (folder / MULTI_SET_FILE).exists():
        write_json(folder / MULTI_SET_FILE, {"sets": [s.artifact.name for s in sets]})
        send(folder / MULTI_SET_FILE)
    return folder


def finish_job(sets: Sequence[AdaptSet], adaptors: Sequence[Mapping[str, Tensor]]) -> None:
    """Saves every set of a job that is trained, then commits one after the other.

    All files are there before the first set is committed, so `commit_leftovers` can go on from a kill in between.
    """
    logs = _logs_of(job_folder(sets) / METRICS_FILE, sets) if len(sets) > 1 else {}
    for number, one in enumerate(sets):
        if one.artifact.complete:
            continue
        folder = one.artifact.begin()
        if logs:
            write_utf8(folder / METRICS_FILE, "".join(logs[one.name]))
        save_tensors(folder / ADAPTORS_FILE, adaptors[number], summed=True)
    commit_trained(sets)


def _logs_of(source: Path, sets: Sequence[AdaptSet]) -> dict[str, list[str]]:
    """The lines of each set's log, as if it had been trained alone; the job's is read once, whatever their number."""
    logs: dict[str, list[str]] = {one.name: [] for one in sets}
    for event in read_events(source):
        plain = {key: value for key, value in event.items() if " " not in key}
        own: dict[str, dict[str, Any]] = {name: {} for name in logs}
        for key, value in event.items():
            figure, _, name = key.rpartition(" ")
            if figure and name in own:
                own[name][figure] = value
        for name, lines in logs.items():
            lines.append(json.dumps({**plain, "job": name, **own[name]}) + "\n")
    return logs


def commit_trained(sets: Sequence[AdaptSet]) -> None:
    """Commits the sets of a job if the weights of all are saved, and removes the job's folder last.

    If those of one are not, the job has to go on from its checkpoints, and for that it needs all of its sets.
    """
    if not all(one.artifact.complete or (one.artifact.partial / ADAPTORS_FILE).exists() for one in sets):
        return
    for one in sets:
        if not one.artifact.complete:
            one.artifact.commit(discard=["checkpoints"])
    if len(sets) > 1:
        folder = job_folder(sets)
        withdraw(folder / "checkpoints")
        withdraw(folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # before the file that names the sets
        shutil.rmtree(folder, ignore_errors=True)


def commit_leftovers(sets: Sequence[AdaptSet]) -> None:
    """Commits what jobs saved before they were killed, among all sets of a run, complete ones too.

    A set whose multi-set job is under way is left alone even if it was saved by itself: the job needs all of its sets.
    """
    for members in _multi_set_jobs(sets):
        commit_trained(members)
    needed = {s.artifact.name for members in _under_way(sets) if len(members) > 1 for s in members}
    for one in sets:
        if one.artifact.name not in needed:
            commit_trained([one])
