"""Runs one Ray node in the foreground, with its own ports and temporary folder, and leaves nothing of it behind.

It ends on SIGTERM or SIGINT, when Ray ends, and with --until-eof when its standard input is closed. Then every process
below it is ended by its pid, Ray's logs are copied with --keep-logs, and its folders are removed. On standard output
a head prints at once `node: head=<host:port>`, to which others may already connect, and `node: alive=<n>` whenever the
number of living nodes changes; every node prints `node: up=<host>` or `node: failed=<host>`. Needs Linux, and beside
the standard library only the `ray` that it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

STARTED = "Ray runtime started."
LONGEST_TEMP_DIR = 40  # Ray's sockets lie up to 66 characters below it, and the system allows 107 in all
RAYS_OWN = "r"  # its folder in the temporary one: Ray opens it to all users, who cannot enter the one above
GRACE_S = 5.0
STALE_S = 60.0  # a younger folder may be about to be locked
LOG_BYTES = 4 * 2**20  # kept of one log file of Ray's
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFADDR = 0x8915
ENVIRONMENT = {  # of every process of the node, unless set before
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token below the home folder that later clusters then ask for
    "RAY_DISABLE_USAGE_STATS": "1",
    "RAY_health_check_period_ms": "2000",  # a node that lost power or its cable is given up after about 20 s, not 60
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # a node without its head ends after this, not after 60 s
    "NCCL_DEBUG": "WARN",
}


def parse() -> argparse.Namespace:
    in_slurm = "SLURM_JOB_ID" in os.environ
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) if in_slurm else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", help="host:port of the head to join; without it this node is a head")
    parser.add_argument("--port", type=int, default=20000, help="the first free one from here on is the head's port")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=gpus, help="default: SLURM_GPUS_ON_NODE in a Slurm job, else all")
    parser.add_argument("--temp-dir", type=Path, required=True, help="short, on this machine; removed at the end")
    parser.add_argument("--interface", help="network interface, e.g. ib0; default: the one that leads to the head")
    parser.add_argument("--object-store", default="1G", help="bytes of shared memory, or with K, M, G (default: 1G)")
    parser.add_argument(
        "--spill-dir", type=Path, help="objects that do not fit go below it; default: the temporary folder"
    )
    parser.add_argument("--keep-logs", type=Path, help="Ray's logs are copied into <here>/<host> at the end")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input is closed")
    parser.add_argument("ray_flags", nargs="*", help="further flags of `ray start`, after --")
    return parser.parse_args()


def main() -> int:
    given = parse()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes our child
    try:
        host, port = own_address(given)
        folders = [given.temp_dir]
        if given.spill_dir:  # perhaps on storage that all nodes see
            given.spill_dir /= f"{socket.gethostname()}-{given.temp_dir.name}"
            folders.append(given.spill_dir)
        command = ray_command(given, host, port)
        make_folders(folders)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        print(f"node: failed={socket.gethostname()}", flush=True)
        return 2
    try:
        if given.until_eof:
            threading.Thread(target=await_eof, args=(ended,), daemon=True).start()
        if given.address:
            await_head(given.address, ended)
        else:
            print(f"node: head={host}:{port}", flush=True)
        return 0 if ended.is_set() else run(given, command, f"{host}:{port}", ended)
    finally:
        end_descendants()
        if given.keep_logs:
            keep_logs(given.temp_dir, given.keep_logs / socket.gethostname())
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def run(given: argparse.Namespace, command: list[str], address: str, ended: threading.Event) -> int:
    """Ray's exit status, or 0 when the node was asked to end."""
    environment = {**ENVIRONMENT, **interface_of(address.split(":")[0]), **os.environ}
    ray = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    up = threading.Event()
    threading.Thread(target=relay, args=(ray, up), daemon=True).start()
    watcher_started = False
    while ray.poll() is None and not ended.wait(0.2):
        if up.is_set() and not watcher_started:
            watcher_started = True
            print(f"node: up={socket.gethostname()}", flush=True)
            if given.address is None:
                watcher = str(Path(__file__).with_name("ray_watch.py"))
                subprocess.Popen([sys.executable, watcher, address], env=environment, stdin=subprocess.DEVNULL)
    if ended.is_set():
        ray.terminate()
        return 0
    print(f"node: failed={socket.gethostname()} status={ray.returncode}", flush=True)
    return ray.returncode or 1


def await_eof(ended: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    ended.set()


def await_head(address: str, ended: threading.Event) -> None:
    """Returns when the head answers, so that nodes may be started together."""
    host, port = address.split(":")
    while not ended.is_set():
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=2).close()
            return
        ended.wait(0.2)


def relay(ray: subprocess.Popen[str], up: threading.Event) -> None:
    assert ray.stdout is not None
    for line in ray.stdout:
        print(line, end="", flush=True)
        if STARTED in line:
            up.set()


