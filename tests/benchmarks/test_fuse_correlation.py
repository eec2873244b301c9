from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fuse import (
    PLAIN,
    ROWS,
    WHOLE,
    CorrelationSettings,
    correlation_json,
    correlation_text,
    measure_correlation,
)

TINY = CorrelationSettings(ranks=2, width=40, pairs=5, repeats=2)


@pytest.mark.long
def test_all_ways_are_measured_on_the_same_pairs() -> None:
    found = measure_correlation(TINY)
    assert [side.name for side in found] == [ROWS, WHOLE, PLAIN]
    assert all(len(side.timing.runs) == len(side.timing.cpu_runs) == 2 for side in found)
    assert [side.loss for side in found] == pytest.approx([found[0].loss] * 3, rel=1e-5)
    text, numbers = correlation_text(TINY, found), correlation_json(TINY, found)
    assert all(side.name in text for side in found)
    sent = {side["name"]: side["sent_bytes"] for side in numbers["sides"]}
    assert sent == {ROWS: 4 * 1.5 * 5 * 40, WHOLE: 4 * 40**2, PLAIN: 8 * 40**2}


@pytest.mark.parametrize(("name", "value"), [("ranks", 1), ("width", 0), ("pairs", 1)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be at least"):
        replace(TINY, **{name: value}).check()
