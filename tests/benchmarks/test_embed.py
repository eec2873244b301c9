from __future__ import annotations

import pytest

from benchmarks.embed import ALONE, BASELINE, OURS, EmbedSettings, as_json, as_text, measure_embed

TINY = EmbedSettings(
    shards=None, rows=10, backbone="test_vit", batch=4, threads=1, repeats=2, device="cpu", seed=0
)  # the last batch is not full


def test_all_sides_go_through_all_images_and_find_the_same_features() -> None:
    found = measure_embed(TINY, lambda line: None)
    assert list(found.timings) == [OURS, BASELINE, ALONE]
    assert all(len(timing.runs) == TINY.repeats for timing in found.timings.values())
    assert found.agreement > 0.99  # resized by Pillow there, by torch here
    assert 0 < found.of_limit < 1
    figures = as_json({}, TINY, found)
    assert figures["ratio"][BASELINE] == found.ratio(BASELINE) > 0
    assert f"{found.ratio(BASELINE):.2f}" in as_text({"command": "here"}, TINY, found)


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("batch", 0), ("repeats", 0)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, got 0"):
        EmbedSettings(**{**vars(TINY), name: value}).check()
