from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.artifacts import CENTROIDS_FILE, Artifact, RowArrays, label_rows
from grappa_dist.data.shards import ImageShards
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages import supervised
from grappa_dist.stages.ground_truth import ground_truth_of
from grappa_dist.stages.supervised import (
    CLASSES_AT_ONCE,
    _means,
    class_counts,
    name_classes,
    read_true_labels,
    true_labels_of,
    without_class,
)
from tests.stages import tiny

DIM = 16  # of the tiny backbone


def task_of(row: int) -> str:
    return "even" if row % 2 == 0 else "odd"


def some(row: int) -> str | None:
    """Three labels, the same in both tasks; every fourth row has none, and so has the only row of the second shard."""
    return None if row % 4 == 3 or row == tiny.SIZES[0] else f"label {row % 3}"


class World:
    """Labelled images and features of theirs, and the classes that are made of them."""

    def __init__(self, folder: Path, label: Callable[[int], str | None]) -> None:
        paths = tiny.write_shards(folder / "images", label=label, task=task_of)
        self.here, self.images = tiny.Here(), ImageShards.open(paths, None)
        self.run = tiny.run_in(tiny.config(paths), folder / "run", self.here)
        self.z = np.random.default_rng(0).normal(size=(tiny.NUM_ROWS, DIM)).astype(np.float32)
        files = []
        for shard in range(len(tiny.SIZES)):
            files.append(str(folder / f"{shard}.npy"))
            np.save(files[-1], self.z[list(self.images.shard_rows(shard))])
        self.features = RowArrays(tuple(files), tuple(self.images.starts.tolist()))
        self.ground_truth = ground_truth_of(self.run.store, self.images, labelled=True)
        self.classes: Artifact = true_labels_of(self.run.store, self.ground_truth, [])

    def read(self) -> None:
        read_true_labels(self.run, self.images, self.ground_truth, self.classes)

    def name(self) -> None:
        name_classes(self.run, self.ground_truth, self.features, np.array([tiny.BAD]), self.classes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("labelled"), some)
    made.read()
    made.name()
    return made


def test_a_class_is_a_task_and_a_label_and_rows_without_one_have_none(world: World) -> None:
    found = label_rows(world.classes, world.images.starts).take(np.arange(tiny.NUM_ROWS))
    names = [(task_of(row), some(row)) for row in range(tiny.NUM_ROWS)]
    numbers: dict[tuple[str, str | None], int] = {}
    for row, name in enumerate(names):
        if name[1] is None or row == tiny.BAD:
            assert found[row] == -1
        else:
            assert found[row] == numbers.setdefault(name, int(found[row]))
    assert sorted(numbers.values()) == list(range(len(numbers)))
    assert len(numbers) == 6


def test_what_takes_no_part_is_what_cannot_be_read_or_has_no_label(world: World) -> None:
    expected = [row for row in range(tiny.NUM_ROWS) if some(row) is None or row == tiny.BAD]
    assert without_class(world.classes, world.images).tolist() == expected
    labelled = tiny.NUM_ROWS - len(expected)
    assert class_counts(world.classes) == {"classes": 6, "labelled": labelled, "images": tiny.NUM_ROWS}


def test_a_classifier_can_start_at_the_mean_feature_of_each_class(world: World) -> None:
    found = label_rows(world.classes, world.images.starts).take(np.arange(tiny.NUM_ROWS))
    means = [world.z[found == number].astype(np.float64).mean(0) for number in range(6)]
    np.testing.assert_allclose(np.load(world.classes.path / CENTROIDS_FILE), means, rtol=0, atol=1e-6)
    assert not (world.classes.path / ADAPTORS_FILE).exists()


def test_labels_are_read_once(world: World) -> None:
    before = list(world.here.asked)
    world.read()
    world.name()
    assert world.here.asked == before == ["read_ground_truth", "write_true_labels"]


def test_how_many_take_no_part_is_logged_with_the_first_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    World(tmp_path, some).read()
    output = capsys.readouterr().err
    assert "6 classes of 29 images; 11 have none and take no part: 3 of 13 lack one, the first is " in output
    assert "part-0" in output


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            lambda row: None,
            r"found 0 classes on 0 of 40 images: 13 of 13 lack one, the first is .*part-0.*; 1 of 1 lack one",
        ),
        (lambda row: "only" if row == 6 else None, r"found 1 class on 1 of 40 images: 12 of 13 lack one"),
    ],
)
def test_too_few_classes_are_an_error_that_names_shards_and_images(
    tmp_path: Path, label: Callable[[int], str | None], words: str
) -> None:
    poor = World(tmp_path, label)
    for _ in range(2):  # also where the labels were read by an attempt before
        with pytest.raises(ValueError, match=rf"adapt\.supervised or .* at least two classes.*{words}") as caught:
            poor.read()
        assert "and 1 more shard" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_classes_of_images_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    poor = World(tmp_path, lambda row: {tiny.BAD: "a", 6: "b", 8: "b"}.get(row))
    poor.read()
    with pytest.raises(ValueError, match=r"needs two classes at least, found 1 on images that can be read"):
        poor.name()


def test_classes_that_several_tasks_add_up_are_those_of_one_to_the_byte(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = World(tmp_path, some)
    several.read()
    monkeypatch.setattr(supervised, "ROWS_PER_TASK", 1)
    several.name()
    assert several.here.asked == ["read_ground_truth", *["add_up_classes"] * 2, "write_true_labels"]
    names = {path.name for path in world.classes.path.iterdir()}
    assert {path.name for path in several.classes.path.iterdir()} == names
    for name in names - {"manifest.json"}:
        assert (several.classes.path / name).read_bytes() == (world.classes.path / name).read_bytes(), name


def test_means_of_many_classes_are_made_some_at_a_time_from_the_sums_of_all_tasks(tmp_path: Path) -> None:
    classes, channels = 30_000, 32
    rng = np.random.default_rng(0)
    sums = [rng.integers(-(2**24), 2**24, (classes, channels)) / 2**20 for _ in range(3)]
    counts = rng.integers(1, 9, classes)
    files = [tmp_path / f"{i}.npy" for i in range(len(sums))]
    for file, of_task in zip(files, sums, strict=True):
        np.save(file, of_task)
    tracemalloc.start()
    means = _means(files, counts)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * 8 * channels * (CLASSES_AT_ONCE + 1000) < sums[0].nbytes / 2
    assert means.tobytes() == (sum(sums) / counts[:, None]).astype(np.float32).tobytes()
