from __future__ import annotations

import pytest

from benchmarks.adapt import (
    CLASS_TOKEN,
    WHOLE,
    AdaptSettings,
    LastBlockSide,
    last_block_json,
    last_block_text,
    measure_last_block,
)
from benchmarks.harness import Timing

TINY = AdaptSettings(sets=2, backbone="vit_tiny_patch16_224", image_size=64, images=2, threads=1, steps=2, repeats=1)


def test_both_sides_are_timed_and_have_the_same_gradients() -> None:
    found = measure_last_block(TINY, lambda line: None)
    assert {name: len(side.timing.runs) for name, side in found.items()} == {CLASS_TOKEN: 2, WHOLE: 2}
    numbers = last_block_json(TINY, found)
    assert numbers["gradient_difference"] < 1e-5
    assert 1.05 < numbers["activation_ratio"] < 1.15  # one of eleven blocks that keep anything


def test_a_ratio_above_one_says_that_the_class_token_alone_is_faster() -> None:
    found = {
        CLASS_TOKEN: LastBlockSide(Timing((1.0, 3.0), (2.0,)), 2**20, 1e-7),
        WHOLE: LastBlockSide(Timing((1.5, 2.0), (3.5,)), 2**21, 0.0),
    }
    assert "whole: 1.500x the class token alone (1.750x by CPU), 2.000x its activations" in last_block_text(TINY, found)


def test_a_backbone_whose_last_block_stays_whole_is_refused() -> None:
    pooled = AdaptSettings(**{**vars(TINY), "backbone": "vit_base_patch16_siglip_224", "sets": 1})
    with pytest.raises(ValueError, match="--backbone vit_base_patch16_siglip_224: the features are pooled by 'map'"):
        measure_last_block(pooled, lambda line: None)
