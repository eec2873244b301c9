"""Makes WebDataset shards of images; `python launch/make_shards.py --help`. It is grappa_dist/make_shards/cli.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.make_shards.cli import main, stop_on_signals
from grappa_dist.output import guard_output

if __name__ == "__main__":
    guard_output()
    stop_on_signals()
    sys.exit(main())
