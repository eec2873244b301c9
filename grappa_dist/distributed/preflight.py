"""Checks, before any work, that every node can take part: same versions, same storage, readable data, enough memory.

Each node collects facts (`survey`) in a worker that is up already; `problems` compares them, without Ray.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path
from uuid import uuid4

import torch

from grappa_dist.bucket import bucket_of, here, send, withdraw
from grappa_dist.distributed.machine import multiplies_bf16, this_machine
from grappa_dist.files import make_folder, read_bytes, write_bytes

PACKAGES = ("torch", "ray", "deepspeed", "faiss")
LATE_FILE_S = 5.0  # a network file system may show a new file this late
FIRST_BF16_GPU = 8  # compute capability: Ampere
NAMED = 3  # nodes named for one problem


@dataclass(frozen=True)
class Checks:
    """What a run needs of every node."""

    root: Path  # the run directory
    read_data: Callable[[], None]  # reads a little of the images, or raises the error that prevents it
    worker_bytes: int = 0  # memory that one worker needs at least
    writes: bool = True  # whether the run directory is written to
    backbone: Callable[[], str] | None = (
        None  # why the backbone built here is not the driver's, or ""; None: not needed
    )
    bf16: bool = False  # whether matrix products are in bfloat16


@dataclass(frozen=True)
class Facts:
    """The facts of one node; a reason is "" where there is no problem."""

    node: str
    versions: Mapping[str, str] = field(default_factory=dict)
    storage: str = ""  # why the run directory is not the driver's, or cannot be written
    data: str = ""  # why the images cannot be read
    gpu: str = ""  # why the GPU that a worker was given cannot be used
    memory_bytes: int = 0  # free for one worker: of its GPU, else its part of the node's memory
    backbone: str = ""  # why a backbone that is built there is not the driver's
    machine: str = ""  # what it is, without its name
    slow: str = ""  # why it takes longer than it need; no problem


def node_name(address: str) -> str:
    return f"{socket.gethostname()} ({address})"


@cache
def versions() -> dict[str, str]:
    """Version of everything that must agree; "missing" where it cannot be imported. Imports none of it."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "grappa_dist": _own_version()}


def _version(name: str) -> str:
    if util.find_spec(name) is None:
        return "missing"
    for distribution in (name, f"{name}-cpu", f"{name}-gpu"):
        try:
            return metadata.version(distribution).partition("+")[0]  # builds for CPU and GPU work together
        except metadata.PackageNotFoundError:
            continue
    return str(import_module(name).__version__).partition("+")[0]


def _own_version() -> str:
    """A digest of our sources: a stale copy on one node may have the same version."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.is_file()):  # not an editor's broken link
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"sources {digest.hexdigest()[:8]}"


def survey(checks: Checks, token: Path | None, node: str, name: str, *, workers: int, gpu: bool) -> Facts:
    """The facts of the node that this process runs on, `workers` of which share its memory.

    Args:
        token: of the driver in the run directory; None where nothing is written there.
        node: Ray's id of the node; several nodes may be on one host.
        name: of the node, for messages.
    """
    usable = gpu and torch.cuda.is_available()
    why = f"torch {torch.__version__} sees no GPU here, though Ray has given one" if gpu and not usable else ""
    free = torch.cuda.mem_get_info()[0] if usable else free_memory() // workers
    machine = this_machine(seen_gpus=[torch.cuda.get_device_name()] if usable else []).describe()
    slow = _slow_products(usable) if checks.bf16 else ""
    storage, data = _storage(checks.root, token, node), _data(checks)
    return Facts(name, versions(), storage, data, why, free, machine=machine, slow=slow)


def _slow_products(on_gpu: bool) -> str:
    """Why products in bfloat16 are slow here, or ""."""
    if on_gpu:
        old = torch.cuda.get_device_capability()[0] < FIRST_BF16_GPU
        what = f"{torch.cuda.get_device_name()} has" if old else ""
    else:
        what = "its processor has" if multiplies_bf16() is False else ""
    advice = "so backbone.precision=bf16 is slow there; fp32 is faster, and another result"
    return f"{what} no matrix products in bfloat16, {advice}" if what else ""


def _storage(root: Path, token: Path | None, node: str) -> str:
    """Reads what the driver wrote and writes it again under the node's name; why that fails, or ""."""
    if token is None:
        is_there = root.is_dir() or bucket_of(root) is not None
        return "" if is_there else f"the run directory {root} is not there; put --out on storage that all share"
    try:
        write_bytes(token / _file_of(node), _read_when_visible(token / "driver"))
        send(token / _file_of(node))
    except FileNotFoundError:
        return f"the run directory {root} is not the one that the driver writes to; put --out on storage that all share"
    except (OSError, ValueError) as error:
        return f"the run directory {root} cannot be used: {getattr(error, 'strerror', None) or error}"
    return ""


