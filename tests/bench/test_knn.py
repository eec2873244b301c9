from __future__ import annotations

from dataclasses import replace

import pytest

from grappa_dist.bench.knn import APPROXIMATE, EXACT, KnnSettings, as_json, as_text, measure_knn

TINY = KnnSettings(rows=400, dim=16, neighbours=(3, 30), approximate=True, recall_floor=0.8, threads=1, repeats=1)


def test_every_side_is_measured_on_the_same_rows() -> None:
    told: list[str] = []
    findings = measure_knn(TINY, told.append)
    text, numbers = as_text({"command": "here"}, findings), as_json({}, findings)
    assert [found["neighbours"] for found in numbers["knn"]] == [3, 30]
    for found in numbers["knn"]:
        sides = {side["name"]: side for side in found["sides"]}
        assert set(sides) == {EXACT, APPROXIMATE, "faiss.knn", "faiss.IndexFlatIP"}
        assert all(name in text for name in sides)
        assert sides[EXACT]["found_share"] == sides["faiss.knn"]["found_share"] == 1.0
        assert 0.7 < sides[APPROXIMATE]["found_share"] <= 1.0
        assert found["recall"]["recall"] >= 0.8
    assert len(told) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 1), ("neighbours", (0,)), ("recall_floor", 1.0), ("threads", 0), ("workers", 0)]
)
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        replace(TINY, **{name: value}).check()  # type: ignore[arg-type]
