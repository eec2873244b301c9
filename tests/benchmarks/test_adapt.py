from __future__ import annotations

import pytest

from benchmarks.adapt import ALONE, PACKED, AdaptSettings, measure_packing, packing_json, packing_text
from benchmarks.harness import Timing

TINY = AdaptSettings(sets=2, backbone="vit_tiny_patch16_224", image_size=32, images=4, threads=1, steps=1, repeats=2)


@pytest.mark.long
def test_both_sides_are_timed_and_compared_by_their_fastest_runs() -> None:
    found = measure_packing(TINY, lambda line: None)
    assert {name: len(timing.runs) for name, timing in found.items()} == {PACKED: 2, ALONE: 2}
    assert all(seconds > 0 for timing in found.values() for seconds in (*timing.runs, *timing.cpu_runs))
    assert packing_json(TINY, found)["ratio"] == min(found[ALONE].runs) / min(found[PACKED].runs)


def test_a_ratio_above_one_says_that_packing_is_faster() -> None:
    found = {PACKED: Timing((1.0, 3.0), (2.0, 6.0)), ALONE: Timing((2.0, 9.0), (5.0, 9.0))}
    assert "packed: 2.00x one after the other (2.50x by CPU)" in packing_text(TINY, found)


def test_what_cannot_be_measured_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match="--image-size must be at least 1, got 0"):
        AdaptSettings(2, "vit_tiny_patch16_224", 0, 4, 1, 1, 1).check()
