"""What a step or a block may ask of a GPU. A change that adds a wait of the host fails here; one that takes some away
lowers the number. `python -m tests.gpu.count adapt --sets 8` prints where they are. The ViT has two blocks here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.gpu.counting import ROOT
from tests.gpu.process import PretendGpu

SPARE = 1.03  # of operations: another version of torch has a few more or less

Budget = tuple[int, int, int]  # waits, copies, operations


def check(found: dict[str, Any], budget: Budget) -> None:
    """Compares the numbers of a step with its budget."""
    waits, copies, operations = budget
    assert found["waits"] <= waits, found["waits_at"]
    assert found["copies"] <= copies
    assert found["operations"] <= SPARE * operations


@pytest.mark.parametrize(
    ("sets", "ranks", "budget"),
    [(1, 1, (0, 3, 273)), (8, 1, (0, 3, 1261)), pytest.param(8, 2, (0, 3, 1343), marks=pytest.mark.slow)],
)
def test_a_step_of_adaptors_asks_for_no_more_than_its_budget(
    gpu: PretendGpu, sets: int, ranks: int, budget: Budget
) -> None:
    for found in gpu.run("tests.gpu.workloads:adapt_counts", ranks, sets=sets):
        check(found["quiet"], budget)


@pytest.mark.parametrize(("ranks", "budget"), [(1, (0, 2, 565)), pytest.param(2, (0, 2, 576), marks=pytest.mark.slow)])
def test_a_step_of_the_fusion_asks_for_no_more_than_its_budget(gpu: PretendGpu, ranks: int, budget: Budget) -> None:
    for found in gpu.run("tests.gpu.workloads:fuse_counts", ranks, sets=2):
        check(found["quiet"], budget)


@pytest.mark.parametrize(("ranks", "budget"), [(1, (0, 3, 400)), pytest.param(2, (0, 3, 408), marks=pytest.mark.slow)])
def test_a_step_of_the_supervised_fusion_asks_for_no_more_than_its_budget(
    gpu: PretendGpu, ranks: int, budget: Budget
) -> None:
    for found in gpu.run("tests.gpu.workloads:supervised_counts", ranks, sets=2):
        check(found["quiet"], budget)


def test_a_batch_that_is_embedded_asks_for_no_more_than_its_budget(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.workloads:embed_counts", sets=2)
    check(found["quiet"], (1, 4, 70))  # copies: two of them of batches ahead, where reading catches up


@pytest.mark.parametrize(
    ("kernel", "held_bytes", "budget"),
    [(True, None, (16, 12, 270)), (False, None, (13, 10, 133)), (True, 0, (16, 14, 274)), (False, 0, (13, 12, 133))],
)
def test_a_pass_of_k_means_over_two_blocks_asks_for_no_more_than_its_budget(
    gpu: PretendGpu, kernel: bool, held_bytes: int | None, budget: Budget
) -> None:
    """Blocks that come from pinned memory cost a copy each, and no wait."""
    (found,) = gpu.run("tests.gpu.rows:kmeans_counts", kernel=kernel, held_bytes=held_bytes)
    check(found["pass"], budget)


@pytest.mark.parametrize(
    ("name", "part", "budget"),
    [
        ("hierarchical", "fine", (33, 45, 1060)),  # of 8 blocks; two waits of each, while another is under way
        pytest.param("approximate", "refined", (111, 86, 2107), marks=pytest.mark.slow),  # most are the lists', once
        ("balanced", "end", (14, 15, 88)),  # of two blocks
    ],
)
def test_a_part_of_a_method_of_clustering_asks_for_no_more_than_its_budget(
    gpu: PretendGpu, name: str, part: str, budget: Budget
) -> None:
    (found,) = gpu.run("tests.gpu.rows:part_counts", name=name, part=part)
    check(found["part"], budget)


def test_the_k_nn_graph_of_two_blocks_asks_for_no_more_than_its_budget(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.rows:knn_counts")
    check(found["graph"], (6, 10, 232))  # four of the copies are counts of a few bytes


@pytest.mark.parametrize(
    ("classes", "second", "whole"),
    [
        (60, (11, 3, 294), (47, 173, 1734)),  # two blocks and four tiles; nearly all copies are of the classes' places
        (300, (6, 0, 192), (33, 129, 1048)),  # small classes alone: the two blocks meet each other
    ],
)
def test_scores_of_a_task_ask_for_no_more_than_their_budget(
    gpu: PretendGpu, classes: int, second: Budget, whole: Budget
) -> None:
    (found,) = gpu.run("tests.gpu.rows:scores_counts", classes=classes)
    check(found["second"], second)
    check(found["whole"], whole)


@pytest.mark.slow
def test_the_evaluation_of_a_model_asks_for_no_more_than_its_budget(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.stages:evaluate_counts")
    check(found["model"], (21, 34, 388))  # of two tasks, with its figures without labels


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("embed", {"sets": 2, "image_size": 48}),
        pytest.param("adapt", {"sets": 2, "image_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_depends_on_no_products_values_and_operations_on_no_size(
    gpu: PretendGpu, name: str, given: dict[str, Any]
) -> None:
    def figures(*, products: bool, **given: Any) -> dict[str, Any]:
        (found,) = gpu.run(f"tests.gpu.workloads:{name}_counts", products=products, **given)
        return {key: found["quiet"][key] for key in ("operations", "waits", "flops", "bytes_moved", "limit_s")}

    computed, zeros = (figures(products=products, **given) for products in (True, False))
    smaller = figures(products=False, **{**given, "image_size": 16})
    assert zeros == computed
    assert (smaller["operations"], smaller["waits"]) == (zeros["operations"], zeros["waits"])
    assert 0 < smaller["flops"] < zeros["flops"]


@pytest.mark.long
def test_what_a_step_asks_for_is_printed_by_file_and_line(gpu: PretendGpu) -> None:
    command = [sys.executable, "-m", "tests.gpu.count", "adapt", "--sets", "8"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0].split(" operations")[0].isdigit()
    assert any("models/packed.py:" in line for line in said.splitlines())
