"""Measures what the documentation claims about speed: the commands of benchmarks/, listed by --help."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.cli import main
from grappa_dist.output import guard_output

if __name__ == "__main__":
    guard_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: workers are ended, files removed
    sys.exit(main())
