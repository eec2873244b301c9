"""Runs on the first node of a Slurm job: starts Ray on all nodes as job steps, runs the program, ends the nodes.

    job.py [options] -- <command of a Ray node> -- <flags of ray start> -- <program>

Exit status: the program's; 75 when the nodes did not come up. The job is put back into the queue when the time limit
was near and the program has saved its state (143), and when a node was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container
from pathlib import Path

NOT_STARTED, KILLED, SAVED = 75, 137, 143
POLL_S = 0.2
END_S, LOST_END_S = 20.0, 10.0  # for the nodes to end and to keep their logs; the latter if one of them is gone
LOST_S = 30.0  # for a program that has lost a node: what ran elsewhere saves at its next step
CUT_OFF_S = 3.0  # for a program that has lost its head: it can save nothing more


class NotStarted(Exception):
    """The nodes did not come up, or the job was asked to end before they had."""


class Step:
    """`srun` of a Ray node on some nodes: its log and reports; it ends when its standard input is closed."""

    def __init__(self, name: str, nodes: list[str], command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        self.reported: dict[str, str] = {}
        size = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
        size += ["--nodelist=" + ",".join(nodes), "--cpus-per-task=" + os.environ["SLURM_CPUS_PER_TASK"]]
        srun = ["srun", "--overlap", "--label", "--no-kill", "--kill-on-bad-exit=0", "--job-name=ray-" + name, *size]
        srun.append("--export=ALL")  # else nothing, where a site or the submission sets --export=NONE
        self.process = subprocess.Popen(
            [*srun, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                for key, value in re.findall(r"(\w+)=(\S+)", line.partition("node: ")[2]):
                    self.reported[key] = value

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def release(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.close()

    def end(self, patience_s: float) -> None:
        """Waits for it. What is still left, for example on a dead node, is ended by Slurm with the job."""
        try:
            self.process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            log(f"step {self.name} has not ended after {patience_s:.0f} s and is left to Slurm")
            self.process.kill()
        self.reader.join(timeout=5)


class Cluster:
    """Ray on all nodes of the job."""

    def __init__(self, nodes: list[str], node_command: list[str], ray_flags: list[str], logs: Path) -> None:
        self.nodes, self.logs = nodes, logs
        self.command, self.flags = node_command, ray_flags
        self.steps: list[Step] = []

    def start(self, deadline: float, stopped: Callable[[], bool]) -> str:
        """Ray's address, once all nodes have joined.

        Raises:
            NotStarted: a step ended, the deadline passed, or `stopped`.
        """
        head = self._step("head", self.nodes[:1], [])
        self._await(lambda: "head" in head.reported, deadline, stopped)  # the address at which the head will be
        if self.nodes[1:]:
            self._step("workers", self.nodes[1:], ["--address", head.reported["head"]])
        self._await(lambda: self.num_alive == len(self.nodes), deadline, stopped)
        return head.reported["head"]

    def _step(self, name: str, nodes: list[str], arguments: list[str]) -> Step:
        keep = ["--keep-logs", str(self.logs)]
        command = [*self.command, *keep, *arguments, "--", *self.flags]
        self.steps.append(Step(name, nodes, command, self.logs / (name + ".log")))
        return self.steps[-1]

    def _await(self, happened: Callable[[], bool], deadline: float, stopped: Callable[[], bool]) -> None:
        while not happened():
            if stopped():
                raise NotStarted("asked to end")
            lost = self.lost()
            if lost:
                raise NotStarted(lost)
            if time.monotonic() > deadline:
                raise NotStarted(f"{self.num_alive} of {len(self.nodes)} nodes have joined in time; see {self.logs}")
            time.sleep(POLL_S)

    @property
    def num_alive(self) -> int:
        return int(self.steps[0].reported.get("alive", 0))

    def lost(self, of: int | None = None) -> str:
        """Why the cluster is no longer complete, or ""; `of`: the number of nodes that have been alive."""
        for step in self.steps:
            if "failed" in step.reported and not of:
                return f"Ray failed on {step.reported['failed']}; the log is {step.log}"
            if not step.is_running:
                return f"step {step.name} has ended; its log is {step.log}"
        return f"{self.num_alive} of {of} nodes are alive" if of and self.num_alive < of else ""

    @property
    def is_running(self) -> bool:
        return self.steps[0].is_running

    def end(self) -> None:
        for step in self.steps:
            step.release()
        end = time.monotonic() + (LOST_END_S if self.num_alive < len(self.nodes) else END_S)
        for step in self.steps:
            step.end(max(1.0, end - time.monotonic()))


class Job:
    """The program, and how it ends after a signal or the loss of a node."""

    def __init__(self, given: argparse.Namespace, cluster: Cluster) -> None:
        self.given, self.cluster = given, cluster
        self.why = ""  # why the program was asked to save and end; "" if it was not
        self.requeue_on: Container[int] = ()  # exit statuses of the program

    def listen(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: self.ask("the time limit is near", (SAVED, KILLED)))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.ask("asked to end", ()))

    def ask(self, why: str, requeue_on: Container[int]) -> None:
        if not self.why:
            self.why, self.requeue_on = why, requeue_on

    def run(self, program: list[str]) -> int:
        try:
            address = self.cluster.start(time.monotonic() + self.given.start_s, lambda: bool(self.why))
        except NotStarted as error:
            log(f"the nodes did not start: {error}")
            return SAVED if self.why else NOT_STARTED
        log(f"{len(self.cluster.nodes)} nodes are up, RAY_ADDRESS={address}")
        environment = {**os.environ, "RAY_ADDRESS": address}
        process = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL)
        status = self._follow(process)
        log(f"the program ended with {status}")
        return status

    def _follow(self, process: subprocess.Popen[bytes]) -> int:
        """The program's exit status, that of a signal as a shell has it."""
        asked: float | None = None
        known = len(self.cluster.nodes)
        while process.poll() is None:
            lost = self.cluster.lost(known)
            if lost and self.given.node_loss == "stay" and self.cluster.is_running:
                if self.cluster.num_alive < known:
                    log(f"{lost}; going on")
                    known = self.cluster.num_alive
                lost = ""  # no reason to hurry, should the time limit come
            elif lost:
                self.ask(lost, range(1, 256))
            if self.why and asked is None:
                log(f"{self.why}: asking the program to save and end")
                process.terminate()
                asked = time.monotonic()
            patience_s = (LOST_S if lost else self.given.save_s) if self.cluster.is_running else CUT_OFF_S
            if asked is not None and time.monotonic() > asked + patience_s:
                log(f"the program did not end within {patience_s:g} s")
                process.kill()
                process.wait()
            time.sleep(POLL_S)
        status = process.returncode
        return 128 - status if status < 0 else status


