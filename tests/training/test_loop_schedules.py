from __future__ import annotations

import math

import pytest

from grappa_dist.training.loop import cosine


def test_cosine_falls_from_one_over_a_half_to_zero() -> None:
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10) == 0
    assert cosine(0, 1) == 1
    assert cosine(3, 10) == pytest.approx((1 + math.cos(0.3 * math.pi)) / 2)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (7, 6), (100, 10)])
def test_cosine_climbs_during_warmup_then_falls_and_wastes_no_step(total: int, warmup: int) -> None:
    factors = [cosine(step, total, warmup) for step in range(total + 1)]
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert factors[-1] == 0
    assert factors[warmup] == 1
    assert factors[: warmup + 1] == sorted(set(factors[: warmup + 1]))
    assert factors[warmup:] == sorted(set(factors[warmup:]), reverse=True)


def test_warmup_is_a_straight_line() -> None:
    assert [cosine(step, 20, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("step", "total", "warmup"), [(-1, 5, 0), (6, 5, 0), (0, 0, 0), (0, 5, 5), (0, 5, -1)])
def test_steps_outside_the_schedule_are_refused(step: int, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="cosine"):
        cosine(step, total, warmup)
