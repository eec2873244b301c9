"""Where there are no scores, the reader learns which labels were looked for, and what the tars hold instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from grappa_dist.artifacts import Store
from grappa_dist.data.shards import ImageShards
from grappa_dist.report.collect import describe_labels
from grappa_dist.stages.ground_truth import ground_truth_of, read_ground_truth
from tests.data.written import write_tar


def described(folder: Path, members: Mapping[str, bytes], *, has_test: bool = True) -> str:
    images = ImageShards.open([write_tar(folder / "t.tar", dict(members))], None)
    ground_truth = ground_truth_of(Store(folder / "run"), images, labelled=has_test)
    read_ground_truth(torch.device("cpu"), (images, ground_truth))
    return describe_labels(cast(Any, SimpleNamespace(ground_truth=ground_truth, test=images)))


def images_with(suffix: str, content: str, rows: int = 3) -> dict[str, bytes]:
    """Images with another member each, in which # stands for the row."""
    found = {f"{row}.{suffix}": content.replace("#", str(row)).encode() for row in range(rows)}
    return {f"{row}.jpg": b"image" for row in range(rows)} | found


def test_a_set_of_single_images_per_class_has_labels(tmp_path: Path) -> None:
    said = described(tmp_path, images_with("json", '{"label": "#"}'))
    assert said.startswith("3 of 3 test images have a label, but no two good ones of a task have the same")


@pytest.mark.parametrize("suffix", ["cls", "txt", "label.txt", "npy"])
def test_members_that_are_not_read_are_named(tmp_path: Path, suffix: str) -> None:
    said = described(tmp_path, images_with(suffix, "#"))
    assert said.startswith("None of 3 test images has a label. Labels are read from the JSON member beside an image")
    assert said.endswith(f"other members of the tars are not read: .{suffix} (3)")


def test_keys_of_json_members_beside_which_there_is_no_label_are_named(tmp_path: Path) -> None:
    said = described(tmp_path, images_with("json", '{"class": #, "Label": "a", "\\u001b[2J": 1}'))
    assert "there the JSON members have 'class', 'Label', '\\x1b[2J'" in said
    assert said.isprintable()


def test_images_alone_have_nothing_to_name_and_without_a_test_set_nothing_is_said(tmp_path: Path) -> None:
    assert described(tmp_path, {"1.jpg": b"image"}).endswith('with {"label": ..., "task": ...}')
    assert described(tmp_path, {"1.jpg": b"image"}, has_test=False) == ""
