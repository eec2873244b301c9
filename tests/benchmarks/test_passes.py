from __future__ import annotations

import pytest

from benchmarks.passes import SINGLY, TOGETHER, PassesSettings, as_json, as_text, measure_passes

TINY = PassesSettings(
    shards=None,
    rows=10,
    backbone="test_vit",
    image_size=160,
    sets=1,
    fusions=1,
    bottleneck=2,
    batch=4,
    threads=1,
    repeats=1,
    device="cpu",
    seed=0,
)


def test_both_sides_embed_all_images_by_all_models_and_find_the_same_bits() -> None:
    found = measure_passes(TINY, lambda line: None)
    assert list(found.timings) == [TOGETHER, SINGLY]
    assert found.models == 4  # the backbone, the set, its average, the fusion
    assert found.same_bytes
    figures = as_json({}, TINY, found)
    assert figures["ratio"] == found.ratio > 0
    assert f"{found.ratio:.2f} times as long" in as_text({"command": "here"}, TINY, found)


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("sets", 0), ("repeats", 0)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, got 0"):
        PassesSettings(**{**vars(TINY), name: value}).check()
