from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.data.decoding import decode
from grappa_dist.data.shards import ImageShards
from grappa_dist.embedding import embed_images
from grappa_dist.export import load_model
from tests.stages import tiny
from tests.test_export import exported

ROOT = Path(__file__).parents[1]


def test_embeddings_are_those_of_the_exported_model_with_the_images_keys(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    paths = tiny.write_shards(tmp_path / "images")
    command = [sys.executable, "launch/embed.py", "--model", str(tmp_path / "run"), "--images", *paths]
    command += ["--out", str(tmp_path / "out"), "resources.num_cpus=1", "embed.batch_size=8", "data.max_bad_share=0.1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    images = ImageShards.open(paths, tmp_path / "index")
    assert said["images"] == len(images)
    rows = np.concatenate([np.load(tmp_path / "out" / shard["rows"]) for shard in said["shards"]])
    keys = [key for shard in said["shards"] for key in json.loads((tmp_path / "out" / shard["keys"]).read_text())]
    assert keys == [images.key(row) for row in range(len(images))]
    good = [row for row in range(len(images)) if row != tiny.BAD]
    model = load_model(tmp_path / "run")
    expected = model(torch.stack([model.transform(decode(images.image_bytes(row))) for row in good]))
    torch.testing.assert_close(torch.from_numpy(rows[good]), expected, atol=1e-5, rtol=0)
    assert not rows[tiny.BAD].any()
    (reasons,) = (json.loads((tmp_path / "out" / s["bad"]).read_text()) for s in said["shards"][2:3])
    assert list(reasons) == [str(tiny.BAD - sum(tiny.SIZES[:2]))]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        embed_images(tmp_path, ["nowhere"], tmp_path / "out")