def put_back(given: argparse.Namespace) -> None:
    """Puts the job back into the queue; for Slurm it is enough that this process then ends."""
    job, times = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if times >= given.max_requeues:
        log(f"not put back into the queue: {times} times are enough (MAX_REQUEUES)")
        return
    log(f"putting the job back into the queue, time {times + 1}")
    if subprocess.run(["scontrol", "requeue", job]).returncode:
        log("Slurm refuses; submit the job again, and it goes on from what is saved")


def log(text: str) -> None:
    print(f"{time.strftime('%F %T')} job.py: {text}", flush=True)


def main() -> int:
    options, node_command, ray_flags, program = split(sys.argv[1:], 4)
    parser = argparse.ArgumentParser()
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--start-s", type=float, required=True)
    parser.add_argument("--save-s", type=float, required=True)
    parser.add_argument("--node-loss", choices=["requeue", "stay"], required=True)
    parser.add_argument("--max-requeues", type=int, required=True)
    given = parser.parse_args(options)
    given.logs.mkdir(parents=True, exist_ok=True)
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":  # else others on these nodes can run code as us
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    nodes = subprocess.check_output(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True
    ).split()
    first = os.environ.get("SLURMD_NODENAME", nodes[0])  # where the program and so the head must be
    nodes = [first, *(node for node in nodes if node != first)]
    cluster = Cluster(nodes, node_command, ray_flags, given.logs)
    job = Job(given, cluster)
    job.listen()
    log(f"start {os.environ.get('SLURM_RESTART_COUNT', 0)} on {', '.join(nodes)}")
    try:
        status = job.run(program)
    finally:
        cluster.end()
    log(f"the nodes have ended; exit status {status}")
    if status in job.requeue_on:
        put_back(given)
    return status


def split(arguments: list[str], parts: int) -> list[list[str]]:
    """The first `parts` lists that lie between --; the last keeps its own."""
    found: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--" and len(found) < parts:
            found.append([])
        else:
            found[-1].append(argument)
    assert len(found) == parts, "see the head of this file"
    return found


if __name__ == "__main__":
    sys.exit(main())
