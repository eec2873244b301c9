from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import (
    Timing,
    drawn_rows,
    over_ranks,
    random_square,
    read_rows,
    rows_to_measure,
    squared_error,
    turns,
)

DIM = 48


def test_a_run_on_several_ranks_takes_as_long_as_the_slowest_and_the_cpu_seconds_of_all() -> None:
    ranks = [Timing((1.0, 5.0), (0.5, 1.0)), Timing((2.0, 3.0), (0.25, 2.0))]
    assert over_ranks(ranks) == Timing((2.0, 5.0), (0.75, 3.0))


def test_rows_are_drawn_only_where_no_features_are_given(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, drawn_rows(9, DIM, 0))
    real, source = rows_to_measure(path, 4, (20, DIM), 0)
    assert (len(real), source) == (4, "real: 4 rows of 1 file in rows.npy")
    drawn, source = rows_to_measure(None, 4, (20, DIM), 7)
    assert np.array_equal(drawn, drawn_rows(20, DIM, 7))
    assert source.startswith("drawn: 20 rows, ")
    assert source.endswith("seed 7")


def test_the_objective_is_the_sum_over_rows_of_squared_distances() -> None:
    rows = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    centroids = np.array([[0, 0.5], [1, 1]], dtype=np.float32)
    assert squared_error(rows, centroids, np.array([1, 0, 1])) == 1 + 0.25 + 1


def test_drawn_rows_are_unit_rows_and_a_function_of_the_seed() -> None:
    rows = drawn_rows(500, DIM, 3)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(rows, drawn_rows(500, DIM, 3))
    assert not np.array_equal(rows, drawn_rows(500, DIM, 4))


def test_real_rows_are_read_in_order_without_those_that_are_zero(tmp_path: Path) -> None:
    rows = drawn_rows(9, DIM, 0)
    (tmp_path / "shard-0").mkdir()
    (tmp_path / "shard-1").mkdir()
    np.save(tmp_path / "shard-0" / "rows.npy", np.concatenate([rows[:4], np.zeros((1, DIM), np.float32)]))
    np.save(tmp_path / "shard-1" / "rows.npy", rows[4:])
    assert np.array_equal(read_rows(tmp_path, None)[0], rows)
    assert np.array_equal(read_rows(tmp_path, 6)[0], rows[:6])
    assert "real: 9 rows of 2 files" in read_rows(tmp_path, None)[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 4)), r"has \(3, 4\) float64, expected \(rows, dimensions\) float32"),
        (np.full((3, 4), 2, np.float32), "norm 4 to 4, expected 1"),
        (None, "not a readable .npy file"),
    ],
)
def test_unfit_files_are_refused_by_name(tmp_path: Path, rows: np.ndarray | None, message: str) -> None:
    path = tmp_path / "broken.npy"
    if rows is None:
        path.write_bytes(b"nonsense")
    else:
        np.save(path, rows)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, None)
    assert "broken.npy" in str(caught.value)


def test_rounds_alternate_so_that_drift_cancels() -> None:
    assert list(turns(["a", "b", "c"], 3)) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_limit_of_a_machine_is_that_of_random_numbers(dtype: torch.dtype) -> None:
    drawn = random_square(64, torch.device("cpu"), dtype)
    assert drawn.dtype == dtype
    assert len(drawn.unique()) > 500
    assert 0.9 < float(drawn.double().std()) < 1.1
