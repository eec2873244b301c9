from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.knn import ALONE, APPROXIMATE, EXACT, SEVERAL, EpochCost, KnnSettings, as_json, as_text, measure_knn

TINY = KnnSettings(rows=400, dim=16, neighbours=(3, 30), approximate=True, recall_floor=0.8, threads=1, repeats=1)


def test_every_side_is_measured_on_the_same_rows() -> None:
    lines: list[str] = []
    findings = measure_knn(TINY, lines.append)
    text, numbers = as_text({"command": "here"}, findings), as_json({}, findings)
    assert [found["neighbours"] for found in numbers["knn"]] == [3, 30]
    for found in numbers["knn"]:
        sides = {side["name"]: side for side in found["sides"]}
        assert set(sides) == {EXACT, APPROXIMATE, "faiss.knn", "faiss.IndexFlatIP"}
        assert all(name in text for name in sides)
        assert sides[EXACT]["found_share"] == sides["faiss.knn"]["found_share"] == 1.0
        assert 0.7 < sides[APPROXIMATE]["found_share"] <= 1.0
        assert found["recall"]["recall"] >= 0.8
    assert len(lines) == 1 + 2 * 4


@pytest.mark.long
def test_several_workers_are_held_against_one_and_against_every_baseline_on_as_many_threads() -> None:
    findings = measure_knn(replace(TINY, neighbours=(3,), approximate=False, workers=2), lambda text: None)
    text, numbers = as_text({}, findings), as_json({}, findings)
    assert set(numbers["scaling"]) == {ALONE, SEVERAL, "faiss.knn", "faiss.IndexFlatIP"}
    several = findings.scaling[SEVERAL].seconds
    for name in (ALONE, "faiss.knn", "faiss.IndexFlatIP"):
        seconds = findings.scaling[name].seconds
        assert f"{name} of 2 threads {seconds:.3f} s: {seconds / several:.2f}x" in text


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 1), ("neighbours", (0,)), ("recall_floor", 1.0), ("threads", 0), ("workers", 0)]
)
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        replace(TINY, **{name: value}).check()  # type: ignore[arg-type]


def test_the_share_of_embedding_depends_on_whether_a_step_goes_forward_twice() -> None:
    forward, backward = 0.1, 0.092
    cost = EpochCost(forward, 2 * (2 * forward + backward), 2 * (forward + backward))
    assert cost.shares(1e30) == pytest.approx((0, 1 / 6.84))
    assert cost.shares(1e30, accumulates=False) == pytest.approx((0, 1 / 4.84))
    search, both = cost.shares(10**6, num=10**6, accumulates=False)
    assert (search, both) == pytest.approx((0.5 / 0.984, 0.6 / 0.984))
