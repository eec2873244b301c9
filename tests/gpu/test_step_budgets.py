"""What a training step may ask of a GPU. A change that adds a wait of the host fails here; one that takes some away
lowers the number. `python -m tests.gpu.count adapt --sets 8` prints where they are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.gpu.counting import ROOT
from tests.gpu.process import PretendGpu

SPARE = 1.02  # of operations: another version of torch has a few more or less


def check(found: dict[str, Any], waits: int, copies: int, operations: int) -> None:
    """Compares the numbers of a step with its budget."""
    assert found["waits"] <= waits, found["waits_at"]
    assert found["copies"] <= copies
    assert found["operations"] <= SPARE * operations


@pytest.mark.parametrize(
    ("sets", "ranks", "budget"), [(1, 1, (11, 7, 303)), (8, 1, (33, 15, 1389)), (8, 2, (85, 32, 1458))]
)
def test_a_step_of_adaptors_asks_for_no_more_than_its_budget(
    gpu: PretendGpu, sets: int, ranks: int, budget: tuple[int, int, int]
) -> None:
    for found in gpu.run("tests.gpu.workloads:adapt_counts", ranks, sets=sets):
        check(found["quiet"], *budget)


@pytest.mark.long
def test_what_a_step_asks_for_is_printed_by_file_and_line(gpu: PretendGpu) -> None:
    command = [sys.executable, "-m", "tests.gpu.count", "adapt", "--sets", "8"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0].split(" operations")[0].isdigit()
    assert any("models/packed.py:" in line for line in said.splitlines())
