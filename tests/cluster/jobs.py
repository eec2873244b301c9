"""Writes a user's settings for a small run, submits it as a user does, and looks at what it left on storage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.slurm import Slurm
from tests.e2e import runs
from tests.stages import tiny

SUBMIT = runs.ROOT / "cluster" / "slurm" / "submit.sh"


def write_config(folder: Path, **sections: dict[str, object]) -> Path:
    """Settings of the two-block model on generated shards; `sections` replace some."""
    # sizes of two kinds: enough steps to be caught in the middle, few enough to be done in seconds
    shards = tiny.write_shards(folder / "shards")
    resources = {"workers": "auto", "num_cpus": None, "decode_threads": 1}
    config = tiny.config(shards, resources=resources | sections.pop("resources", {}), **sections)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@dataclass(frozen=True)
class Job:
    number: str
    run: Path
    slurm: Slurm

    @property
    def log(self) -> str:
        path = self.run / "slurm" / f"{self.number}.log"
        return path.read_text() if path.exists() else ""

    def everything(self) -> str:
        """All of its output, for a test that fails."""
        logs = [p for p in sorted((self.run / "slurm").rglob("*.log")) if p.name in ("head.log", "workers.log")]
        errors = self.run / "errors.log"
        output = [f"--- {path}\n{path.read_text()[-1500:]}" for path in [*logs, errors] if path.exists()]
        return "\n".join([str(self.slurm.job(self.number)), self.log, *output])

    def ends(self, patience_s: float = 240.0) -> tuple[str, int]:
        """Its state and exit status."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            state = self.slurm.wait_for_state(self.number, *final, patience_s=patience_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.everything()}") from None
        return state, int(self.slurm.job(self.number)["ExitCode"].split(":")[0])

    def wait_for_log(self, words: str, patience_s: float = 120.0) -> float:
        """Seconds until its log has these words."""

        def seen() -> bool:
            assert self.slurm.state(self.number) not in ("FAILED", "COMPLETED") or words in self.log, self.everything()
            return words in self.log

        try:
            return self.slurm.wait_for(seen, f"'{words}' in the log", patience_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.everything()}") from None

    def reaches(self, adaptors: str, step: int, patience_s: float = 120.0) -> None:
        try:
            self.slurm.wait_for(lambda: runs.last_step(self.run, adaptors) >= step, f"step {step}", patience_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.everything()}") from None


def submit(slurm: Slurm, folder: Path, *lines: str, flags: tuple[str, ...] = ()) -> Job:
    """Submits a copy of the settings with `lines` at its end."""
    run = folder / "run"
    activate = f'activate() {{ export PATH="{Path(sys.executable).parent}:$PATH"; }}'
    own = [f"RUN_DIR={run}", f"CONFIG={folder}/tiny.yaml", activate, "NODES=2 CPUS_PER_NODE=1 MEMORY_PER_NODE=2500"]
    settings = folder / "settings.sh"
    settings.write_text("\n".join([*own, "TIME=30 OBJECT_STORE=100M", *lines, ""]))
    output = slurm.command(str(SUBMIT), str(settings), *flags)
    return Job(output.split()[1].rstrip(","), run, slurm)
