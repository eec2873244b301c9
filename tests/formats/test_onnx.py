from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.extras import MissingPackage
from grappa_dist.formats.exportable import Exportable, trace
from grappa_dist.formats.onnx import MOST_BYTES, OPSET, check_possible, read, write
from tests.formats.models import model

ALONE = """
import sys
sys.modules.update(dict.fromkeys(["grappa_dist", "timm", "torch", "torchvision", "onnx", "onnxscript", "PIL"]))
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
print(session.get_modelmeta().custom_metadata_map["dtype"])
print(session.get_inputs()[0].shape, [output.shape for output in session.get_outputs()])
for count in (1, 3, 17):
    images = numpy.load("images.npy")[:count]
    embeddings, weights = session.run(["embeddings", "weights"], {"images": images})
    numpy.save(f"{count}.npy", embeddings)
"""


def test_a_model_that_does_not_fit_into_a_file_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    check_possible(MOST_BYTES, "m.onnx")
    with pytest.raises(
        ValueError, match=r"^m\.onnx: the weights have 4\.0 GB .*; expected --dtype fp16, or --to torch$"
    ):
        check_possible(4 * 10**9, "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackage, match=r"m\.onnx: needs onnxscript, .*'grappa-dist\[onnx\]'"):
        check_possible(1, "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_onnxruntime_and_numpy_alone_run_it_in_batches_of_any_size(dtype: str, tmp_path: Path) -> None:
    exportable = Exportable(model(), dtype, computes="fp32")  # type: ignore[arg-type]
    about = {"dtype": dtype, "outputs": [{"name": "embeddings"}, {"name": "weights"}]}
    write(trace(exportable, "tiny"), tmp_path / "model.onnx", about, narrow=dtype == "bf16")
    data = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in data
    assert str(Path.home()).encode() not in data
    images = np.random.default_rng(0).random((17, 3, 32, 32), dtype=np.float32)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    shapes = "['batch', 3, 32, 32] [['batch', 24], ['batch', 2, 2]]"
    assert (done.returncode, done.stdout) == (0, f"{dtype}\n{shapes}\n"), done.stderr
    for count in (1, 3, 17):
        right = exportable(torch.from_numpy(images[:count]))[0].numpy()
        np.testing.assert_allclose(np.load(tmp_path / f"{count}.npy"), right, rtol=1e-4, atol=1e-5)
    import onnx

    loaded = onnx.load(tmp_path / "model.onnx")
    assert [found.version for found in loaded.opset_import if found.domain in ("", "ai.onnx")] == [OPSET]
    assert (
        json.loads(next(entry.value for entry in loaded.metadata_props if entry.key == "outputs")) == about["outputs"]
    )
    kinds = {tensor.data_type for tensor in loaded.graph.initializer if np.prod(tensor.dims) > 1000}
    assert kinds == {onnx.TensorProto.BFLOAT16 if dtype == "bf16" else onnx.TensorProto.FLOAT}


@pytest.mark.long
def test_half_precision_is_computed_in_it_and_what_is_no_model_is_named(tmp_path: Path) -> None:
    exportable = Exportable(model(variant="average"), "fp16")
    write(trace(exportable, "tiny"), tmp_path / "m.onnx", {"outputs": [{"name": "embeddings"}]})
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(read(tmp_path / "m.onnx")(images), model(variant="average")(images), rtol=0, atol=5e-3)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"^m\.onnx: onnxruntime cannot run it: "):
        read(tmp_path / "m.onnx")
