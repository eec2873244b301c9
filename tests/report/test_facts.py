"""What the report says of a run: dates, machines, code and commands, as the events of all attempts tell them."""

from __future__ import annotations

from typing import Any

from grappa_dist.report.facts import MOST_DIFFERENT, describe_nodes, origin_facts

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


def origin(**changes: Any) -> dict[str, Any]:
    known = {
        "machine": "AMD EPYC, 2 cores",
        "code": "grappa-dist 0.1.0, commit 0123456789ab",
        "command": "grappa-dist run",
    }
    return {"t": NOON, "name": "origin", "versions": {"Python": "3.11.7", "torch": "2.13.0"}, **known, **changes}


def test_one_attempt_has_a_line_for_each_fact() -> None:
    nodes = [{"machine": "AMD EPYC, 2 cores", "nodes": 1, "workers": 2}]
    events = [
        {"t": NOON, "name": "run_begins"},
        origin(),
        {"t": NOON, "name": "workers", "nodes": nodes},
        {"t": NOON, "name": "stage_ends", "stage": "embed", "seconds": 61.0},
        {"t": NOON, "name": "stage_ends", "stage": "embed", "seconds": 61.0},
    ]
    assert origin_facts(events, NOON + 3600) == {
        "report written": "2023-11-14 23:13 UTC",
        "run began": "2023-11-14 22:13 UTC",
        "command": "grappa-dist run",
        "machine of the driver": "AMD EPYC, 2 cores",
        "workers": "2 workers on 1 node, AMD EPYC, 2 cores",
        "code": "grappa-dist 0.1.0, commit 0123456789ab",
        "versions": "Python 3.11.7, torch 2.13.0",
        "time by stage (all attempts)": "embed 2m02s",
    }


def test_attempts_that_differ_are_all_named_up_to_a_bound() -> None:
    begun = [{"t": NOON + i, "name": "run_begins"} for i in range(9)]
    facts = origin_facts([*begun, *(origin(machine=f"machine {i}") for i in range(9))], NOON)
    assert facts["run began"].endswith(", the first of 9 starts")
    assert facts["code"] == origin()["code"]
    assert facts["machine of the driver"].startswith(
        "machine 8; earlier attempts: machine 7; machine 6; machine 5 (and "
    )
    assert f"{9 - MOST_DIFFERENT} more" in facts["machine of the driver"]


def test_a_run_from_python_and_one_of_an_older_version_are_told_as_far_as_known() -> None:
    assert origin_facts([origin(command="")], NOON)["command"] == "called from Python"
    assert origin_facts([], NOON) == {"report written": "2023-11-14 22:13 UTC"}


def test_nodes_that_are_alike_are_told_together() -> None:
    nodes = [
        {"machine": "AMD EPYC, 16 cores, NVIDIA H200", "nodes": 2, "workers": 16},
        {"machine": "", "nodes": 1, "workers": 1},
    ]
    assert describe_nodes(nodes) == (
        "16 workers on 2 nodes, each AMD EPYC, 16 cores, NVIDIA H200 and 1 worker on 1 node"
    )
    many = [{"machine": f"m{i}", "nodes": 1, "workers": 1} for i in range(100)]
    assert describe_nodes(many).endswith(f" and {100 - MOST_DIFFERENT} other nodes")
