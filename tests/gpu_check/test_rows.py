"""Rows that are the same on every machine, and digests of what a CPU makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.files import read_json
from grappa_dist.gpu_check import rows
from grappa_dist.gpu_check.checks import Found, Machine
from grappa_dist.gpu_check.inputs import digest, only_rank, unit_rows
from grappa_dist.search.fixed_point import to_grid


def machine(folder: Path) -> Machine:
    return Machine(torch.device("cpu"), True, folder)


def test_rows_are_unit_rows_on_the_grid_with_copies_in_every_block() -> None:
    x = unit_rows(1000, 24, 7, seed=3)
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-6)
    assert torch.equal(to_grid(torch.from_numpy(x)), torch.from_numpy(x))
    assert (x[63::64] == x[:937:64]).all()
    assert len(np.unique(x, axis=0)) == 1000 - 15
    assert digest(x) == digest(unit_rows(1000, 24, 7, seed=3)) != digest(unit_rows(1000, 24, 7, seed=4))


def test_the_rows_and_the_results_of_a_cpu_are_those_stored(tmp_path: Path) -> None:
    for check in (rows.kmeans, rows.knn):
        found = check(machine(tmp_path))
        assert found.wrong == ""


@pytest.mark.long
@pytest.mark.parametrize("check", [rows.kmeans, rows.knn])
def test_what_a_gpu_is_compared_with_is_what_this_cpu_gives(
    two_threads: None, tmp_path: Path, check: Callable[[Machine], Found]
) -> None:
    assert check(Machine(torch.device("cpu"), False, tmp_path)).wrong == ""


def test_results_with_other_bits_are_wrong_and_other_rows_are_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_json(rows.DIGESTS)
    stored["knn"]["tiny"]["digests"]["k=5"] = "0"
    stored["kmeans"]["tiny"]["digests"]["rows"] = "0"
    monkeypatch.setattr(rows, "read_json", lambda path: stored)
    assert rows.knn(machine(tmp_path)).wrong == "other bits for k=5"
    assert rows.kmeans(machine(tmp_path)).wrong.startswith("the rows themselves are not those of the CPU")
    stored["knn"]["tiny"]["sizes"]["rows"] = 7
    with pytest.raises(ValueError, match="make it anew with --write-digests"):
        rows.knn(machine(tmp_path))


def test_the_stored_digests_are_of_the_sizes_that_are_checked() -> None:
    stored = read_json(rows.DIGESTS)
    for name, sizes in (("kmeans", rows.KMEANS), ("knn", rows.KNN)):
        assert {size: of["sizes"] for size, of in stored[name].items()} == sizes


def test_the_only_rank_binds_its_group_to_its_gpu_as_a_worker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = list[object]()

    def ended(backend: str, **given: object) -> None:
        bound.append((backend, given["device_id"]))
        raise OSError(1, "seen")

    monkeypatch.setattr(torch.distributed, "init_process_group", ended)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        with pytest.raises(ConnectionError, match="seen"), only_rank(device):
            pass
    assert bound == [("nccl", torch.device("cuda", 0)), ("gloo", None)]
