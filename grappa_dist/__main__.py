"""`python -m grappa_dist` is the command `grappa-dist`."""

from __future__ import annotations

import sys

from grappa_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
