"""What a measurement ran on, without which its numbers say nothing."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.faiss_baselines import faiss_version


def machine(threads: int, *libraries: str) -> dict[str, str]:
    """The lines of a header, by name; `libraries` whose versions are told instead of faiss's."""
    load = os.getloadavg()[0]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": f"{_processor()}, {cores()} cores, load {load:.1f} at the start",
        "threads": f"{threads} per process",
        "versions": ", ".join(
            [
                f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
                *([f"{name} {version(name)}" for name in libraries] or [faiss_version()]),
            ]
        ),
    }


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
