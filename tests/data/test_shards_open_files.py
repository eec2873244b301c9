"""The files that a process holds open do not grow with the number of shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.artifacts import RowArrays
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_folder

HOLD = """
import os, resource, sys
from pathlib import Path
import torch
from grappa_dist.artifacts import RowArrays
from grappa_dist.data.shards import ImageShards

def open_files():
    return len(os.listdir("/proc/self/fd"))

resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
images = ImageShards.open([Path(sys.argv[1]) / "shards"], Path(sys.argv[1]) / "index")
before = open_files()
rows = RowArrays.of(sorted((Path(sys.argv[1]) / "rows").glob("*.npy")), images.starts)
held = [(rows.shard(i), images.index(i)) for i in range(len(images.shards))]  # as k-means holds its rows
assert all(int(features[0]) == i for i, (features, _) in enumerate(held))
assert all(len(images.image_bytes(row)) == row % 251 + 1 for row in range(len(images)))
print(len(held), open_files() - before)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_folder(folder / "shards", 200, rows_per_shard=1)
    (folder / "rows").mkdir()
    for number in range(200):
        np.save(folder / "rows" / f"{number:04d}.npy", np.full(1, number, dtype=np.int32))
    return folder


def test_a_process_with_a_low_limit_holds_rows_and_indexes_of_more_shards_than_it_may_open(world: Path) -> None:
    found = subprocess.run([sys.executable, "-c", HOLD, str(world)], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    shards, opened = map(int, found.stdout.split())
    assert shards == 200
    assert opened <= 80 // 4 + 2


def test_a_map_holds_no_file_open_and_a_write_to_it_changes_no_file(world: Path) -> None:
    images = ImageShards.open([world / "shards"], None)
    paths = sorted((world / "rows").glob("*.npy"))
    before = len(os.listdir("/proc/self/fd"))
    rows = [RowArrays.of(paths, images.starts).shard(i) for i in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    rows[7][0] = -1
    assert np.load(paths[7])[0] == 7
    assert rows[8][0] == 8
