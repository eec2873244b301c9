from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.stages import multi_set, tiny


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in `images`, for jobs of `multi_set.job_in`."""
    folder = tmp_path_factory.mktemp("packs")
    tiny.write_shards(folder / "images")
    return folder


@pytest.fixture(scope="session")
def trained(drawn: Path) -> Path:
    """The same with the jobs of `multi_set.train_all_ways`."""
    for size in (1, 2):
        run_ranks(multi_set.train_all_ways, size, drawn, timeout_s=400)
    return drawn
