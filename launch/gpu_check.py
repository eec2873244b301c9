"""Checks on one GPU whether this machine computes what it should, and how fast, in minutes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("grappa_dist") is None:  # from a checkout, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grappa_dist.gpu_check.main import main, parser
from grappa_dist.output import guard_output


def parse() -> argparse.Namespace:
    return parser().parse_args()


if __name__ == "__main__":
    guard_output()
    sys.exit(main(parse()))