def own_address(given: argparse.Namespace) -> tuple[str, int]:
    """This node's IPv4 address, and for a head its port.

    Raises:
        ValueError: the interface has no address, or there is none that other nodes can reach.
    """
    if given.interface:
        addresses = dict(interfaces())
        if given.interface not in addresses:
            have = ", ".join(f"{name} ({address})" for name, address in addresses.items())
            raise ValueError(
                f"interface {given.interface} has no IPv4 address on {socket.gethostname()}; there are {have}"
            )
        host = addresses[given.interface]
    elif given.address:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; asks which way a packet goes
            probe.connect((given.address.split(":")[0], 9))
            host = probe.getsockname()[0]
    else:
        host = socket.gethostbyname(socket.gethostname())
        if host.startswith("127."):  # as Debian writes /etc/hosts
            host = next((address for name, address in interfaces() if name != "lo"), host)
    return host, free_port(given.port)


def interfaces() -> Iterator[tuple[str, str]]:
    """(name, IPv4 address) of each interface that has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])


def interface_of(host: str) -> dict[str, str]:
    """Variables that name the interface of collectives.

    Gloo needs exactly one name, and what it guesses is often the loopback; NCCL takes a name without = for a prefix.
    """
    name = next((name for name, address in interfaces() if address == host), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def free_port(first: int) -> int:
    for port in range(first, first + 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise ValueError(f"no free port in {first}..{first + 199} on {socket.gethostname()}")


def ray_command(given: argparse.Namespace, host: str, port: int) -> list[str]:
    """`ray start`, with no fixed port: another job's Ray may run on the same machine.

    Raises:
        ValueError: the object store does not fit, or the temporary folder's name is too long.
    """
    store, shm = num_bytes(given.object_store), shutil.disk_usage("/dev/shm").free
    if store > shm:
        raise ValueError(
            f"the object store of {given.object_store} does not fit into the {shm // 2**20}M that are free "
            f"in /dev/shm on {socket.gethostname()}; make one smaller or the other larger"
        )
    if len(str(given.temp_dir)) > LONGEST_TEMP_DIR or not given.temp_dir.is_absolute():
        raise ValueError(
            f"{given.temp_dir} must be absolute and at most {LONGEST_TEMP_DIR} characters: sockets lie below it"
        )
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray) if ray.exists() else "ray", "start", "--block", "--log-color=false", "--disable-usage-stats"]
    command += [f"--node-ip-address={host}", f"--num-cpus={given.cpus}", f"--object-store-memory={store}"]
    command += [f"--temp-dir={given.temp_dir / RAYS_OWN}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0"]
    command += [f"--num-gpus={given.gpus}"] * (given.gpus is not None)
    command += [f"--object-spilling-directory={given.spill_dir}"] * bool(given.spill_dir)
    if given.address:
        return [*command, f"--address={given.address}", *given.ray_flags]
    client = free_port(port + 1)
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    return [*command, *head, *given.ray_flags]


def num_bytes(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdigit() or int(number) == 0:
        raise ValueError(f"--object-store={text} must be a number of bytes, as 1073741824, 1024M or 1G")
    return int(number) * unit


def make_folders(folders: list[Path]) -> None:
    """Makes all of them or none."""
    for number, folder in enumerate(folders):
        try:
            remove_stale(folder)
            make_folder(folder)
        except OSError:
            for made in folders[:number]:
                shutil.rmtree(made, ignore_errors=True)
            raise


def make_folder(temp_dir: Path) -> int:
    """Makes a folder that is removed at the end; a lock that this process holds distinguishes it from one left behind.

    No other user may enter it: Ray lets all users read and write what it makes below.
    """
    temp_dir.mkdir(mode=0o700, parents=True)
    lock = os.open(temp_dir / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def remove_stale(temp_dir: Path) -> None:
    """Removes what killed nodes have left: our folders, named like this one, that no process has locked."""
    stem = temp_dir.name.rstrip("0123456789")
    for folder in temp_dir.parent.glob(f"{stem}[0-9]*") if stem != temp_dir.name else ():
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and time.time() - folder.stat().st_mtime > STALE_S:
                lock = os.open(folder / "lock", os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


def end_descendants() -> None:
    """Asks all processes below this one to end, and ends those that do not."""
    for number, patience_s in ((None, GRACE_S), (signal.SIGKILL, GRACE_S)):
        end = time.monotonic() + patience_s
        while (left := descendants(os.getpid())) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    if number is not None:
                        os.kill(pid, number)
            reap()
            time.sleep(0.1)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                children[int(fields[1])].append(int(entry.name))
    found, todo = list[int](), [root]
    while todo:
        below = children[todo.pop()]
        found += below
        todo += below
    return found


def keep_logs(temp_dir: Path, into: Path) -> None:
    """Copies the end of every log of the session to storage."""
    logs = temp_dir / RAYS_OWN / "session_latest" / "logs"
    for log in sorted(logs.rglob("*")):
        if not log.is_file() or log.stat().st_size == 0:
            continue
        copy = into / log.relative_to(logs)
        with contextlib.suppress(OSError):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "rb") as source, open(copy, "wb") as target:
                source.seek(max(0, log.stat().st_size - LOG_BYTES))
                shutil.copyfileobj(source, target)


if __name__ == "__main__":
    sys.exit(main())
