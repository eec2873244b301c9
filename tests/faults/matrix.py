"""The matrix of faults: `make test-faults`.

Starts small runs, injects one fault after another into each of them, and writes a JSON line per trial to
<out>/trials.jsonl and a table to <out>/table.md. What is there is kept: the next call goes on with the next seed.

    python -m tests.faults.matrix --trials 300 --minutes 30 --side-by-side 2
    python -m tests.faults.matrix --seed 12          # the trials of one run directory again
    python -m tests.faults.matrix --table            # the table of what is there
    python -m tests.faults.matrix --document         # writes it into docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grappa_dist.distributed.preflight import versions
from tests.e2e.runs import ROOT
from tests.faults.clock import Clock
from tests.faults.faults import FAULTS, KILLS, STORES, Fault
from tests.faults.injection import StorageErrors, why_unavailable
from tests.faults.mounts import namespace, small_disks
from tests.faults.small_run import STAGES, SmallRun, write_config, write_data
from tests.faults.table import table, written_into
from tests.faults.trials import Trial, Trials, plan_of
from tests.stores import folder_backend, proxy_to

ON_STORE = 4  # every so many runs, and one more, one reads its images from a store
DOCUMENT = ROOT / "docs" / "reliability.md"
PREFIX = "gf-"  # of temporary folders: short, since sockets lie below them


def available() -> list[str]:
    """The faults that can be injected on this machine."""
    lacking = {"storage", "clock"} if why_unavailable() else set()
    lacking |= {"mounts"} if namespace() is None else set()
    return [name for name, fault in FAULTS.items() if fault.needs not in lacking]


def plan_for(seed: int) -> list[tuple[str, Fault]]:
    number, turn = divmod(seed, ON_STORE + 1)
    if turn == ON_STORE:
        return plan_of(number, [fault.name for fault in (*STORES, *KILLS[:2])])
    return plan_of(number * ON_STORE + turn, [name for name in available() if FAULTS[name].needs != "server"])


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder with a short name, since sockets lie below it; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path) -> None:
    """Images, and the digests of what a run makes of them to which nothing happens."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    write_data(folder / "data")
    write_config(folder / "local.yaml", str(folder / "data"))
    with temporary() as at:
        run = SmallRun(at, folder / "local.yaml")
        driver = run.start()
        if driver.process.wait(timeout=300):
            raise RuntimeError(f"the run without faults ended with {driver.process.returncode}:\n{driver.output}")
        reference = {"versions": versions(), "artefacts": run.artefacts()}
        (folder / "reference.json").write_text(json.dumps(reference))


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` has been called with these sources: others may name artefacts in another way."""
    path = folder / "reference.json"
    return path.exists() and json.loads(path.read_text())["versions"] == versions()


def trials_of(seed: int, plan: Sequence[tuple[str, Fault]], folder: Path, seconds: float, stop_s: float) -> list[Trial]:
    """The trials of one run directory. `folder` holds what `prepare` has made."""
    reference = json.loads((folder / "reference.json").read_text())["artefacts"]
    needs = {fault.needs for _, fault in plan}
    with temporary() as at, ExitStack() as stack:
        run, config, prepared = at / "run", folder / "local.yaml", dict[str, Any]()
        variables: dict[str, str] = {}
        if "mounts" in needs:
            stack.enter_context(small_disks([run, at / "tmp"]))
        if "server" in needs:
            prepared["server"] = server = stack.enter_context(proxy_to(folder_backend(folder / "data")))
            write_config(config := at / "store.yaml", server.url, cache_bytes=0)
        if "storage" in needs:
            prepared["storage"] = storage = stack.enter_context(StorageErrors(at / "storage", [run], seed))
            variables |= storage.environment
        if "clock" in needs:
            prepared["clock"] = clock = Clock(at / "clock")
            variables |= clock.environment_after({**os.environ, **variables})
        small = SmallRun(at, config, variables)
        until, other_names = time.monotonic() + seconds, "reports/" if "server" in needs else None
        trials = Trials(small, seed, reference, prepared, until, stop_s, other_names)
        try:
            return trials.all_of(plan)
        finally:
            keep_logs(small, seed, trials.done, folder)
            small.end_all()


def keep_logs(run: SmallRun, seed: int, done: Sequence[Trial], folder: Path) -> None:
    """What the program has said and reported, where something is wrong."""
    if any(trial.wrong for trial in done) or not done:
        kept = folder / "logs" / str(seed)
        kept.mkdir(parents=True, exist_ok=True)
        for path in [*run.folder.glob("start-*"), *run.root.glob("*.jsonl"), *run.root.glob("errors.log")]:
            shutil.copy(path, kept / path.name)


def side_by_side(folder: Path, asked: argparse.Namespace) -> None:
    """Starts a process per run directory, some at a time, until there are trials enough or no time is left."""
    out, end = folder / "trials.jsonl", time.monotonic() + 60 * asked.minutes
    running: list[subprocess.Popen[bytes]] = []
    seed = 1 + max((int(trial["seed"].split(".")[0]) for trial in read(out)), default=-1)
    try:
        while running or (time.monotonic() < end and len(read(out)) < asked.trials):
            left = asked.trials - len(read(out)) - len(STAGES) * len(running)
            if len(running) < asked.side_by_side and time.monotonic() < end and left > 0:
                running.append(start(seed, folder, end - time.monotonic(), asked.stop_s))
                seed += 1
            time.sleep(0.5)
            running = [process for process in running if process.poll() is None]
    finally:
        for process in running:  # they end their programs
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait(timeout=60)


def start(seed: int, folder: Path, seconds: float, stop_s: float) -> subprocess.Popen[bytes]:
    """A process of its own for one run directory, where its faults need small disks in a namespace of its own."""
    given = ["--seed", str(seed), "--out", str(folder), "--stop-s", str(stop_s), "--seconds", str(max(1.0, seconds))]
    command = [sys.executable, "-m", "tests.faults.matrix", *given]
    if "mounts" in {fault.needs for _, fault in plan_for(seed)}:
        command = [*(namespace() or ()), *command]
    return subprocess.Popen(command, cwd=ROOT)


def caption(trials: Sequence[Mapping[str, Any]]) -> str:
    """What the trials ran on, and which found something that contradicts the document."""
    happened = [trial for trial in trials if trial["outcome"] != "missed"]
    wrong = [trial for trial in happened if trial["wrong"]]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    where = f"{os.cpu_count()} cores ({model[1] if model else platform.machine()})"
    first = f"{len(happened)} trials, {time.strftime('%-d %B %Y')}, on {where}."
    found = f"In {len(wrong) or 'none'} of them something was not as promised{':' if wrong else '.'}"
    return f"{first} {found}" + "".join(f"\n\n- {one['fault']}, in {one['stage']}: {one['wrong'][0]}" for one in wrong)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "faults")
    parser.add_argument("--trials", type=int, default=300, help="including those of earlier calls")
    parser.add_argument("--minutes", type=float, default=600.0, help="no trial begins later")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time")
    parser.add_argument("--stop-s", type=float, default=120.0, help="how long a worker is stopped for minutes")
    parser.add_argument("--seed", type=int, help="one run directory alone")
    parser.add_argument("--seconds", type=float, default=36_000.0, help="with --seed: no trial begins later")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--document", action="store_true", help=f"write it into {DOCUMENT.relative_to(ROOT)} too")
    return parser.parse_args()


def main() -> int:
    asked = parse()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell sets this for what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = asked.out.resolve()
    out = folder / "trials.jsonl"
    if asked.table or asked.document:
        print(table(read(out)))
        if asked.document:
            DOCUMENT.write_text(written_into(DOCUMENT.read_text(), read(out), caption(read(out))))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if not is_prepared(folder):
        prepare(folder)
    if asked.seed is not None:
        found = trials_of(asked.seed, plan_for(asked.seed), folder, asked.seconds, asked.stop_s)
        lines = "".join(json.dumps(asdict(trial)) + "\n" for trial in found)
        print(lines, end="", flush=True)
        with open(out, "a") as file:
            file.write(lines)
        return int(any(trial.wrong for trial in found))
    side_by_side(folder, asked)
    (folder / "table.md").write_text(table(read(out)) + "\n")
    print(table(read(out)))
    return int(any(trial["wrong"] for trial in read(out)))


if __name__ == "__main__":
    sys.exit(main())
