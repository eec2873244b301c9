"""Ray on machines in namespaces, started as on any cluster of ours: a head without CPUs, workers of one CPU each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grappa_dist.console import read_events
from tests.cluster.machines import Machine
from tests.e2e.runs import ROOT

HEAD_PORT = 20000  # ray_node.py takes the first free one from here on, and each machine has its own
START_ATTEMPTS = 3
START_S = 300.0  # imports on a machine that does other things as well


@dataclass
class Node:
    """A Ray node that ends when its standard input is closed."""

    machine: Machine
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def wait_for_line(self, words: str) -> str:
        """The first line with these words, once it is there."""
        end = time.monotonic() + START_S
        while True:
            for line in self.lines:
                if words in line:
                    return line
            assert self.process.poll() is None, "\n".join(self.lines[-20:])
            assert time.monotonic() < end, f"{words}: not printed by {self.machine.name}: {self.lines[-5:]}"
            time.sleep(0.05)

    def joins(self) -> bool:
        """Whether it comes up, once that is known."""
        while self.process.poll() is None and not any("node: up=" in line for line in self.lines):
            time.sleep(0.05)
        return self.process.poll() is None

    def close(self) -> None:
        """Asks it to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        self.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_node(machine: Machine, cpus: int, address: str | None = None, **variables: str) -> Node:
    program = [sys.executable, str(ROOT / "cluster" / "ray_node.py"), "--cpus", str(cpus), "--until-eof"]
    program += ["--temp-dir", "/tmp/ray-1", "--object-store", "100M"] + ([f"--address={address}"] if address else [])
    process = machine.popen(
        program, env=environment(**variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    node = Node(machine, process)
    threading.Thread(target=node.read, daemon=True).start()
    return node


def start_worker_node(machine: Machine, address: str, **variables: str) -> Node:
    """A node that has joined."""
    return _started(machine, 1, address, **variables)


def _started(machine: Machine, cpus: int, address: str | None = None, **variables: str) -> Node:
    """A node that is up; one that was too slow is tried again."""
    for _ in range(START_ATTEMPTS - 1):
        node = start_node(machine, cpus, address, **variables)
        if node.joins():
            return node
        node.end()
    node = start_node(machine, cpus, address, **variables)
    node.wait_for_line("node: up=")
    return node


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}


@contextmanager
def ray_on(head: Machine, workers: Sequence[Machine], **variables: str) -> Iterator[tuple[str, list[Node]]]:
    """(address, worker nodes) of a cluster whose nodes are all up."""
    with ExitStack() as stack:
        first = _started(head, 0, **variables)
        stack.callback(first.end)
        address = f"{head.address}:{HEAD_PORT}"
        nodes = []
        for machine in workers:  # one by one: Ray gives a raylet 30 s to start, which is little where all start at once
            nodes.append(start_worker_node(machine, address, **variables))
            stack.callback(nodes[-1].end)
        first.wait_for_line(f"node: alive={len(workers) + 1}")
        yield address, nodes


@dataclass
class Pipeline:
    """The pipeline, whose driver runs on a machine."""

    process: subprocess.Popen[str]
    run: Path
    log: Path

    def events(self, name: str) -> list[dict[str, object]]:
        return [event for event in read_events(self.run / "events.jsonl") if event["name"] == name]

    def wait_for(self, happened: Callable[[], object], patience_s: float = 240.0) -> float:
        """Seconds until it happened, while the pipeline runs."""
        began = time.monotonic()
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() - began < patience_s, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return time.monotonic() - began

    def ends(self, patience_s: float = 300.0) -> int:
        return self.process.wait(timeout=patience_s)


@contextmanager
def pipeline_on(machine: Machine, address: str, config: Path, run: Path, **variables: str) -> Iterator[Pipeline]:
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", str(run)]
    log = config.with_suffix(".log")
    with open(log, "w") as file:
        process = machine.popen(
            program, env=environment(RAY_ADDRESS=address, **variables), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield Pipeline(process, run, log)
    finally:
        for pid, line in machine.processes().items() if process.poll() is None else ():
            if str(run) in line:
                machine.run("kill", "-9", str(pid))
        process.wait(timeout=30)
