"""Several Ray nodes on this machine, to try out what happens on many: separate processes, ports and folders.

  python cluster/local/cluster.py run --nodes 3 -- python launch/full_pipeline.py --config configs/demo.yaml
  eval "$(python cluster/local/cluster.py start --nodes 3)"     # sets RAY_ADDRESS and its token
  python cluster/local/cluster.py stop

`run` starts the nodes, runs a command with RAY_ADDRESS set, ends the nodes and exits with the command's status. `start`
leaves them running until `stop`, which ends exactly the processes that `start` has recorded, and no other Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODE = Path(__file__).resolve().parents[1] / "ray_node.py"
START_S = 180.0
END_S = 30.0
POLL_S = 0.1


class Failed(Exception):
    """An error that is printed as one line."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | stop | run")
    start = commands.add_parser("start", help="start nodes; prints the line that sets RAY_ADDRESS")
    stop = commands.add_parser("stop", help="end what start has started")
    run = commands.add_parser("run", help="start nodes, run a command on them, end them")
    for command in (start, run):
        command.add_argument("--nodes", type=int, default=2, help="how many (default: 2)")
        command.add_argument("--cpus", type=int, default=1, help="CPUs that Ray believes each to have (default: 1)")
        command.add_argument("--gpus", type=int, default=0, help="likewise for GPUs; real ones are shared (default: 0)")
        command.add_argument("--object-store", default="256M", help="shared memory of each (default: 256M)")
        command.add_argument("--interface", default="lo", help="network interface (default: lo)")
    for command in (start, stop):
        command.add_argument("--name", default="local", help="to have several at once (default: local)")
    run.add_argument("program", nargs="+", metavar="-- program", help="what to run")
    return parser.parse_args()


def folder_of(name: str) -> Path:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,9}", name):
        raise Failed(f"--name={name} must be at most 10 of a-z, 0-9 and -, beginning with a letter")
    return Path(tempfile.gettempdir()) / f"grappa-{os.getuid()}-{name}"


def start(given: argparse.Namespace, folder: Path, lifeline: int = subprocess.DEVNULL) -> str:
    """The address, once all nodes are up; what was started is ended if one does not come up.

    Args:
        lifeline: the reading end of a pipe, if nodes are to end when no process holds the writing end any more.
    """
    if given.nodes < 1 or given.cpus < 1:
        raise Failed("--nodes and --cpus must be at least 1")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise Failed(f"{folder} is there: nodes run, or were not stopped; see `stop`") from None
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":  # Ray listens on all interfaces
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        head = start_node(given, folder, 0, lifeline, [])
        address = await_in(folder / "node-0.log", r"node: head=(\S+)", [head])
        join = ["--address", address]
        workers = [start_node(given, folder, number, lifeline, join) for number in range(1, given.nodes)]
        await_in(folder / "node-0.log", f"node: alive={given.nodes}", [head, *workers])
    except BaseException:
        stop(folder)
        raise
    return address


def start_node(
    given: argparse.Namespace, folder: Path, number: int, lifeline: int, arguments: list[str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(NODE), "--cpus", str(given.cpus), "--gpus", str(given.gpus)]
    command += ["--object-store", given.object_store, "--interface", given.interface]
    command += ["--temp-dir", str(folder / f"n{number}"), *arguments]
    command += ["--until-eof"] * (lifeline != subprocess.DEVNULL)
    with open(folder / f"node-{number}.log", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=lifeline, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    with open(folder / "nodes.jsonl", "a", encoding="utf-8") as nodes:
        nodes.write(json.dumps({"pid": process.pid, "began": began(process.pid)}) + "\n")
    return process


def await_in(log: Path, pattern: str, needed: list[subprocess.Popen[bytes]]) -> str:
    """The first match of a pattern in a log, or of the pattern's last group; waits for it."""
    end = time.monotonic() + START_S
    while not (match := re.search(pattern, log.read_text(encoding="utf-8"))):
        if time.monotonic() > end or any(process.poll() is not None for process in needed):
            logs = "\n".join(path.read_text(encoding="utf-8")[-1000:] for path in sorted(log.parent.glob("node-*.log")))
            raise Failed(f"a node did not start:\n{logs}")
        time.sleep(POLL_S)
    return match[match.lastindex or 0]


def began(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None if there is none. Tells a reused pid apart."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def stop(folder: Path) -> int:
    """Ends the recorded nodes, workers first, and removes their folder; how many there were."""
    if not (folder / "nodes.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    nodes = [json.loads(line) for line in (folder / "nodes.jsonl").read_text(encoding="utf-8").splitlines()]
    for group in (nodes[1:], nodes[:1]):
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + END_S
            for node in (n for n in group if began(n["pid"]) == n["began"]):
                os.kill(node["pid"], number)
            while any(began(n["pid"]) == n["began"] for n in group) and time.monotonic() < end:
                time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)
    return len(nodes)


def run(given: argparse.Namespace) -> int:
    """The program's exit status; SIGTERM, Ctrl-C and a closed terminal reach it, and the nodes end after it."""
    folder = folder_of(f"run{os.getpid()}")
    program: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        if program is None:
            raise Failed("asked to end")
        program.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, forward)
    lifeline, _ = os.pipe()  # the other end stays open, in this process alone, until this process ends
    address = start(given, folder, lifeline)
    try:
        environment = {**os.environ, "RAY_ADDRESS": address}
        program = subprocess.Popen(given.program, env=environment, start_new_session=True)
        status = program.wait()
    finally:
        stop(folder)
    return 128 - status if status < 0 else status


def main() -> int:
    given = parse()
    try:
        if given.command == "run":
            return run(given)
        folder = folder_of(given.name)
        if given.command == "stop":
            print(f"{stop(folder)} nodes ended")
            return 0
        address = start(given, folder)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN") if name in os.environ}
    print("export", *(f"{name}={value}" for name, value in {"RAY_ADDRESS": address, **token}.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
