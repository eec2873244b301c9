from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.duplicates import DuplicatesSettings, as_json, as_text, measure_duplicates

TINY = DuplicatesSettings(rows=400, dim=64, outliers=4, threshold=0.98, threads=1, seed=0)


def test_planted_copies_are_the_groups_and_what_it_took_is_told() -> None:
    pytest.importorskip("faiss")
    logged = list[str]()
    found = measure_duplicates(TINY, logged.append)
    assert (found.planted_groups, found.found_groups, found.other_groups) == (20, 20, 0)
    assert found.outliers is None  # so few rows have no graph
    assert len(logged) == 2
    assert "all pairs were compared" in as_text({"command": "here"}, found)
    assert as_json({}, found)["peak_bytes"] > 2**20


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ValueError, match="--rows must be at least 20, got 3"):
        measure_duplicates(replace(TINY, rows=3), lambda line: None)
    with pytest.raises(ValueError, match="--outliers must be at most 20 for --rows 400"):
        measure_duplicates(replace(TINY, outliers=21), lambda line: None)
