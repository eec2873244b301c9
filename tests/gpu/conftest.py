from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu


@pytest.fixture(scope="session")
def gpu() -> Iterator[PretendGpu]:
    """One process for all tests of this folder: it imports everything once."""
    if reason := why_not():
        pytest.skip(reason)
    with PretendGpu() as process:
        yield process
