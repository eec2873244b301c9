"""Real images and a really pretrained backbone, where they are to be had (GRAPPA_SHARED)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.config import BackboneConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.metrics import retrieval_scores
from grappa_dist.models.spec import build_backbone
from grappa_dist.stages.embed import Embedding, embed_rows

EXPECTED = {"cub100": 47.8, "grocery": 35.3, "omniglot_small": 21.6, "eth80": 37.7}  # R-Precision in percent

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "task", [task if task == "eth80" else pytest.param(task, marks=pytest.mark.long) for task in EXPECTED]
)
def test_the_frozen_backbone_scores_what_it_is_known_to_score(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = os.environ.get("GRAPPA_SHARED")
    if not shared:
        pytest.skip("GRAPPA_SHARED is not set: the folder with data/images and backbones")
    monkeypatch.syspath_prepend(str(Path(shared) / "backbones"))
    data = Path(shared) / "data" / "images"
    make_shards([(str(data / f"{task}.csv"), str(data / f"{task}.tar"))], tmp_path, CollectionConfig(), Work())
    images = ImageShards.open([tmp_path / "test"], None)
    backbone = build_backbone(
        BackboneConfig(name="clamped_vit_tiny:create", kwargs={"image_size": 128}, image_size=128, resize="squash")
    )
    z = torch.zeros(len(images), backbone.embed_dim)
    rows = np.arange(len(images))
    for place, unit, _ in embed_rows(backbone, images, rows, device=torch.device("cpu"), how=Embedding(128, 2)):
        z[place] = torch.from_numpy(unit)
    names = [(images.labels(row) or {})["label"] for row in rows.tolist()]
    _, labels = np.unique(names, return_inverse=True)
    found = 100 * retrieval_scores(z, torch.from_numpy(labels))["r_precision"]
    assert abs(found - EXPECTED[task]) < 0.3, f"{task}: {found:.2f}"
