from __future__ import annotations

import csv
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.scale_images import BAD_EVERY, PER_INSTANCE, SIZE_PX, Part, draw, encoded_images, parts_of


@pytest.mark.parametrize(("train", "test"), [(1000, 1000), (1003, 7), (100_000, 50_000)])
def test_all_images_are_in_one_part_each_and_half_of_the_test_images_in_one_task(train: int, test: int) -> None:
    parts = parts_of(train, test)
    sizes = Counter[tuple[str, str]]()
    for part in parts:
        assert part.first == sizes[part.split, part.task]
        sizes[part.split, part.task] += part.count
    assert sum(n for (split, _), n in sizes.items() if split == "train") == train
    assert sum(n for (split, _), n in sizes.items() if split == "test") == test
    assert sizes["test", "species"] >= test / 2
    assert len({part.name for part in parts}) == len(parts)


def test_an_image_depends_on_its_part_alone_and_classes_differ_by_what_they_share() -> None:
    part = Part("train", "instances", 0, 3 * PER_INSTANCE, 3)
    found = list(encoded_images(part))
    assert found == list(encoded_images(part))
    assert Counter(label for label, _ in found) == dict.fromkeys([f"train-{i:06d}" for i in range(3)], PER_INSTANCE)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(encoded)), float) for _, encoded in found])
    assert pixels.shape[1:] == (SIZE_PX, SIZE_PX, 3)
    means = pixels.reshape(3, PER_INSTANCE, -1).mean(1)
    within = np.abs(pixels.reshape(3, PER_INSTANCE, -1) - means[:, None]).mean()
    between = np.abs(means[:, None] - means).sum() / (means.size * 2)
    assert within < between


def test_one_of_many_images_does_not_decode() -> None:
    found = [encoded for _, encoded in encoded_images(Part("test", "kinds", BAD_EVERY - 2, 4, 8))]
    assert [len(encoded) == 20 for encoded in found] == [False, True, False, False]


def test_parts_that_are_there_are_not_drawn_again(tmp_path: Path) -> None:
    parts, lines = parts_of(40, 12), list[str]()
    draw(tmp_path, parts, 2, lines.append)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / f"{parts[1].name}.csv").unlink()  # as after a kill between the two
    draw(tmp_path, parts, 1, lines.append)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert [line.partition(" (")[0] for line in lines[len(parts) :]] == ["1 of 1 parts drawn"]
    with tarfile.open(tmp_path / f"{parts[0].name}.tar") as tar, open(tmp_path / f"{parts[0].name}.csv") as file:
        assert tar.getnames() == [row["file"] for row in csv.DictReader(file)]


def test_parts_that_are_not_begun_are_left_when_drawing_is_stopped(tmp_path: Path) -> None:
    parts = [Part("train", "kinds", first, 2, 8) for first in range(0, 400, 2)]

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, parts, 1, stop)
    assert 1 <= len(list(tmp_path.glob("*.csv"))) < len(parts) / 2
