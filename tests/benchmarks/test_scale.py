from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.processes import DRIVER, WORKER, Use, Watched
from benchmarks.scale import STEPS, Scale, ScaleSettings, _windows, as_text, compare, config_of, write_vit
from grappa_dist.config import load
from grappa_dist.files import write_json
from grappa_dist.models.spec import build_backbone

SETTINGS = ScaleSettings(10_000, Path("runs/scale"), 2, None)


def test_the_settings_are_the_same_at_every_size_but_for_k(tmp_path: Path) -> None:
    found = dict[int, dict[str, Any]]()
    for images in (10_000, 100_000, 1_000_000):
        tree = config_of(ScaleSettings(images, tmp_path, 2, None), tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        found[images] = load(tmp_path / "config.yaml").model_dump(mode="json")
    ks = {images: tree["clustering"].pop("num_labels") for images, tree in found.items()}
    names = [tree.pop("name") for tree in found.values()]
    assert found[10_000] == found[100_000] == found[1_000_000]
    assert ks == {10_000: [128, 512, 2048, 8192], 100_000: [1024, 4096, 16384, 65536], 1_000_000: ks[100_000]}
    assert names == ["scale_10000", "scale_100000", "scale_1000000"]


def test_overrides_are_of_the_settings(tmp_path: Path) -> None:
    tree = config_of(ScaleSettings(1000, tmp_path, 2, None, ("adapt.epochs=2", "evaluate.view_queries=9")), tmp_path)
    assert (tree["adapt"]["epochs"], tree["evaluate"]["view_queries"]) == (2, 9)


def test_the_tiny_vit_is_the_backbone_of_the_settings(tmp_path: Path) -> None:
    write_vit(tmp_path / "vit.safetensors")
    first = (tmp_path / "vit.safetensors").read_bytes()
    write_vit(tmp_path / "vit.safetensors")
    assert (tmp_path / "vit.safetensors").read_bytes() == first
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of(SETTINGS, tmp_path)), encoding="utf-8")
    assert build_backbone(load(tmp_path / "config.yaml").backbone, pretrained=True).embed_dim == 64


def test_images_embedded_after_training_and_a_stage_that_was_stopped_have_their_times() -> None:
    stages = [("embed", 1, 3), ("adapt", 3, 7), ("embed", 7, 8), ("embed", 8, 9)]
    events = [{"name": "stage_begins", "stage": "embed", "t": -50.0}]  # of an earlier attempt
    for stage, begin, end in stages:
        events += [
            {"name": "stage_begins", "stage": stage, "t": begin},
            {"name": "stage_ends", "stage": stage, "t": end},
        ]
    events.append({"name": "stage_begins", "stage": "evaluate", "t": 9.5})
    windows = _windows(events, Watched(143, 0.0, [(12.0, {})]))
    assert windows == {"embed": [(1, 3)], "adapt": [(3, 7)], "embed test": [(7, 8), (8, 9)], "evaluate": [(9.5, 12.0)]}


def figures(images: int, **seconds: float) -> dict[str, Any]:
    uses = {stage: asdict(Use(s, 2 * s, {DRIVER: 2**20 * images, WORKER: 2**21})) for stage, s in seconds.items()}
    ray = dict.fromkeys(STEPS, False)
    test = min(images, 100)
    return {"images": images, "test_images": test, "uses": uses, "ray": ray, "disk": {"run": [3, 9]}, "graph": {}}


def test_a_linear_stage_has_an_exponent_of_one_and_a_flat_memory_of_none(tmp_path: Path) -> None:
    sizes = [figures(10, embed=1.0, evaluate=1.0), figures(100, embed=10.0, evaluate=100.0), figures(1000, embed=100.0)]
    for number, size in enumerate(sizes):
        write_json(tmp_path / f"{number}.json", size)
    seconds, cpu, driver, worker, _, disk = compare([tmp_path / f"{n}.json" for n in (1, 0, 2)]).split("\n\n")
    assert "| embed | 1.0 | 10.0 | 100.0 | 1.00, 1.00 |" in seconds
    assert "| evaluate | 1.0 | 100.0 | - | 2.00 |" in seconds
    assert "| embed | 200.000 | 200.000 | 200.000 | 0.00, 0.00 |" in cpu
    assert "| embed | 10 | 100 | 1000 | 1.00, 1.00 |" in driver
    assert "| embed | 2 | 2 | 2 | 0.00, 0.00 |" in worker
    assert disk.splitlines()[-1] == "| run | 3 | 9 | 3 | 9 | 3 | 9 |"
    assert "a second run starts no Ray" in as_text({"command": "here"}, sizes[0])


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "settings.json", {"images": 5000, "overrides": []})
    with pytest.raises(ValueError, match=r"holds .*5000.*not .*10000"):
        Scale(ScaleSettings(10_000, tmp_path, 2, None), lambda line: None).go()


@pytest.mark.parametrize(("name", "value", "least"), [("images", 999, "at least 1000"), ("minutes", 0.0, "above 0")])
def test_a_wrong_option_is_named(name: str, value: float, least: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be {least}"):
        ScaleSettings(**{**vars(SETTINGS), name: value}).check()  # type: ignore[arg-type]
