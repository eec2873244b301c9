"""Small disks for one process and what it starts, in a mount namespace of its own: filling them harms nobody else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

DISK, SHARED_MEMORY = "64m", "512m"  # Ray's object store takes 256 MiB of the latter


@cache
def namespace() -> tuple[str, ...] | None:
    """A command that runs another one in a mount namespace of its own; None where that is not possible."""
    for options in ((), ("--map-root-user",)):
        command = ("unshare", "--mount", "--propagation", "private", *options)
        try:
            if not subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
                return command
        except FileNotFoundError:
            return None
    return None


@contextmanager
def small_disks(folders: Sequence[Path]) -> Iterator[None]:
    """Inside, there is a small disk at each folder and at /dev/shm.

    Raises:
        RuntimeError: this process is not in a mount namespace of its own.
    """
    if os.stat("/proc/self/ns/mnt").st_ino == os.stat(f"/proc/{os.getppid()}/ns/mnt").st_ino:
        raise RuntimeError("disks are mounted in a namespace alone; start this by `unshare --mount`")
    disks = [*((folder, DISK) for folder in folders), (Path("/dev/shm"), SHARED_MEMORY)]
    for folder, size in disks:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        for folder, _ in disks:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
