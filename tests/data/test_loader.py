"""Reading ahead: in order, bounded, and without leaving threads behind."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.loader import load_images, load_or_skip, read_batches
from grappa_dist.data.rng import view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.data.writer import ShardWriter


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("jobs", [0, 1, 20])
def test_results_come_in_the_order_of_the_jobs(threads: int, jobs: int) -> None:
    def read(job: int) -> int:
        time.sleep(0.002 * (job % 3))
        return job * job

    assert list(read_batches(range(jobs), read, threads=threads, depth=4)) == [job * job for job in range(jobs)]
    assert readers() == []


def test_no_more_than_depth_is_read_ahead() -> None:
    started = 0

    def jobs() -> Iterator[int]:
        nonlocal started
        for job in range(100):
            started += 1
            yield job

    for taken, _ in enumerate(read_batches(jobs(), lambda job: job, threads=4, depth=3), 1):
        assert started <= taken + 3


def test_an_error_reaches_the_reader_and_ends_the_threads() -> None:
    def read(job: int) -> int:
        if job == 3:
            raise ValueError("job 3 is bad")
        return job

    batches = read_batches(range(100), read, threads=2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="job 3 is bad"):
        next(batches)
    assert readers() == []


def test_closing_early_ends_the_threads() -> None:
    batches = read_batches(iter(range(10**9)), lambda job: job, threads=2)
    assert next(batches) == 0
    assert readers()
    batches.close()
    assert readers() == []


def test_wrong_settings_are_refused() -> None:
    for threads, depth in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"got {threads} and {depth}"):
            read_batches([1], str, threads=threads, depth=depth)


@pytest.fixture
def shards(tmp_path: Path) -> ImageShards:
    with ShardWriter(tmp_path / "f", rows_per_shard=2) as writer:
        for row in range(5):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (50 * row + 5, 0, 0)).save(buffer, "PNG")
            writer.write(b"nonsense" if row == 3 else buffer.getvalue(), "png")
    return ImageShards.open([tmp_path / "f"], None)


def test_images_come_in_the_order_of_the_rows(shards: ImageShards) -> None:
    preprocess = Preprocess(4)
    images = load_images(shards, [4, 0, 4], lambda image, row: preprocess.test(image), (4, 4, 3))
    assert images[:, 0, 0, 0].tolist() == [205, 5, 205]
    assert load_images(
        shards, np.array([], dtype=np.int64), lambda image, row: preprocess.test(image), (4, 4, 3)
    ).shape == (0, 4, 4, 3)


def test_several_views_of_an_image_decode_it_once(shards: ImageShards) -> None:
    def views(image: Image.Image, row: int) -> np.ndarray:
        return np.stack([Preprocess(4).augment(image, view_generator(0, 0, row, view), 0.5) for view in range(2)])

    assert load_images(shards, [0, 1], views, (2, 4, 4, 3)).shape == (2, 2, 4, 4, 3)


def test_a_bad_image_is_skipped_with_its_reason_or_named(shards: ImageShards) -> None:
    preprocess = Preprocess(4)
    images, reasons = load_or_skip(shards, [2, 3, 4], lambda image, row: preprocess.test(image), (4, 4, 3))
    assert list(reasons) == [3]
    assert "can be read" in reasons[3]
    assert images[:, 0, 0, 0].tolist() == [105, 0, 205]
    with pytest.raises(ValueError, match=r"shard-000001\.tar: image '000000003' \(row 3\) does not decode"):
        load_images(shards, [2, 3, 4], lambda image, row: preprocess.test(image), (4, 4, 3))
