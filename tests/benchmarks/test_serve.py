from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks.serve import BASELINE, OURS, Load, ServeSettings, as_json, as_text, measure_serve

TINY = ServeSettings("grappa_dist.demo.backbone:create", rows=24, clients=8, requests=40, batch=8, seed=0)


@pytest.mark.long
def test_every_request_of_every_client_is_answered() -> None:
    found = measure_serve(TINY, lambda line: None)
    assert list(found.loads) == [OURS, BASELINE]
    for load in found.loads.values():
        assert (len(load.latencies_s), load.errors) == (TINY.requests, {})
    assert "one at a time" in as_text({"command": "here"}, TINY, found)
    assert as_json({}, TINY, found)["loads"][OURS]["errors"] == {}


def test_latencies_are_those_of_answers_and_errors_are_counted_by_kind() -> None:
    load = Load(2.0, (0.1, 0.2, 0.3), {"503": 2, "ServerDisconnectedError": 1}, 2**20)
    assert (load.per_s, load.percentile(50), load.percentile(100), load.failed) == (1.5, 0.2, 0.3, 3)
    assert Load(1.0, (), {"503": 1}, 0).percentile(99) == float("inf")


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("clients", 0), ("requests", 0), ("batch", 0)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, got 0"):
        replace(TINY, **{name: value}).check()


@pytest.mark.parametrize(("program", "said"), [("/bin/false", "without a word"), ("/bin/ls", "Try ")])
def test_a_server_that_does_not_start_is_an_error_with_its_last_line(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(ValueError, match=f"^--model {TINY.model}: the server ended: {said}"):
        measure_serve(replace(TINY, rows=1), lambda line: None)
