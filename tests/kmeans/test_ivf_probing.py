from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grappa_dist.kmeans.ivf import CentroidLists, ProbedSearch, assign_probed, faiss_search, nearest_exactly
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID, to_grid
from grappa_dist.search.rerank import assign


def unit_rows(num: int, dim: int, seed: int) -> torch.Tensor:
    return to_grid(F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1))


def naive(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    a, b = ((t.double() * GRID).long() for t in (x, c))
    return (a[:, None] - b).square().sum(2)


@pytest.mark.parametrize("num", [1, 7, 5000])
def test_the_nearest_come_in_order_and_ties_by_index(num: int) -> None:
    x, c = unit_rows(60, 6, 0), unit_rows(max(1, num // 2), 6, 1)
    c = torch.cat([c, c])[:num]  # every centroid twice
    t = min(5, num)
    labels, squares = nearest_exactly(x, Centroids.of(c), t)
    table = naive(x, c)
    order = table.argsort(dim=1, stable=True)[:, :t]
    assert torch.equal(labels, order)
    assert torch.equal(squares, table.gather(1, order))


def test_no_row_has_no_nearest() -> None:
    labels, squares = nearest_exactly(unit_rows(0, 4, 0), Centroids.of(unit_rows(3, 4, 1)), 2)
    assert labels.shape == squares.shape == (0, 2)


def floats(lists: CentroidLists) -> ProbedSearch:
    """Every pair in float32, moved by up to a third of what the error bound allows."""

    def search(x: torch.Tensor, probed: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        owners = torch.empty(len(lists.whole.values), dtype=torch.int64)
        for i, members in enumerate(lists.members):
            owners[members] = i
        allowed = (owners[None, :, None] == probed[:, None, :]).any(2)
        table = (x[:, None] - lists.whole.values).square().sum(2)
        table += (torch.rand(table.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * 4 * 2.0**-24
        values, found = torch.where(allowed, table, torch.inf).topk(t, dim=1, largest=False)
        return values, torch.where(values.isfinite(), found, -1)

    return search


@pytest.mark.parametrize("search", ["none", "floats", "faiss"])
@pytest.mark.parametrize("copies", [1, 2, 6])  # more equal centroids than candidates
@pytest.mark.parametrize("probes", [1, 2, 50])
def test_a_row_gets_the_nearest_centroid_of_its_lists(probes: int, copies: int, search: str) -> None:
    x, c, coarse = unit_rows(200, 5, 0), unit_rows(20, 5, 1).repeat(copies, 1), unit_rows(7, 5, 2)
    owners = torch.randint(
        0, 6, (len(c),), generator=torch.Generator().manual_seed(3)
    )  # no centroid has the last of them
    lists = CentroidLists.of(Centroids.of(c), coarse, owners)
    assert len(lists.members) == 6
    searches = {"none": None, "floats": floats(lists), "faiss": faiss_search(lists, probes)}
    probed = assign_probed(x, lists, probes, searches[search])
    near = naive(x, coarse[:6]).argsort(dim=1, stable=True)[:, :probes]
    allowed = (owners[None, :, None] == near[:, None, :]).any(2)
    table = torch.where(allowed, naive(x, c), 2**62)
    assert torch.equal(probed.found.squares, table.min(1).values)
    first = (table == table.min(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(probed.found.labels, first)
    assert probed.searched == 200 * 6 + int(allowed.sum())


def test_all_lists_give_the_exact_assignment() -> None:
    x, c = unit_rows(100, 5, 0), Centroids.of(unit_rows(30, 5, 1))
    lists = CentroidLists.of(c, unit_rows(4, 5, 2), torch.arange(30) % 4)
    assert torch.equal(assign_probed(x, lists, 4).found.labels, assign(x, c).labels)