def _file_of(node: str) -> str:
    return "node-" + hashlib.sha256(node.encode()).hexdigest()[:16]


def _read_when_visible(path: Path) -> bytes:
    """What a file holds, once it is visible."""
    end = time.monotonic() + LATE_FILE_S
    while True:
        try:
            return read_bytes(here(path))
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _data(checks: Checks) -> str:
    try:
        checks.read_data()
    except (OSError, ValueError, ImportError) as error:
        return f"images cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
    return ""


def free_memory() -> int:
    """Bytes that processes here can still take: of the machine, or of the container's limit where that is less."""
    free = int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        free = int(min(free, _left_in_container(Path("/sys/fs/cgroup"))))
    except OSError:  # not Linux, or no such limits
        pass
    return free


def _left_in_container(group: Path) -> float:
    """Bytes up to the control group's limit; the page cache counts against it, but is released on demand."""
    limit = (group / "memory.max").read_text(encoding="utf-8").strip()
    if limit == "max":
        return math.inf
    kinds = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    return int(limit) - int((group / "memory.current").read_text(encoding="utf-8")) + int(kinds.get("inactive_file", 0))


@contextmanager
def token_in(root: Path) -> Iterator[Path]:
    """A folder in the run directory with a file of the driver; removed at the end, as are the folders made for it."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    token = root / f".preflight-{uuid4().hex[:12]}"
    try:
        make_folder(token)
        write_bytes(token / "driver", token.name.encode())
        send(token / "driver")
    except OSError as error:
        raise ValueError(f"the run directory {root} cannot be written: {error.strerror or error}") from None
    try:
        yield token
    finally:
        shutil.rmtree(token, ignore_errors=True)
        withdraw(token)
        with suppress(OSError):  # something else lies in it by now
            for folder in made:
                folder.rmdir()


def answered(token: Path | None, node: str, facts: Facts) -> Facts:
    """The facts, after the driver has looked for what the node wrote."""
    if token is None or facts.storage:
        return facts
    try:
        content = _read_when_visible(token / _file_of(node))
    except OSError:
        content = b""
    why = "" if content == token.name.encode() else f"the driver does not see what it writes to {token.parent}"
    return replace(facts, storage=why)


def problems(own_versions: Mapping[str, str], nodes: Sequence[Facts], worker_bytes: int) -> list[str]:
    """One line per kind of problem, with the nodes that have it."""
    where: dict[str, list[str]] = defaultdict(list)
    for facts in nodes:
        for name, version in facts.versions.items():
            if version != own_versions[name]:
                where[f"{name} {version}, the driver has {own_versions[name]}"].append(facts.node)
        for problem in (facts.storage, facts.data, facts.gpu, facts.backbone):
            if problem:
                where[problem].append(facts.node)
        if facts.memory_bytes < worker_bytes and not facts.gpu:
            need, free = (f"{size / 2**30:.1f} GiB" for size in (worker_bytes, facts.memory_bytes))
            where[f"a worker needs {need} of memory at least, {free} is free"].append(facts.node)
    return [f"{_names(found)}: {problem}" for problem, found in where.items()]


def remarks(nodes: Sequence[Facts]) -> list[str]:
    """One line per reason why nodes are slow, with the nodes."""
    where: dict[str, list[str]] = defaultdict(list)
    for facts in nodes:
        if facts.slow:
            where[facts.slow].append(facts.node)
    return [f"{_names(found)}: {why}" for why, found in where.items()]


def _names(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return ", ".join(nodes[:NAMED]) + more


def table(nodes: Iterable[Facts]) -> str:
    """A line per node: versions and free memory; and what is slow, before them."""
    nodes = list(nodes)
    lines = [f"warning: {line}" for line in remarks(nodes)]
    for facts in nodes:
        found = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        lines.append(f"{facts.node}: {found}; {facts.memory_bytes / 2**30:.1f} GiB free for each worker")
    return "\n".join(lines)
