from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_what_is_embedded_after_training_counts_as_evaluation() -> None:
    stages = [("embed", 1), ("pseudo_label", 2), ("partitions", 3), ("adapt", 4), ("fuse", 5), ("fuse", 6)]
    stages += [("embed", 7), ("evaluate", 8), ("report", 9)]
    events = [json.dumps({"name": "stage_ends", "stage": stage, "seconds": s}) for stage, s in stages]
    events.append(json.dumps({"name": "progress"}))
    expected = {"embed": 1, "pseudo_label": 5, "adapt": 4, "fuse": 11, "evaluate": 15}
    assert seconds_by_step(events) == expected


def test_the_table_has_ratios_and_both_scores() -> None:
    ours = Side({**dict.fromkeys(STEPS, 2.0), OTHER: 10.0}, {"backbone": {"a": 0.25, "b": 0.75}})
    script = Side(dict.fromkeys(STEPS, 5.0), {"backbone": {"a": 0.5, "b": 0.75}})
    found = PipelineFindings("20 images", ours, script)
    text = as_text({"command": "here"}, found)
    assert as_json({}, found)["ratio"] == {**dict.fromkeys(STEPS, 2.5), "in all": 1.25}
    assert "2.50" in text
    assert "1.25" in text
    assert text.splitlines()[-1].split()[-2:] == ["50.0", "62.5"]


def test_settings_that_both_sides_cannot_share_are_refused() -> None:
    for overrides, message in ((("clustering.num_labels=auto",), "num_labels"), (("adapt.epoch=1",), "adapt.epoch")):
        with pytest.raises(ValueError, match=message):
            measure_pipeline(PipelineSettings(Path("configs/demo.yaml"), overrides, 1), lambda line: None)
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"):
        PipelineSettings(Path("configs/demo.yaml"), (), 0).check()
