"""Makes WebDataset shards of images; `python launch/make_shards.py --help`. It is grappa_dist/make_shards/cli.py."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.make_shards.cli import main
from grappa_dist.output import guard_output

if __name__ == "__main__":
    guard_output()
    # leaves through the writer, which keeps finished shards and removes unfinished ones
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.exit(main())
