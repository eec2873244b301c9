from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.formats.exportable import METADATA, Exportable, read, trace, write
from tests.formats.models import model

ALONE = """
import sys
sys.modules.update(dict.fromkeys(["grappa_dist", "timm", "torchvision", "safetensors", "PIL"]))  # as if not installed
import json, numpy, torch
about = {"grappa_dist.json": ""}
graph = torch.export.load("model.pt2", extra_files=about).module()
print(json.loads(about["grappa_dist.json"])["dtype"])
for count in (1, 3, 17):
    images = torch.from_numpy(numpy.load("images.npy")[:count])
    numpy.save(f"{count}.npy", graph(images)[0].detach().numpy())
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write(trace(Exportable(model()), "tiny"), tmp_path / "model.pt2", {"dtype": "fp32"})
    return tmp_path


def test_the_file_holds_the_graph_its_metadata_no_pickle_and_no_path_of_this_machine(written: Path) -> None:
    with zipfile.ZipFile(written / "model.pt2") as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert json.loads(members[f"extra/{METADATA}"]) == {"dtype": "fp32"}
    assert members["data/sample_inputs/model.pt"] == b""
    configs = [json.loads(data)["config"] for name, data in members.items() if name.endswith("_config.json")]
    assert {tensor["use_pickle"] for config in configs for tensor in config.values()} == {False}
    assert not [name for name, data in members.items() if b".py" in data or str(written).encode() in data]
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(read(written / "model.pt2")(images), model()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_torch_alone_loads_it_and_runs_batches_of_any_size(written: Path) -> None:
    images = np.random.default_rng(0).random((17, 3, 32, 32), dtype=np.float32)
    np.save(written / "images.npy", images)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=written, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "fp32\n"), done.stderr
    for count in (1, 3, 17):
        right = model()(torch.from_numpy(images[:count])).numpy()
        np.testing.assert_allclose(np.load(written / f"{count}.npy"), right, rtol=1e-5, atol=1e-6)
