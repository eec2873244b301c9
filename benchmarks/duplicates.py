"""Near-duplicates and outliers among many images: seconds, memory, and which share of the planted ones is found.

Rows are drawn around class centres and lie in a file that is mapped, as embeddings that were made before. Of every 20
images, the last is a copy of the one before with noise (cosine 0.999 or so); some are drawn around no centre.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faiss_baselines import set_threads
from benchmarks.harness import Log, Timing, aligned, aligned_header, check_least, machine, timed
from grappa_dist.console import Console
from grappa_dist.data.decoding import BadImage
from grappa_dist.retrieval.collection import Collection, Part
from grappa_dist.retrieval.duplicates import Groups, find_groups
from grappa_dist.retrieval.nearest import Rows
from grappa_dist.retrieval.neighbours import Graph, Outliers, outliers_of

EVERY, CLASS = 20, 100  # images for one copy, and around a centre
_BLOCK, _NOISE = 50_000, 0.05
_GIB = 2**30


@dataclass(frozen=True)
class DuplicatesSettings:
    """Options of `bench.py duplicates`."""

    rows: int
    dim: int
    outliers: int
    threshold: float
    threads: int
    seed: int

    def check(self) -> None:
        check_least(self, rows=EVERY, dim=2, outliers=1, threads=1, seed=0)
        if self.outliers > self.rows // EVERY:
            raise ValueError(f"--outliers must be at most {self.rows // EVERY} for --rows {self.rows}")


@dataclass(frozen=True)
class DuplicatesFindings:
    """What was found, and what it took."""

    rows: int
    groups: Timing
    outliers: Timing | None  # None: all pairs were compared, and there is no graph to score by
    peak_bytes: int  # resident, of the process, mapped rows among them
    planted_groups: int
    found_groups: int  # planted ones among the groups
    other_groups: int
    planted_outliers: int
    found_outliers: int
    measured: str  # the recall, as the command prints it


def write_rows(path: Path, settings: DuplicatesSettings) -> np.ndarray:
    """Draws the rows, (rows, D) unit rows on the grid of features, into a file; returns the ids of the outliers."""
    rng = np.random.default_rng(settings.seed)
    centres = rng.normal(size=(max(1, settings.rows // CLASS), settings.dim)).astype(np.float32)
    odd = np.arange(settings.outliers) * (settings.rows // settings.outliers // EVERY * EVERY or EVERY)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (settings.rows, settings.dim))
    for first in range(0, settings.rows, _BLOCK):
        count = min(_BLOCK, settings.rows - first)
        drawn = rng.normal(size=(count, settings.dim)).astype(np.float32)
        drawn += centres[rng.integers(len(centres), size=count)]
        copies = drawn[EVERY - 1 :: EVERY]
        copies[:] = drawn[EVERY - 2 :: EVERY][: len(copies)] + _NOISE * rng.normal(size=copies.shape)
        inside = odd[(odd >= first) & (odd < first + count)] - first
        drawn[inside] = rng.normal(size=(len(inside), settings.dim))
        rows[first : first + count] = np.rint(drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * 2**24) / 2**24
    rows.flush()
    return odd


def measure_duplicates(settings: DuplicatesSettings, log: Log) -> DuplicatesFindings:
    """Looks for both in rows that are drawn into a folder of TMPDIR.

    Raises:
        ValueError: naming a flag that is wrong.
    """
    settings.check()
    set_threads(settings.threads)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.npy")
        odd = write_rows(path, settings)
        log(f"{settings.rows:,} rows of {settings.dim} channels are drawn")
        rows: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
        found, groups = timed(lambda: _groups(rows, settings.threshold))
        log(f"groups: {groups.seconds:.0f} s")
        scored, outliers = _outliers(found.graph, settings.outliers)
    planted = {(row - 1, row) for row in range(EVERY - 1, settings.rows, EVERY)}
    pairs = {tuple(group.rows) for group in found.groups}
    places = set() if scored is None or found.graph is None else set(found.graph.ids[scored.places].tolist())
    return DuplicatesFindings(
        settings.rows,
        groups,
        outliers,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        planted_groups=len(planted),
        found_groups=len(planted & pairs),
        other_groups=len(pairs - planted),
        planted_outliers=len(odd),
        found_outliers=len(places & set(odd.tolist())),
        measured=found.recall or "all pairs were compared",
    )


def _groups(rows: Rows, threshold: float) -> Groups:
    names = range(len(rows))
    part = Part(rows, {}, lambda: [f"{number:09d}.jpg" for number in names], lambda place: BadImage("drawn"))
    return find_groups(Collection((part,)), threshold, torch.device("cpu"), Console())


def _outliers(graph: Graph | None, most: int) -> tuple[Outliers | None, Timing | None]:
    return (None, None) if graph is None else timed(lambda: outliers_of(graph, most, torch.device("cpu")))


def as_text(header: dict[str, str], found: DuplicatesFindings) -> str:
    scored = None if found.outliers is None else (found.outliers, found.planted_outliers, found.found_outliers, 0)
    lines = [("", "seconds", "CPU seconds", "planted", "found", "others")]
    for name, line in (
        ("groups", (found.groups, found.planted_groups, found.found_groups, found.other_groups)),
        ("outliers", scored),
    ):
        if line is not None:
            timing, planted, hits, others = line
            counts = (f"{planted:,}", f"{hits:,}", f"{others:,}")
            lines.append((name, f"{timing.seconds:.1f}", f"{timing.cpu:.1f}", *counts))
    memory = f"{found.peak_bytes / _GIB:.2f} GiB resident at most, of one process, with the mapped rows"
    return "\n".join([aligned_header(header), aligned(lines), memory, found.measured])


def as_json(header: dict[str, str], found: DuplicatesFindings) -> dict[str, Any]:
    return {**header, **asdict(found)}


SHORT = "near-duplicates and outliers: seconds, memory, and which planted ones are found"
DESCRIPTION = """\
Looks for near-duplicates and outliers among drawn rows in which both are planted, as `grappa-dist duplicates` does
among embeddings: all pairs up to 100,000 rows, through lists of near rows above. Prints seconds, memory and what was
found."""
EXAMPLE = """example, a quarter of an hour on two cores:
  python launch/bench.py duplicates --rows 1000000"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=200_000, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--outliers", type=int, default=100, metavar="N", help="planted and asked for; default: %(default)s")
    add("--threshold", type=float, default=0.98, metavar="C", help="least cosine; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = DuplicatesSettings(**options)
    header = machine(settings.threads, "faiss-cpu")
    found = measure_duplicates(settings, log)
    return as_text(header, found), as_json(header, found)
