"""How many random mutations the tests of damaged input try."""

from __future__ import annotations

import os


def mutations(few: int) -> int:
    """Of each kind and format: GRAPPA_MUTATIONS where that is set, else a few that take seconds."""
    return int(os.environ.get("GRAPPA_MUTATIONS", few))
