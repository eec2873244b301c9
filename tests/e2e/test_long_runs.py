"""A long run from end to end: 10,000 steps, then 300 graphs, and no process of it grows."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from grappa_dist.console import read_events
from tests.e2e import runs
from tests.stages import tiny

pytestmark = [pytest.mark.long, pytest.mark.timeout(5400)]
EPOCHS, GRAPHS = 3334, 300
LOOK_S = 2.0
MOST_KIB = 4096  # that a process may grow by between the second and the last quarter of a stage
MOST_OPENED = 12  # files and threads, likewise: connections come and go


@dataclass(frozen=True)
class Look:
    """One process at one moment."""

    title: str
    kib: int  # memory of its own and its share of what it shares, without files
    files: int
    threads: int
    zombie: bool


def look_at(pid: int) -> Look | None:
    """None where it has just ended."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text()
        fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in status.splitlines()}
        if fields["State"][0] == "Z":
            return Look(fields["Name"][0], 0, 0, 0, True)
        title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:80]
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in memory if line.startswith("Pss_Anon:"))
        return Look(title, kib, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"][0]), False)
    return None


def watch(program: subprocess.Popen[str]) -> dict[int, list[tuple[float, Look]]]:
    """Every process of a run, again and again until the run ends: unix time and look by pid."""
    found = defaultdict(list)
    while program.poll() is None:
        for pid in (program.pid, *runs._below(program.pid)):
            if seen := look_at(pid):
                found[pid].append((time.time(), seen))
        time.sleep(LOOK_S)
    return found


def stage_times(out: Path, stage: str) -> tuple[float, float]:
    times = [
        e["t"] for e in read_events(out / "events.jsonl") if e["name"].startswith("stage_") and e["stage"] == stage
    ]
    return times[0], times[-1]


def growth(looks: list[Look]) -> tuple[float, int, int]:
    """KiB (medians), files and threads (the most) by which the last quarter exceeds the second."""
    part = len(looks) // 4
    early, late = looks[part : 2 * part], looks[-part:]
    kib = statistics.median(look.kib for look in late) - statistics.median(look.kib for look in early)
    files, threads = (
        max(getattr(look, what) for look in late) - max(getattr(look, what) for look in early)
        for what in ("files", "threads")
    )
    return kib, files, threads


def test_no_process_grows_in_ten_thousand_steps_and_three_hundred_graphs(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path / "images")
    settings = tiny.config(
        sorted(map(str, (tmp_path / "images").iterdir())),
        adapt={"epochs": EPOCHS, "checkpoint_steps": 50},
        fuse={"epochs": GRAPHS, "variants": ("average", "neighbours"), "checkpoint_steps": 20},
    )
    (tmp_path / "config.yaml").write_text(settings.yaml(), encoding="utf-8")
    out, command = tmp_path / "run", [sys.executable, str(runs.ROOT / "launch" / "full_pipeline.py")]
    command += ["--config", str(tmp_path / "config.yaml"), "--out", str(out)]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, text=True, stdout=output, stderr=output, env=runs._environment())
        try:
            found = watch(process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(60)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()
    for stage in ("adapt", "fuse"):
        begin, end = stage_times(out, stage)
        for looks in found.values():
            during = [look for at, look in looks if begin + 10 < at < end]
            if len(during) < 20:  # it was not there for all of the stage
                continue
            kib, files, threads = growth(during)
            last = during[-1]
            print(f"{stage}: {last.title[:40]}: {last.kib} KiB, {kib:+.0f}; files {files:+}; threads {threads:+}")
            assert kib < MOST_KIB, (stage, during[-1].title)
            assert max(files, threads) <= MOST_OPENED, (stage, during[-1].title)
    for pid, looks in found.items():  # one that its parent has just not yet waited for is none
        assert not any(a.zombie and b.zombie for (_, a), (_, b) in pairwise(looks)), pid
    assert len(list((out / "fusion").glob("*/knn/epoch-*/rows-*.npy"))) == 2 * len(tiny.SIZES)
    assert len(list((out / "fusion").glob("*/knn/epoch-*/statistics.json"))) == GRAPHS
    assert sum(path.stat().st_size for path in out.glob("events.jsonl*")) < 4 * 2**20
