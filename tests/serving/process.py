"""The command `grappa-dist serve` as a process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Serving:
    """A server that answers."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Its status, and what it printed after its address."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[Serving]:
    """Runs `grappa-dist` in a folder, gives control once it has printed its address, and ends it.

    The log has what it printed on standard error, and is `serve.log` of the folder.
    """
    command = [sys.executable, "-m", "grappa_dist", *words]
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"serving .* at (http://\S+)", line):
                    yield Serving(process, found[1], log)
                    return
            raise AssertionError(f"it ended: {log.read_text()}")
        finally:
            process.kill()
            process.wait()
