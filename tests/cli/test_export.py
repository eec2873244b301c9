"""`grappa-dist export` lists the models of a run and writes one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist import load_model
from grappa_dist.cli.export import command
from grappa_dist.models.spec import note_module
from grappa_dist.stages.run import CONFIG_FILE
from tests.cli.calling import called
from tests.stages import tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has trained nothing."""
    shards = tiny.write_shards(tmp_path / "images", sizes=(9, 4), bad=())
    root = tmp_path / "run"
    root.mkdir()
    settings = tiny.config(shards)
    (root / CONFIG_FILE).write_text(settings.absolute(root).yaml())
    note_module(root / "index", settings.backbone)
    return root


def test_the_models_are_listed_and_one_of_them_becomes_a_folder(run: Path, tmp_path: Path) -> None:
    assert called(command, str(run)) == (0, "backbone\n", "")
    found = called(command, str(run), "--name", "backbone", "--out", str(tmp_path / "model"))
    assert found == (0, f"model   {tmp_path / 'model'}\n", "")
    assert load_model(tmp_path / "model", trust_modules=True).sets == []


def test_with_to_a_model_of_the_run_is_written_in_that_format(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    wanted = ["--name", "backbone", "--to", "safetensors", "--dtype", "bf16", "--check-count", "3"]
    found = called(command, str(run), *wanted, "--out", str(out))
    assert (found.status, found.err) == (0, "")
    model, check, folder = found.out.splitlines()
    assert model.startswith("model   backbone, 0 adaptor sets, ")
    assert "on 3 images (generated drawings and noise); needs 0.999" in check
    assert folder.startswith(f"folder  {out}  (")
    assert load_model(out, trust_modules=True).sets == []


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--dtype", "fp16"], "error: --dtype goes with --to"),
        (["--check-count", "3"], "error: --check-count goes with --to"),
        (["--to", "onnx"], "error: --to onnx needs --out, the file to write"),
        (["--to", "onyx", "--out", "m"], "did you mean 'onnx'?"),
        (["--to", "torch", "--out", "m.pt2"], "holds no model: expected config.json"),
        (["--strength", "0.5"], "error: --strength goes with --name and --out, or with --to"),
        (["--strength", "half"], "'half' is not a valid float"),
        (
            ["--name", "backbone", "--out", "model", "--strength", "0.5"],
            "strength=0.5: the model is the backbone alone",
        ),
        (["--name", "backbone"], "error: --name and --out go together, unless there is --to"),
        (["--name", "bakbone", "--out", "model"], "has no model 'bakbone'; it has backbone; did you mean 'backbone'?"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(args: list[str], line: str, run: Path) -> None:
    found = called(command, str(run), *args)
    assert (found.status, found.out) == (2, "")
    assert line in found.err
