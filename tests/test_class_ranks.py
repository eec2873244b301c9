"""Places among the scores of a query's class: the same for any tiles, blocks, ranks and ways to decide."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from grappa_dist import class_ranks
from grappa_dist.class_ranks import UNIT, Gallery, score_queries, unit_on_grid
from grappa_dist.search.fixed_point import exact_dot
from tests.processes import run_ranks

CPU = torch.device("cpu")


def rows_of(kind: str, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grid rows and classes from 0: spread, with many exact ties, or nearly all alike."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 6, generator=draws)
    if kind == "ties":
        x = x[torch.randint(min(num, 5), (num,), generator=draws)]
    elif kind == "collapsed":
        x = torch.ones(num, 6) + 2.0**-22 * x
    labels = torch.randint(7, (num,), generator=draws).clamp(min=1)
    labels[0] = 100  # a class of one
    return unit_on_grid(x), torch.unique(labels, return_inverse=True)[1]


def by_sorting(x: Tensor, classes: Tensor) -> list[list[int]]:
    """The metrics of every row with others of its class, in units, from sorted exact scores."""
    scores, found = exact_dot(x, x).tolist(), []
    for query, own in enumerate(classes.tolist()):
        ranked = sorted((row for row in range(len(x)) if row != query), key=lambda row: (-scores[query][row], row))
        hits = [classes[row].item() == own for row in ranked]
        size = sum(hits)
        if size:
            at = [sum(hits[: i + 1]) / (i + 1) for i in range(size) if hits[i]]
            mean = sum(round(precision * UNIT) for precision in at) // size
            found.append([query, round(len(at) / size * UNIT), mean, hits[0] * UNIT])
    return found


def scored(x: Tensor, classes: Tensor, parts: int = 1, **sizes: int) -> list[list[int]]:
    """The same by `score_queries`, by the parts of several ranks, of which some may be empty."""
    found = []
    for rank in range(parts):
        gallery = Gallery(classes, x.__getitem__, CPU, x if rank % 2 == 0 else None)
        places = gallery.queries_of(rank, parts)
        units = torch.zeros(len(places), 3, dtype=torch.int64)
        assert sum(score_queries(gallery, places, units, **sizes)) == len(places) * len(x)
        found += torch.cat([places[:, None], units], 1).tolist()
    return sorted(found)


@pytest.mark.parametrize("kind", ["spread", "ties", "collapsed"])
@pytest.mark.parametrize("num", [2, 3, 29])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_metrics_are_those_of_sorted_exact_scores_for_any_tiles_blocks_and_ranks(
    kind: str, num: int, parts: int
) -> None:
    x, classes = rows_of(kind, num)
    expected = by_sorting(x, classes)
    for block_rows, tile_rows in ((1, 3), (5, 4), (100, 17)):
        assert scored(x, classes, parts, block_rows=block_rows, tile_rows=tile_rows) == expected


@pytest.mark.parametrize("kind", ["spread", "ties", "collapsed"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"_SMALL_CLASS": 1},  # every class by itself
        {"_SMALL_CLASS": 1, "_READ": 2},  # and in several pieces
        {"_OPEN_DIMS": 0},  # whatever float32 leaves open, by exact products of the whole table
        {"_OPEN_DIMS": 10**9},  # and pair by pair
        {"_OPEN_DIMS": 10**9, "_OPEN_AT_ONCE": 3},
        {"_SAMPLE_SHARE": 3, "_LEAST_SAMPLE": 1},
        {"_MANY": 1},  # every table bounds itself
        {"_MANY": 10**9},  # none does
        {"_TABLE": 8, "_EXACT_TABLE": 8},
        {"_ENTRIES": 30, "_GROUP": 5},
    ],
    ids=str,
)
def test_how_a_place_is_found_does_not_change_the_metrics(
    kind: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, classes = rows_of(kind, 40, seed=1)
    expected = by_sorting(x, classes)
    for name, value in sizes.items():
        monkeypatch.setattr(class_ranks, name, value)
    assert scored(x, classes) == expected


def test_of_large_classes_few_more_pairs_than_the_best_of_a_table_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    draws, placed = torch.Generator().manual_seed(0), list[int]()
    x = unit_on_grid(torch.randn(1000, 32, generator=draws))
    better = class_ranks._Block._better

    def note(block: class_ranks._Block, queries: Tensor, scores: Tensor, *, equal: bool = False) -> Tensor:
        placed.append(0 if equal else len(queries))
        return better(block, queries, scores, equal=equal)

    monkeypatch.setattr(class_ranks._Block, "_better", note)
    scored(x, torch.arange(1000) % 10)  # features say nothing of the class
    assert sum(placed) < 1.1 * 1000 * 100  # of 1000 * 900 pairs of two classes


def test_a_product_of_two_queries_of_small_classes_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num, dim = 400, 16
    x = unit_on_grid(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)))
    with FlopCounterMode(display=False) as once:
        scored(x, torch.arange(num) // 2, block_rows=20)
    monkeypatch.setattr(class_ranks, "_SMALL_CLASS", 0)
    with FlopCounterMode(display=False) as twice:
        scored(x, torch.arange(num) // 2, block_rows=20)
    assert twice.get_total_flops() > 2 * num * num * dim
    assert once.get_total_flops() < 0.6 * twice.get_total_flops()  # half, each block with itself, and the own class


def test_one_class_of_all_rows_is_perfect_and_a_query_alone_when_it_needs_much_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, _ = rows_of("spread", 40)
    monkeypatch.setattr(class_ranks, "_ENTRIES", 100)  # two queries of 39 others
    classes = torch.zeros(40, dtype=torch.int64)
    gallery = Gallery(classes, x.__getitem__, CPU, x)
    groups = list(class_ranks._groups(gallery, gallery.queries, None))
    assert {len(some) for group in groups for some in group} == {1, 2}
    assert [units for _, *units in scored(x, classes)] == [[UNIT] * 3] * 40


def test_blocks_that_share_a_pass_hold_no_more_scores_than_their_bound() -> None:
    classes = torch.arange(200_000) // 2_000  # of 2,000 images each
    gallery = Gallery(classes, lambda places: torch.zeros(len(places), 1), CPU)
    for group in class_ranks._groups(gallery, gallery.queries, None):
        queries = group[-1].stop - group[0].start
        assert queries * 1_999 <= class_ranks._ENTRIES
        assert queries <= class_ranks._GROUP


def peak_of(comm: object, path: Path, num: int, dim: int) -> int:
    """Bytes of this process that are no file's, at most, above those before the search of `num` mapped rows."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    rows = np.memmap(path, np.float32, "r", shape=(num, dim))
    gallery = Gallery.of(
        torch.arange(num) // 2,
        lambda places: unit_on_grid(torch.from_numpy(rows[places.numpy()])),
        CPU,
        dim=dim,
        held_bytes=2**20,
    )
    queries, peak, done = gallery.queries[:40], 0, threading.Event()
    units = torch.zeros(40, 3, dtype=torch.int64)
    before = anonymous()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in score_queries(gallery, queries, units):
        pass
    done.set()
    watcher.join()
    return peak - before


def test_memory_does_not_grow_with_the_rows_that_are_searched(tmp_path: Path) -> None:
    dim, few, many = 256, 66_000, 198_000  # a sample of the gallery has its largest size in both
    path = tmp_path / "rows"
    draws = np.random.default_rng(0)
    with open(path, "wb") as file:
        for _ in range(many // few):
            file.write(draws.standard_normal((few, dim), dtype=np.float32).tobytes())
    first, second = (run_ranks(peak_of, 1, path, num, dim)[0] for num in (few, many))
    assert second - first < (many - few) * dim * 4 / 2  # a copy in float32 of the others would be all of it
