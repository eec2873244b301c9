from __future__ import annotations

import numpy as np
import pytest
import torch

from grappa_dist.retrieval import nearest as module
from grappa_dist.retrieval.nearest import nearest

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_the_nearest_are_those_of_a_sort_of_all_cosines(block: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "QUERIES", 2)
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (20, 4)).astype(np.float32)  # whole numbers: products are exact, and many are equal
    rows[7] = rows[3]
    queries, bad = rows[[3, 5, 8]], {0, 5}
    found = nearest(queries, [rows[:9], rows[9:9], rows[9:]], bad, k, CPU)
    for query, cosines, ids in zip(queries, found.cosines, found.rows, strict=True):
        scores = rows @ query
        expected = sorted((row for row in range(20) if row not in bad), key=lambda row: (-scores[row], row))[:k]
        assert ids.tolist() == expected
        assert cosines.tolist() == scores[expected].tolist()


def test_cosines_are_true_float32_whatever_products_the_process_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, best = [], module._best

    def watched(scores: torch.Tensor, ids: torch.Tensor, k: int) -> module.Found:
        seen.append(torch.get_float32_matmul_precision())
        return best(scores, ids, k)

    monkeypatch.setattr(module, "_best", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # on a GPU and on some CPUs: factors of 8 bits
    try:
        nearest(np.eye(3, dtype=np.float32), [np.eye(3, dtype=np.float32)], set(), 1, CPU)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
