"""Measures what the documentation claims about speed; `python launch/bench.py --help`. It lives in benchmarks/."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of what is installed

from benchmarks.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through what ends workers and removes files
    sys.exit(main())
