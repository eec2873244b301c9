"""The rows of a check of the machine: printed one by one, written as JSON and as a table in Markdown."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from grappa_dist.console import pluralize
from grappa_dist.files import write_json, write_utf8
from grappa_dist.gpu_check.checks import Found
from grappa_dist.output import printable

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"
JSON_FILE, TABLE_FILE = "gpu_check.json", "gpu_check.md"
_WIDTH = 14  # of a name
_PACKAGES = ("torch", "torchvision", "timm", "triton", "deepspeed", "numpy", "pillow", "simplejpeg", "faiss-gpu", "ray")


class Row(NamedTuple):
    """A check that ended, or that was not begun."""

    name: str
    state: str
    seconds: float
    found: Found

    def line(self) -> str:
        took = f"{self.seconds:6.1f} s" if self.state != SKIPPED else " " * 8
        return printable(f"{self.state:<7}  {self.name:<{_WIDTH}}  {took}  {self.found.line()}".rstrip())


def state_of(found: Found) -> str:
    return WRONG if found.wrong else OK


@dataclass
class Report:
    """Prints each row as it is added, and keeps the files of what is there so far."""

    folder: Path
    command: str
    budget_s: float
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)  # facts about it
    _notes: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)
        self.write()  # of a run that is ended from outside, what is there

    def note(self, text: str) -> None:
        self._notes.append(text)

    def write(self) -> None:
        write_json(self.folder / JSON_FILE, self.as_json())
        write_utf8(self.folder / TABLE_FILE, self.as_table())

    def as_json(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "machine": self.machine,
            "budget_s": self.budget_s,
            "seconds": round(time.monotonic() - self._began, 1),
            "notes": self._notes,
            "rows": [
                {
                    "name": row.name,
                    "state": row.state,
                    "seconds": round(row.seconds, 2),
                    "text": row.found.text,
                    "wrong": row.found.wrong,
                    "figures": [figure._asdict() for figure in row.found.figures],
                }
                for row in self.rows
            ],
        }

    def as_table(self) -> str:
        facts = [f"- {name}: {value}" for name, value in self.machine.items()]
        head = ["| check | state | s | found |", "|---|---|---|---|"]
        lines = [
            f"| {row.name} | {row.state} | {row.seconds:.1f} | {row.found.line().replace('|', '&#124;')} |"
            for row in self.rows
        ]
        return "\n".join(
            ["# gpu_check", "", f"- command: `{self.command}`", *facts, "", *head, *lines, "", self.ending(), ""]
        )

    def ending(self) -> str:
        """How many rows are of which state, and where the results are."""
        states = [row.state for row in self.rows]
        counted = [f"{states.count(state)} {state}" for state in (OK, WRONG, FAILED, SKIPPED) if state in states]
        return f"{pluralize(len(states), 'check')}: {', '.join(counted)}; {self.folder / JSON_FILE}"


def machine_facts(device: str) -> dict[str, str]:
    """The GPU, the version of CUDA, the processor and the versions of what computes, by name."""
    import torch

    facts = {"processor": f"{platform.machine()}, {os.cpu_count()} cores"}
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
        facts["cuda"] = str(torch.version.cuda)
    facts["versions"] = f"python {platform.python_version()}, " + ", ".join(_versions())
    return facts


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} -")
    return found
