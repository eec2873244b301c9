from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import RowArrays
from grappa_dist.config import Config, FuseConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import Stopped
from grappa_dist.stages import knn_graph
from grappa_dist.stages.embed import embed_row_sets
from grappa_dist.stages.knn_graph import EXACT_ROWS, batches_of_rank, graph_kind
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.test_fuse_pairs import pairs_of

SLOW_S = 1.0  # a batch on the slow rank


@pytest.mark.parametrize("good", [[5], [0, 17, 0, 1, 64, 3], [1000, 1], [0], []])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_batch_is_embedded_by_one_rank_and_all_have_as_many(good: Sequence[int], size: int) -> None:
    batch = 8
    parts = [batches_of_rank(good, batch, rank, size) for rank in range(size)]
    seen = [(part.shard, row) for of_rank in parts for part in of_rank for row in range(part.first, part.after)]
    assert seen == [(shard, row) for shard, count in enumerate(good) for row in range(count)]
    batches = [sum(-(-(part.after - part.first) // batch) for part in of_rank) for of_rank in parts]
    assert max(batches) - min(batches) <= 1
    assert all(part.first % batch == 0 for of_rank in parts for part in of_rank)


def test_how_neighbours_are_found_depends_on_the_setting_and_the_number_of_rows_alone() -> None:
    assert [graph_kind(FuseConfig(), n) for n in (1, EXACT_ROWS, EXACT_ROWS + 1)] == ["exact", "exact", "approximate"]
    assert graph_kind(FuseConfig(graph="exact"), 10**9) == "exact"
    assert graph_kind(FuseConfig(graph="approximate"), 3) == "approximate"


def settings_of(shards: Sequence[str]) -> Config:
    return tiny.config(shards, fuse={"graph": "approximate", "recall_floor": 0.5})


def approximate_graph(comm: Comm, shards: Sequence[str], folder: Path) -> tuple[np.ndarray, dict[str, float]]:
    pairs = pairs_of(settings_of(shards), folder, comm, neighbours=True)
    graph: RowArrays = pairs._graphs.of(0)
    statistics = json.loads((folder / f"knn-{comm.size}" / "epoch-0" / "statistics.json").read_text())
    return graph.take(np.arange(tiny.NUM_ROWS)), statistics


def test_two_ranks_share_a_shard_and_an_approximate_graph_has_its_recall(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "images", sizes=(tiny.NUM_ROWS,))
    alone, statistics = approximate_graph(Comm(), shards, tmp_path)
    assert statistics["graph"] == "approximate"
    assert 0.5 <= statistics["recall"] <= 1
    assert statistics["searched"] == ("lists" if statistics["recall_rows"] else "exact")
    assert statistics["searched"] == "exact" or statistics["lists"] > statistics["probes"] >= 1
    assert (alone[tiny.BAD] == -1).all()
    for seen, of_rank in run_ranks(approximate_graph, 2, shards, tmp_path, timeout_s=400):
        np.testing.assert_array_equal(seen, alone)
        assert of_rank == statistics


def graph_with_a_slow_rank(comm: Comm, shards: Sequence[str], folder: Path) -> np.ndarray:
    def slow(*args: Any, **how: Any) -> Iterator[Any]:
        for found in embed_row_sets(*args, **how):
            time.sleep(SLOW_S if comm.rank else 0)
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_graph, "embed_row_sets", slow)
        graph = pairs_of(tiny.config(shards), folder, comm, neighbours=True)._graphs.of(0)
    return graph.take(np.arange(tiny.NUM_ROWS))


@pytest.mark.slow
def test_a_rank_that_embeds_for_longer_than_a_collective_waits_is_waited_for(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "images")
    alone = graph_with_a_slow_rank(Comm(), shards, tmp_path)
    wait_s = 3.5 * SLOW_S  # rank 1 has four batches
    for seen in run_ranks(graph_with_a_slow_rank, 2, shards, tmp_path, collective_s=wait_s):
        np.testing.assert_array_equal(seen, alone)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_graph_that_was_stopped_while_it_embedded_goes_on_with_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    settings = settings_of(tiny.write_shards(tmp_path / "images"))
    asked, embedded = list[bool](), list[int]()

    def counting(*args: Any, **how: Any) -> Iterator[Any]:
        for batch in embed_row_sets(*args, **how):
            embedded.append(len(batch.unit))
            yield batch

    def stop_requested() -> bool:
        asked.append(True)
        return len(asked) > 2

    monkeypatch.setattr(knn_graph, "embed_row_sets", counting)
    stopped = pairs_of(settings, tmp_path / "a", Comm(), neighbours=True)._graphs
    stopped._context = replace(stopped._context, stop_requested=stop_requested)
    with pytest.raises(Stopped):
        stopped.of(0)
    first = sum(embedded)
    assert 0 < first < tiny.NUM_ROWS - 1
    if damaged:
        path = next((tmp_path / "a").rglob("features-*.npy"))
        content = bytearray(path.read_bytes())
        content[content.index(b"\n") + 9] ^= 8  # of the first row, behind numpy's header
        path.write_bytes(content)
    resumed = pairs_of(settings, tmp_path / "a", Comm(), neighbours=True)._graphs.of(0)
    # The bad row is in none, and no row in both, unless what was saved is not used.
    assert sum(embedded) == tiny.NUM_ROWS - 1 + damaged * first
    straight = pairs_of(settings, tmp_path / "b", Comm(), neighbours=True)._graphs.of(0)
    every = np.arange(tiny.NUM_ROWS)
    np.testing.assert_array_equal(resumed.take(every), straight.take(every))
    assert not list((tmp_path / "a").rglob("features-*"))


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_graph_is_set_aside_named_and_made_anew(tmp_path: Path, missing: bool) -> None:
    settings = settings_of(tiny.write_shards(tmp_path / "images"))
    graphs = pairs_of(settings, tmp_path / "run", Comm(), neighbours=True)._graphs
    every, notes = np.arange(tiny.NUM_ROWS), list[str]()
    whole = graphs.of(0).take(every)
    file = max((tmp_path / "run").rglob("epoch-0/rows-*.npy"))
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    graphs._context = replace(graphs._context, note=notes.append)
    np.testing.assert_array_equal(graphs.of(0).take(every), whole)
    assert notes == [f"k-NN graph {file.parent} is damaged; set aside as .damaged-epoch-0-1, made anew"]
    graphs.of(0)
    assert len(notes) == 1


def test_a_graph_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images", bad=range(13, 14)))  # a shard without a good row
    synced, not_synced = dict[int, tuple[int, int]](), list[str]()
    rename = os.rename

    def state(at: os.stat_result) -> tuple[int, int]:
        return at.st_mtime_ns, at.st_size

    def fsync(handle: int) -> None:
        synced[os.fstat(handle).st_ino] = state(os.fstat(handle))

    def renamed(source: Path, target: Path) -> None:
        for path in (source, *source.iterdir()):
            if synced.get(path.stat().st_ino) != state(path.stat()):
                not_synced.append(path.name)
        rename(source, target)

    graphs = pairs_of(settings, tmp_path, Comm(), neighbours=True)._graphs
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    graphs.of(0)
    assert len(synced) > len(tiny.SIZES)
    assert not_synced == []
