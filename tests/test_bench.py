"""Speeds of this machine, with the demo's backbone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from grappa_dist import bench
from grappa_dist.console import pluralize
from grappa_dist.rates import Rates
from grappa_dist.training.memory import ModelSizes


def test_a_machine_is_as_fast_as_all_its_workers_at_once() -> None:
    seconds = dict.fromkeys(("decode_s", "augment_s", "forward_s", "adapted_s", "shared_s", "set_s", "fused_s"), 0.5)
    sizes = ModelSizes(8, 8, "crop", "bicubic", 1, 1, 1, 1, "")
    rates = Rates(**seconds, sizes=sizes, flops=1e10, weight_s=1e-9, on_gpu=False, of="", measured_s=1.0)
    found = {speed.what: speed.per_s for speed in bench._speeds(rates, 4, "noise", 3)}
    assert found["embed by the backbone"] == 8
    assert found["train an adaptor set"] == 4  # what is shared, and the set
    assert found["multiply matrices"] == 40
    assert "train the fusion of 3 sets" in found


@pytest.mark.slow
def test_photos_are_decoded_and_every_speed_is_finite(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (80, 60), (40 * number, 90, 120)).save(tmp_path / f"{number}.jpg")
    found = bench.bench("grappa_dist.demo.backbone:create", [str(tmp_path)])
    assert len(found.speeds) == 8
    assert all(0 < speed.per_s < math.inf for speed in found.speeds)
    text = found.text()
    assert "decode for embedding (3 images)" in text
    assert f"as {pluralize(found.workers, 'worker')} at once" in text
    assert f"assign rows to {bench.CLUSTERS:,} centroids" in text


def test_a_backbone_that_does_not_exist_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match="no such model; did you mean 'vit_small_patch16_224'"):
        bench.bench("timm:vit_smal_patch16_224")


@pytest.mark.parametrize("setting", ["fuse.epochs=3", "nonsense.typo=3", "img=1.jpg", "backbone.name=timm:vit"])
def test_a_setting_that_changes_nothing_measured_is_refused(setting: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{setting}: has no part in what is measured; expected a setting of backbone"
    ):
        bench.bench("grappa_dist.demo.backbone:create", [], [setting])
