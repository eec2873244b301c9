from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import pretrain_demo_backbone
from examples.pretrain_demo_backbone import CLASSES, DOODLES, augment, draw_doodles, example, pretrain
from grappa_dist.demo import backbone
from grappa_dist.demo.drawings import picture, tasks


def test_no_kind_of_the_collection_is_among_the_doodles() -> None:
    assert not {doodle.__name__ for doodle in DOODLES} & {label for task in tasks() for label in task.labels}


def test_no_doodle_is_a_drawing_of_the_collection() -> None:
    doodles = {example(0, index).image.tobytes() for index in range(40)}
    drawings = {picture(0, task.name, task.labels[0], index).tobytes() for task in tasks() for index in range(10)}
    assert len(doodles) == 40
    assert not doodles & drawings


def test_doodle_labels_stay_below_the_number_of_classes() -> None:
    _, labels = draw_doodles(seed=0, number=100)
    assert set(labels) == set(CLASSES)
    for head, label in labels.items():
        assert label.min() >= 0
        assert label.max() < CLASSES[head]


def test_augmentation_keeps_size_and_range() -> None:
    pixels = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    augmented = augment(pixels, torch.Generator().manual_seed(0))
    assert augmented.shape == pixels.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 255


@pytest.mark.long
def test_two_steps_of_pretraining_from_any_folder_write_a_file_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    command = [sys.executable, pretrain_demo_backbone.__file__, "--out", str(path)]
    small = ["--steps=2", "--batch=3", "--doodles=5"]
    done = subprocess.run([*command, *small], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "step 2/2" in done.stdout
    with torch.no_grad():
        assert backbone.create(path)(torch.zeros(1, 3, 48, 48)).isfinite().all()


def test_the_same_seed_trains_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        pretrain(tmp_path / name, steps=2, batch=3, doodles=5, seed=4)
        weights.append(load_file(tmp_path / name))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_run_without_doodles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 2, 3 and 0"):
        pretrain(tmp_path / "weights", steps=2, batch=3, doodles=0)
