from __future__ import annotations

import pytest

from benchmarks.methods import METHODS, MethodsSettings, as_json, as_text, measure_methods

TINY = MethodsSettings(
    rows=300, dim=8, num_labels=30, iterations=2, probes=(2,), sample_rows_per_cluster=4, balance=1.5, threads=1
)


def test_every_method_is_measured() -> None:
    lines: list[str] = []
    found = measure_methods(TINY, lines.append)
    text = as_text({"command": "here"}, TINY, found)
    assert len(found) == len(METHODS) + 1 == len(lines) - 1
    assert all(way.title in text for way in found)
    figures = as_json({}, TINY, found)["methods"]
    assert figures[0]["inertia_over_exact"] == 0
    assert figures[-1]["largest"] <= 15  # 1.5 times the mean size


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("num_labels", 301), ("probes", (0,)), ("balance", 0.5)])
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        MethodsSettings(**{**vars(TINY), name: value}).check()
