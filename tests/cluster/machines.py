"""Several machines on one box: each has its own network, process, mount, host name and IPC namespaces.

A machine has an address on a private bridge, its own /tmp and /dev/shm, and sees the rest of the box's files. Nothing
is named globally and nothing touches the box's network: when a machine's first process ends, all of it is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
NET = "10.77.0"
BOOT_S = 20.0
# The first process adopts what loses its parent, and ignoring SIGCHLD has the kernel collect it.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"
BOOT = """set -e
name=$1 folder=$2 hosts=$3 python=$4 init=$5 tmp=$6; shift 6
hostname "$name"
mount --make-rprivate /
mount --bind "$hosts" /etc/hosts
for path; do  # what machines share; what lies below /tmp would be covered by the machine's own
  own=$folder/tmp/${path#"$tmp"/}
  case $path in "$tmp"/*) mkdir -p "$own"; mount --bind "$path" "$own" ;; esac
done
mount --rbind "$folder/tmp" /tmp
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
ip link set lo up
: > /tmp/.booted
exec "$python" -c "$init"
"""


def missing() -> str:
    """Why there can be no machines here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (packages iproute2 and util-linux)"
    try_all = "mount -t tmpfs none /mnt && ip link add veth0 type veth peer name veth1 && ip link add br0 type bridge"
    unshare = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*unshare, "sh", "-c", try_all], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


@dataclass
class Machine:
    name: str
    number: int
    folder: Path
    bench: Bench
    unshare: subprocess.Popen[bytes] | None = None
    pid: int = 0  # of its first process, as the box sees it

    @property
    def address(self) -> str:
        return f"{NET}.{10 + self.number}"

    @property
    def tmp(self) -> Path:
        """Its /tmp, as the box sees it."""
        return self.folder / "tmp"

    @property
    def prefix(self) -> list[str]:
        """What makes a command run there."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid", "--wd=/"]

    def boot(self) -> None:
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True, mode=0o1777)
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        arguments = [self.name, str(self.folder), str(self.bench.hosts), sys.executable, INIT, "/tmp"]
        with open(self.folder / "boot.log", "ab") as log:
            self.unshare = subprocess.Popen(
                # ended by the kernel if we are: no machine outlives the tests
                ["setpriv", "--pdeathsig=KILL", "unshare", *flags, "bash", "-c", BOOT, "boot", *arguments]
                + [str(path) for path in self.bench.shared],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + BOOT_S
        while not (self.tmp / ".booted").exists():
            if self.unshare.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not boot: {(self.folder / 'boot.log').read_text()}")
            time.sleep(0.02)
        self.pid = int(Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text())
        self.bench.plug_in(self)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.prefix, *command], text=True, **options)

    def run(self, *command: str, timeout_s: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.prefix, *command], text=True, capture_output=True, timeout=timeout_s, **options)

    def output(self, *command: str, timeout_s: float = 60.0, **options: Any) -> str:
        """The output of a command; an error if it fails."""
        ended = self.run(*command, timeout_s=timeout_s, **options)
        assert ended.returncode == 0, f"{self.name}: {' '.join(command)}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def processes(self) -> dict[int, str]:
        """Command lines of all its processes but the first, by the machine's own pids."""
        listed = self.output("ps", "-eo", "pid=,args=").splitlines()
        found = {int(line.split(None, 1)[0]): line.split(None, 1)[1] for line in listed}
        return {pid: args for pid, args in found.items() if pid != 1 and args != "ps -eo pid=,args="}

    def cut(self) -> None:
        """Pulls the cable."""
        self.bench.wire("link", "set", f"p{self.number}", "down")

    def crash(self) -> None:
        """Power off: the cable goes first, so that no connection is closed."""
        if self.unshare is None:
            return
        self.cut()
        os.kill(self.pid, signal.SIGKILL)
        self.unshare.wait(timeout=30)
        self.unshare = None
        self.bench.wire("link", "del", f"p{self.number}", check=False)

    def reboot(self) -> None:
        """Power on again, with an empty /tmp."""
        self.crash()
        self.boot()


@dataclass
class Bench:
    """`count` machines n0, n1, ... on one bridge; `shared` are folders that all of them see under the same path."""

    folder: Path
    count: int
    shared: Sequence[Path]
    machines: list[Machine] = field(default_factory=list)
    switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Bench:
        with ExitStack() as undo:
            undo.callback(self.close)
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [f"{NET}.{10 + i} n{i}" for i in range(self.count)]
            self.hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            lone = ["setpriv", "--pdeathsig=KILL", "unshare", "--net", sys.executable, "-c", INIT]
            self.switch = subprocess.Popen(lone)
            self._await_switch()
            self.wire("link", "add", "br0", "type", "bridge")
            self.wire("link", "set", "br0", "up")
            for number in range(self.count):
                machine = Machine(f"n{number}", number, self.folder / f"n{number}", self)
                machine.folder.mkdir()
                self.machines.append(machine)
                machine.boot()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    @property
    def hosts(self) -> Path:
        return self.folder / "hosts"

    def _await_switch(self) -> None:
        assert self.switch is not None
        own, end = os.readlink("/proc/self/ns/net"), time.monotonic() + BOOT_S
        while os.readlink(f"/proc/{self.switch.pid}/ns/net") == own:
            assert time.monotonic() < end, "no network namespace"
            time.sleep(0.01)

    def wire(self, *arguments: str, check: bool = True) -> None:
        """`ip` where the bridge is."""
        assert self.switch is not None
        wire = ["nsenter", f"--target={self.switch.pid}", "--net", "ip", *arguments]
        subprocess.run(wire, check=check, stderr=None if check else subprocess.DEVNULL)

    def plug_in(self, machine: Machine) -> None:
        port = f"p{machine.number}"
        self.wire("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        self.wire("link", "set", port, "master", "br0")
        self.wire("link", "set", port, "up")
        machine.output("ip", "addr", "add", f"{machine.address}/24", "dev", "eth0")
        machine.output("ip", "link", "set", "eth0", "up")

    def close(self) -> None:
        for machine in self.machines:
            if machine.unshare is not None:
                if machine.pid:
                    os.kill(machine.pid, signal.SIGKILL)
                machine.unshare.kill()
                machine.unshare.wait(timeout=30)
                machine.unshare = None
        if self.switch is not None:
            self.switch.kill()
            self.switch.wait(timeout=30)
            self.switch = None
