from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pipeline import (
    OTHER,
    STEPS,
    PipelineFindings,
    PipelineSettings,
    Side,
    as_json,
    as_text,
    measure_pipeline,
    seconds_by_step,
)
from examples.paper_in_one_file import Adaptor, Fused, PaperScript, Pictures
from grappa_dist.config import Config, load


def tiny_config() -> Config:
    small = ["clustering.num_labels=[2,3]", "clustering.iterations=2", "adapt.epochs=1", "adapt.global_batch=8"]
    small += ["adapt.learning_rate=0.1"]
    small += ["fuse.epochs=1", "fuse.global_batch=12", "fuse.projector=[8,8]", "fuse.neighbours=2"]
    return load("configs/demo.yaml", small)


def drawn_pictures(folder: Path, count: int, seed: int) -> Pictures:
    folder.mkdir()
    draws = np.random.default_rng(seed)
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        Image.fromarray(draws.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    return Pictures(files, ["a" if i % 2 else "b" for i in range(count)], [str(i % 3) for i in range(count)])


def test_the_script_trains_and_scores_every_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    pictures = drawn_pictures(tmp_path / "train", 20, 0), drawn_pictures(tmp_path / "test", 18, 1)
    script = PaperScript(tiny_config(), *pictures, threads=1, tell=lambda line: None)
    scores = script.run()
    assert list(scores) == ["backbone", "k=2", "k=3", "average", "transforms", "neighbours"]
    assert all(sorted(by_task) == ["a", "b"] for by_task in scores.values())
    assert len({tuple(by_task.values()) for by_task in scores.values()}) > 1, "training changed nothing"
    assert list(script.seconds) == list(STEPS)


def test_fused_layers_of_fresh_adaptors_are_their_block() -> None:
    block = torch.nn.Linear(6, 6)
    for attention in (False, True):
        layer = Fused(block, [Adaptor(6, 2), Adaptor(6, 2)], 6, attention=attention)
        tokens = torch.randn(3, 4, 6)
        assert torch.allclose(layer(tokens), block(tokens), atol=1e-6)


def test_what_is_embedded_after_training_counts_as_evaluation() -> None:
    stages = [("embed", 1), ("pseudo_label", 2), ("partitions", 3), ("adapt", 4), ("fuse", 5), ("fuse", 6)]
    stages += [("embed", 7), ("evaluate", 8), ("report", 9)]
    events = [json.dumps({"name": "stage_ends", "stage": stage, "seconds": s}) for stage, s in stages]
    events.append(json.dumps({"name": "progress"}))
    expected = {"embed": 1, "pseudo_label": 5, "adapt": 4, "fuse": 11, "evaluate": 15}
    assert seconds_by_step(events) == expected


def test_the_table_tells_ratios_and_both_scores() -> None:
    ours = Side({**dict.fromkeys(STEPS, 2.0), OTHER: 10.0}, {"backbone": {"a": 0.25, "b": 0.75}})
    script = Side(dict.fromkeys(STEPS, 5.0), {"backbone": {"a": 0.5, "b": 0.75}})
    found = PipelineFindings("20 images", ours, script)
    text = as_text({"command": "here"}, found)
    assert as_json({}, found)["ratio"] == {**dict.fromkeys(STEPS, 2.5), "in all": 1.25}
    assert "2.50" in text
    assert "1.25" in text
    assert text.splitlines()[-1].split()[-2:] == ["50.0", "62.5"]


def test_settings_that_both_sides_cannot_share_are_refused() -> None:
    for overrides, said in ((("clustering.num_labels=auto",), "num_labels"), (("adapt.epoch=1",), "adapt.epoch")):
        with pytest.raises(ValueError, match=said):
            measure_pipeline(PipelineSettings(Path("configs/demo.yaml"), overrides, 1), lambda line: None)
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"):
        PipelineSettings(Path("configs/demo.yaml"), (), 0).check()
