from __future__ import annotations

import pytest

from benchmarks.assign import AssignSettings, as_json, as_text, measure_assign

TINY = AssignSettings(rows=400, dim=8, num_labels=20, device="cpu", threads=1, repeats=2)


def test_both_sides_are_timed_and_their_labels_compared() -> None:
    found = measure_assign(TINY, lambda line: None)
    figures = as_json({}, TINY, found)
    assert figures["same_labels_share"] > 0.95  # float32 may decide a near-tie otherwise
    assert all(len(runs) == TINY.repeats for runs in figures["seconds"].values())
    assert 0 < figures["of_limit"] < 1
    assert f"{found.ratio:.2f}" in as_text({"command": "here"}, TINY, found)


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("num_labels", 401), ("repeats", 0)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        AssignSettings(**{**vars(TINY), name: value}).check()
