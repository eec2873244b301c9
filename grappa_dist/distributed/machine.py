"""What computes a run: the processor, cores, memory and GPUs of a node, the versions, the code and the command.

Read from files of the system and of the packages; nothing that computes is imported. Names of hosts and users are left
out.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from grappa_dist.output import printable_line, without_secrets

GROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
TRACKED = ("torch", "timm", "deepspeed", "ray", "faiss-cpu", "faiss-gpu", "webdataset", "numpy")
GIT_TIMEOUT_S = 10.0
MOST_COMMAND = 1000  # characters
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """A node. What is not known is "" or 0."""

    processor: str = ""
    cores: float = 0.0  # that may be used: of a container, its share
    memory_bytes: int = 0  # of the machine, or the container's limit where that is less
    gpus: tuple[str, ...] = ()

    def describe(self) -> str:
        """For example "AMD EPYC 9R14, 16 cores, 128 GiB, 2 x NVIDIA H200"."""
        cores = f"{self.cores:g} core{'' if self.cores == 1 else 's'}" if self.cores else ""
        memory = f"{self.memory_bytes / 2**30:.3g} GiB of memory" if self.memory_bytes else ""
        counts = {gpu: self.gpus.count(gpu) for gpu in self.gpus}
        gpus = " and ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items()) or "no GPU"
        return ", ".join(filter(None, [self.processor or "unknown processor", cores, memory, gpus]))


def this_machine(*, seen_gpus: Sequence[str] = ()) -> Machine:
    """The node of this process.

    Args:
        seen_gpus: names of those that torch sees here, where the driver lists none.
    """
    try:
        name = processor() or platform.machine()
        return Machine(name, usable_cores(), memory_limit(), listed_gpus() or tuple(seen_gpus))
    except (OSError, ValueError):  # what a system lists in its own way is no reason for a run to end
        return Machine(platform.machine(), float(os.cpu_count() or 0), 0, tuple(seen_gpus))


def processor() -> str:
    """The name of the processor, "" where the system does not tell."""
    try:
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line for line in lines if line.startswith("model name")), "").rpartition(":")[2].strip()


def multiplies_bf16(proc: Path | None = None) -> bool | None:
    """Whether the processor has matrix products in bfloat16 (AMX, AVX-512 BF16, Arm's); None: the system does not tell.

    Args:
        proc: in place of /proc.
    """
    try:
        lines = ((proc or PROC) / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").rpartition(":")[2].split()
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags)) if flags else None


def usable_cores(group: Path = GROUP) -> float:
    """Cores that this process may use: those it is bound to, or the container's share where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = group / "cpu.max"
    quota, _, period = limit.read_text(encoding="utf-8").partition(" ") if limit.is_file() else ("max", "", "")
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def memory_limit(group: Path = GROUP) -> int:
    """Bytes of memory of the machine, or the container's limit where that is less."""
    there = int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    limit = group / "memory.max"
    most = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return there if most == "max" else min(there, int(most))


def listed_gpus(proc: Path | None = None) -> tuple[str, ...]:
    """The names of the GPUs that NVIDIA's driver lists, without a context on any."""
    models = []
    for path in sorted((proc or PROC).glob("driver/nvidia/gpus/*/information")):
        lines = path.read_text(encoding="utf-8").splitlines()
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")][:1]
    return tuple(models)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version(folder: Path = _PACKAGE) -> str:
    """The version of this package and, of a checkout, its commit, with "modified" where files differ from it."""
    try:
        version = metadata.version("grappa-dist")
    except metadata.PackageNotFoundError:  # neither installed nor in place
        version = "of unknown version"
    if not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return f"grappa-dist {version}"  # not in a checkout, or in that of a project which has it in its environment
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return f"grappa-dist {version}, commit {commit[:12]}{', modified' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; "" where there is no git, or it refuses."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process as it can be typed again, without secrets; "" where it is not one of this package."""
    program, *arguments = sys.argv if argv is None else argv
    path = Path(program)
    names = {"grappa-dist": "grappa-dist", "full_pipeline.py": "python launch/full_pipeline.py"}
    name = "grappa-dist" if path == _PACKAGE / "__main__.py" else names.get(path.name, "")
    if not name:
        return ""
    words = [shlex.quote(without_secrets(word)) for word in arguments]  # before quoting, which changes them
    shown = printable_line(without_secrets(" ".join([name, *words])))
    return shown if len(shown) <= MOST_COMMAND else shown[: MOST_COMMAND - 1] + "…"


def origin() -> dict[str, Any]:
    """The same of this process, for the events of a run."""
    return {
        "machine": this_machine().describe(),
        "versions": package_versions(),
        "code": code_version(),
        "command": command_line(),
    }
