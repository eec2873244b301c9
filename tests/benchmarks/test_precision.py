from __future__ import annotations

import pytest

from benchmarks.precision import FORWARD, STEP, PrecisionSettings, as_json, as_text, measure_precision

TINY = PrecisionSettings(backbone="test_vit", image_size=160, images=2, threads=1, repeats=1)


def test_work_and_operators_are_timed_in_both_and_features_and_gradients_compared() -> None:
    found = measure_precision(TINY, lambda line: None)
    assert {FORWARD, STEP, "attention, backward", "GELU, forward"} <= found.keys()
    assert all(set(one.timings) == {"fp32", "bf16"} for one in found.values())
    assert all(0.99 < (found[name].cosine or 0) < 1.001 for name in (FORWARD, STEP))
    assert found["attention, backward"].cosine is None
    text = as_text({"command": "here"}, TINY, found)
    assert f"{found[STEP].ratio:.2f}" in text
    assert as_json({}, TINY, found)["work"][FORWARD]["ratio"] == found[FORWARD].ratio > 0


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="--images must be at least 1, got 0"):
        PrecisionSettings(**{**vars(TINY), "images": 0}).check()
