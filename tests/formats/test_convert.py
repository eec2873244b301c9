from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grappa_dist import load_model
from grappa_dist.artifacts import Store
from grappa_dist.export import export_model
from grappa_dist.files import Sum
from grappa_dist.formats import convert as converting
from grappa_dist.formats import exportable
from grappa_dist.formats.convert import Wanted, convert
from grappa_dist.models.model_config import CONFIG_FILE
from grappa_dist.models.spec import ModelSpec
from tests.stages import tiny as stages
from tests.test_export import exported, images
from tests.test_run_models import run

__all__ = ["run"]  # a fixture

FEW = {"check_count": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exported(tmp_path / "source")
    return tmp_path / "source"


def test_a_model_of_a_run_becomes_a_file_with_its_record(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    root, _ = run
    before = stages.files_below(root)
    lines: list[str] = []
    out = tmp_path / "new" / "average.pt2"
    found = convert(root, out, Wanted("torch", "average", **FEW), lines.append)
    assert sorted(path.name for path in out.parent.iterdir()) == ["average.pt2", "average.pt2.json"]
    record = json.loads((tmp_path / "new" / "average.pt2.json").read_text())
    assert (record["bytes"], record["xxh3"]) == (Sum.of(out).bytes, Sum.of(out).xxh3)
    assert (record["variant"], record["sets"], record["dtype"]) == ("average", ["k=4", "k=6"], "fp32")
    assert record["check"]["min_cosine"] == found.min_cosine > 0.9999
    assert record["check"]["source"] == "generated drawings and noise"
    assert record["input"]["shape"] == ["batch", 3, stages.SIZE_PX, stages.SIZE_PX]
    assert [line.split()[0] for line in lines] == ["model", "check", "torch"]
    convert(root, tmp_path / "average", Wanted("safetensors", "average", **FEW))
    given = torch.rand(3, 3, stages.SIZE_PX, stages.SIZE_PX)
    right = load_model(tmp_path / "average", trust_modules=True)(given)
    torch.testing.assert_close(exportable.read(out)(given), right, rtol=1e-5, atol=1e-6)
    assert {path: when for path, when in stages.files_below(root).items() if path in before} == before


@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1.1), ("fp16", 0.7), ("bf16", 0.7)])
def test_a_folder_in_another_type_is_what_load_model_reads(
    dtype: str, share: float, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(folder, out, Wanted("safetensors", dtype=dtype, **FEW))  # type: ignore[arg-type]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "export.json", "model.safetensors"]
    model = load_model(out)
    cosines = torch.cosine_similarity(model(images(4)), load_model(folder)(images(4)))
    assert cosines.min() > (0.999999 if dtype == "fp32" else 0.999)
    size = (folder / "model" / "model.safetensors").stat().st_size
    assert (out / "model.safetensors").stat().st_size < share * size
    kinds = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert kinds == {{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}


@pytest.mark.parametrize("to", ["torch", "safetensors", "hub-folder"])
def test_what_differs_from_the_model_is_refused_and_leaves_nothing(
    to: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(read: Callable[..., Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., object]:
        def opened(*args: object, **kwargs: object) -> Callable[[torch.Tensor], torch.Tensor]:
            exact = read(*args, **kwargs)
            return lambda batch: torch.nn.functional.normalize(exact(batch) + 0.07, dim=1)

        return opened

    monkeypatch.setattr(exportable, "read", off(exportable.read))
    loads = iter([load_model, off(load_model)])
    monkeypatch.setattr(converting, "load_model", lambda *args, **kwargs: next(loads)(*args, **kwargs))  # type: ignore[operator]
    with pytest.raises(ValueError, match="the exported model differs from the model: on image 1 of generated"):
        convert(folder, tmp_path / "out", Wanted(to, **FEW))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_gallery_model_is_written_with_the_weights_of_the_gallery_that_is_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "model" / CONFIG_FILE).read_text())
    shutil.copytree(folder / "model", tmp_path / "model")
    config |= {"variant": "gallery", "galleries": {"birds": [0.1, 0.9]}}
    (tmp_path / "model" / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / "model" / "manifest.json").unlink()
    lines: list[str] = []
    for number, gallery in enumerate(["birds", None]):
        out = tmp_path / f"{number}.pt2"
        convert(tmp_path / "model", out, Wanted("torch", gallery=gallery, **FEW), lines.append)
        model = load_model(tmp_path / "model")
        if gallery:
            model.weigh(model.galleries[gallery])
        torch.testing.assert_close(exportable.read(out)(images(2)), model(images(2)), rtol=1e-5, atol=1e-6)
    assert len([line for line in lines if line.startswith("warning: the model weighs its sets by galleries")]) == 1
    with pytest.raises(ValueError, match=r"has no weights for the gallery 'fish'; it has birds$"):
        convert(tmp_path / "model", tmp_path / "x.pt2", Wanted("torch", gallery="fish"))
    with pytest.raises(ValueError, match="--gallery-weights birds: is for onnx and torch; a folder has those of all"):
        convert(tmp_path / "model", tmp_path / "x", Wanted("safetensors", gallery="birds"))


def test_what_is_there_stays_and_a_wrong_name_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt2.json").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    for out, to in (("a.pt2", "torch"), ("full", "hub-folder")):
        with pytest.raises(ValueError, match=r"is there already; expected a name that is free"):
            convert(folder, tmp_path / out, Wanted(to))  # type: ignore[arg-type]
    (tmp_path / "b.pt2.json").write_text('{"file": "b.pt2"}')  # left by a kill, which kept the file away
    with pytest.raises(ValueError, match="is the folder of one model, neighbours; --name average is of a run"):
        convert(folder / "model", tmp_path / "b.pt2", Wanted("torch", "average"))
    (tmp_path / "b.pt2.json").unlink()
    with pytest.raises(ValueError, match="is the folder of one model, neighbours; --name average is of a run"):
        convert(folder / "model", tmp_path / "out", Wanted("torch", "average"))
    with pytest.raises(ValueError, match="holds no model: expected config"):
        convert(tmp_path, tmp_path / "out", Wanted("torch"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt2.json", "full", "source"]


def test_a_model_from_elsewhere_that_names_a_module_is_not_converted_unless_its_caller_says_so(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    root, specs = run
    store = Store(tmp_path / "made")
    artifact = store.artifact("models/average", {}, {})
    export_model(specs["average"], artifact)
    shutil.copytree(artifact.path, tmp_path / "downloaded")
    shutil.copytree(root, tmp_path / "copied", symlinks=True)
    for source, name in ((tmp_path / "downloaded", None), (tmp_path / "copied", "average")):
        with pytest.raises(
            ValueError, match=r"names the backbone tests\.models\.tiny:create: that module would be imported"
        ):
            convert(source, tmp_path / "out", Wanted("safetensors", name, **FEW))
        assert not (tmp_path / "out").exists()
    convert(tmp_path / "downloaded", tmp_path / "out", Wanted("safetensors", trust_modules=True, **FEW))
    assert (tmp_path / "out" / "model.safetensors").exists()
