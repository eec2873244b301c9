"""What a process holds while it embeds a shard by several models, and what of it is left after an error."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.checksums import MANIFEST
from grappa_dist.files import Sum, read_json, save_array
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.bad_rows import BAD_FILE
from grappa_dist.stages.embed import ROWS_FILE, _Batch, _embed_shard, _OpenShard
from tests.stages import tiny

DIM, BATCH = 64, 1000
NAMES = ("k=1", "k=2", "average")


def opened(root: Path, rows: int) -> tuple[_OpenShard, dict[str, Artifact]]:
    """A shard of so many rows that three models lack; its images are not read here."""
    backbone = tiny.config(["images"]).backbone
    artifacts = {name: Store(root).artifact(f"features/{name}/shard", {}, {"shard": f"{rows} rows"}) for name in NAMES}
    models = {name: (ModelSpec(name, backbone), artifact) for name, artifact in artifacts.items()}
    images: Any = range(rows)
    task: Any = None
    return _OpenShard(task, images, models, None), artifacts


def units_of(rows: np.ndarray) -> np.ndarray:
    """(M, b, D), a function of model, row and channel."""
    model, channel = np.arange(len(NAMES))[:, None, None], np.arange(DIM)
    return (model * 1e6 + rows[None, :, None] + channel / DIM).astype(np.float32)


def batches(shard: _OpenShard, order: np.ndarray, bad: int = -1) -> Iterator[_Batch]:
    """The rows in this order, as galleries may ask for; one of them may be bad."""
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield _Batch(shard.images, rows, units_of(rows), {bad: "not an image"} if bad in rows else {})


def peak_of(root: Path, rows: int) -> int:
    """Bytes that Python and numpy hold at most while a shard of so many rows is embedded and committed."""
    shard, _ = opened(root, rows)
    tracemalloc.start()
    try:
        _embed_shard(shard, DIM, batches(shard, np.arange(rows)), lambda count: None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_embedding_does_not_grow_with_the_rows_of_a_shard(tmp_path: Path) -> None:
    less, more = 70_000, 210_000  # files of more than the 16 MiB that numpy writes at a time
    grown = peak_of(tmp_path, more) - peak_of(tmp_path, less)
    assert grown / (more - less) < 12  # bytes a row, of which the order of the rows is 8; a row of the three is 768


def test_rows_that_come_in_any_order_are_the_bytes_of_the_whole_array_with_their_checksums(tmp_path: Path) -> None:
    rows, order = 2500, np.random.default_rng(0).permutation(2500)
    shard, artifacts = opened(tmp_path, rows)
    counted = list[int]()
    _embed_shard(shard, DIM, batches(shard, order, bad=17), counted.append)
    assert counted == [1000, 1000, 500]
    for of_model, artifact in zip(units_of(np.arange(rows)), artifacts.values(), strict=True):
        save_array(tmp_path / "naive.npy", of_model)
        assert (artifact.path / ROWS_FILE).read_bytes() == (tmp_path / "naive.npy").read_bytes()
        files = read_json(artifact.path / MANIFEST)["files"]
        assert files[ROWS_FILE] == vars(Sum.of(tmp_path / "naive.npy"))
        assert read_json(artifact.path / BAD_FILE) == {"17": "not an image"}


def test_a_shard_without_rows_has_artefacts_of_none(tmp_path: Path) -> None:
    shard, artifacts = opened(tmp_path, 0)
    _embed_shard(shard, DIM, iter(()), lambda count: None)
    assert [np.load(artifact.path / ROWS_FILE).shape for artifact in artifacts.values()] == [(0, DIM)] * 3


def test_a_shard_that_ends_early_leaves_no_artefact_and_nothing_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    shard, artifacts = opened(tmp_path / "run", 3000)

    def killed(count: int) -> None:
        assert list((tmp_path / "tmp").iterdir()) == []  # the file has no name
        raise tiny.Killed

    with pytest.raises(tiny.Killed):
        _embed_shard(shard, DIM, batches(shard, np.arange(3000)), killed)
    assert not any(artifact.complete for artifact in artifacts.values())
    assert list((tmp_path / "tmp").iterdir()) == []


def test_no_place_for_the_rows_of_a_shard_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shard, artifacts = opened(tmp_path, 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"768,000 bytes of scratch: No space left .*TMPDIR names another place"):
        _embed_shard(shard, DIM, batches(shard, np.arange(1000)), lambda count: None)
    assert not any(artifact.complete for artifact in artifacts.values())
