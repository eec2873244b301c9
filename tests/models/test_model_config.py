"""config.json of a model from anyone: what is odd in it is an error of one line, before anything is made of it."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from grappa_dist import load_model
from grappa_dist.cli import duplicates, embed, evaluate, export, search
from grappa_dist.models.model_config import CONFIG_FILE, is_own_backbone
from tests.cli.calling import called
from tests.test_export import exported

Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    exported(root / "run")
    shutil.copytree(root / "run" / "model", root / "copy")
    (root / "copy" / "manifest.json").unlink()  # as whoever means harm would
    return root / "copy"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def changed(folder: Path, path: Path_, value: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    *above, last = path
    place = config
    for key in above:
        place = place[key]
    place[last] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), 7, "format 7, this version reads 1 and 2"),
        (("strength",), 4.5, r"strength=4\.5: .*less than or equal to 4"),
        (("strength",), -0.5, r"strength=-0\.5: .*greater than or equal to 0"),
        (("strength",), float("nan"), "strength=nan: .*finite number"),
        (("strength",), "0.5", r"strength='0\.5': .*number"),
        (("sets",), ["k=1"] * 5000, "sets=.* at most 4096"),
        (("sets",), "k=1", "sets='k=1': .*list"),
        (("bottleneck",), 10**9, "bottleneck=1000000000: .*less than or equal to 65536"),
        (("bottleneck",), 60000, r"the model that it describes is larger than model\.safetensors .* the file has"),
        (("bottleneck",), -1, "bottleneck=-1: "),
        (("attention",), "yes", "attention='yes': .*bool"),
        (("variant",), None, "variant=None: .*string"),
        (("backbone", "kwargs"), [1], r"backbone\.kwargs=\[1\]: "),
        (("backbone", "name"), "", "backbone.name='': "),
        (
            ("backbone", "kwargs", "depth"),
            10**7,
            r"larger than model\.safetensors beside it: backbone\.kwargs has 10000000",
        ),
        (
            ("backbone", "kwargs", "depth"),
            999,
            r"larger than model\.safetensors beside it: backbone\.kwargs\.depth=999",
        ),
        (("backbone", "kwargs", "embed_dim"), 6000, r"larger than model\.safetensors beside it: .* numbers, the file"),
        (("backbone", "kwargs", "img_size"), [1e30, 32], r"backbone\.kwargs has 1e\+30"),
        (("backbone", "kwargs", "checkpoint_path"), "/etc/passwd", "has checkpoint_path, which is set here"),
        (("pixels", "image_size"), 10**6, r"pixels\.image_size=1000000: "),
        (("pixels", "std"), [0, 1, 1], r"pixels\.std\.0="),
        (("pixels", "mean"), [0.5], r"pixels\.mean="),
        (("pixels", "extra"), 1, r"pixels\.extra=1: "),
        (("galleries",), {"birds": [1.0]}, "galleries.'birds': expected 2 weights"),
        (("galleries",), {"birds": [0.0, 0.0]}, "galleries.'birds': expected 2 weights"),
        (
            ("files",),
            {"../model.safetensors": {"bytes": 1, "xxh3": None}},
            "files='../model.safetensors': expected names",
        ),
        (("files", "model.safetensors"), {"bytes": -1, "xxh3": None}, r"files\.model\.safetensors\.bytes=-1: "),
    ],
)
def test_an_odd_value_is_refused_in_one_line(folder: Path, path: Path_, value: Any, words: str) -> None:
    changed(folder, path, value)
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"format": 1}'])
def test_what_is_no_config_is_refused_with_its_path(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"^{folder / CONFIG_FILE}: "):
        load_model(folder)


def test_weights_that_are_no_safetensors_are_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"files": {}}))
    (folder / "model.safetensors").write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(ValueError, match=r"model\.safetensors: is no safetensors file: "):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "kwargs", "own"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 2}, True),
        ("grappa_dist.demo.backbone:create", {}, True),
        ("grappa_dist.demo.backbone:create", {"weights_path": "/dev/zero"}, False),
        ("grappa_dist.demo.backbone:load_file", {"filename": "/etc/passwd"}, False),
        ("grappa_dist.files:remove_folder", {"path": "/tmp"}, False),
        ("timm.models:create_model", {}, False),
        ("os:system", {"command": "true"}, False),
    ],
)
def test_only_timms_models_and_the_demos_are_built_without_a_word_of_the_caller(
    name: str, kwargs: dict[str, Any], own: bool
) -> None:
    assert is_own_backbone(name, kwargs) == own


VERBS: dict[str, Callable[[str, str], tuple[click.Command, list[str]]]] = {
    "search": lambda model, at: (search.command, ["--model", model, "--images", at, f"{at}/0.png"]),
    "evaluate": lambda model, at: (evaluate.command, ["--model", model, "--images", at]),
    "evaluate --against": lambda model, at: (
        evaluate.command,
        ["--model", "grappa_dist.demo.backbone:create", "--against", model, "--images", at],
    ),
    "duplicates": lambda model, at: (duplicates.command, ["--model", model, "--images", at]),
    "embed": lambda model, at: (embed.command, ["--model", model, "--images", at, "--out", f"{at}/out"]),
    **{
        f"export --to {to}": lambda model, at, to=to: (  # type: ignore[misc]
            export.command,
            [model, "--to", to, "--out", f"{at}/new", "--check-count", "1"],
        )
        for to in ("onnx", "torch", "safetensors", "hub-folder")
    },
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_the_module_that_a_model_from_elsewhere_names(
    verb: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "harm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    changed(folder, ("backbone",), {"name": "harm:create", "kwargs": {}})
    images = tmp_path / "images" / "class"
    images.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(images / f"{number}.png")
    command, args = VERBS[verb](str(folder), str(images if not verb.startswith("evaluate") else images.parent))
    found = called(command, *args)
    assert (found.status, found.out) == (2, "")
    assert "names the backbone harm:create: that module would be imported and run" in found.err
    assert not (tmp_path / "ran").exists()
    assert "harm" not in sys.modules
    assert not (images / "new").exists()


def test_a_config_is_left_as_it_is(made: Path) -> None:
    from grappa_dist.models.model_config import check_config

    config = json.loads((made / CONFIG_FILE).read_text())
    assert check_config(copy.deepcopy(config), made / CONFIG_FILE) == config
