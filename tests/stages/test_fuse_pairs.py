from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import RowArrays, Store
from grappa_dist.config import Config
from grappa_dist.data.decoding import decode
from grappa_dist.data.device_batches import device_batches
from grappa_dist.data.rng import view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ModelSpec, build, build_backbone
from grappa_dist.stages import fuse_pairs, knn_graph
from grappa_dist.stages.embed import Embedding, RowSet, embed_row_sets
from grappa_dist.stages.fuse_pairs import Pairs
from tests.processes import run_ranks
from tests.stages import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny.config(tiny.write_shards(tmp_path_factory.mktemp("images")))


def pairs_of(settings: Config, folder: Path, comm: Comm, *, neighbours: bool) -> Pairs:
    images = ImageShards.open(settings.data.train, None)
    sets = tuple(tiny.random_adaptors(Store(folder), settings, seed) for seed in (1, 2))
    model = build(ModelSpec("average", settings.backbone, settings.adapt.bottleneck, sets), tiny.CPU)
    assert isinstance(model, Grappa)
    return Pairs(
        tiny.Watcher().context(comm),
        tiny.training_images(settings, images),
        model,
        build_backbone(settings.backbone).preprocess,
        settings=settings.fuse,
        neighbours=neighbours,
        embedding=Embedding(settings.embed.batch_size, 1),
        labels={4: tiny.labels_in(folder / f"labels-{comm.size}-{comm.rank}", images, 4)},
        folder=folder / f"knn-{comm.size}",
    )


def whole_batches(pairs: Sequence[Pairs], steps: range) -> list[set[bytes]]:
    """The pairs of every global batch, as bytes of both views, gathered over ranks."""
    batches = []
    for step in steps:
        found = []
        for rank in pairs:
            first, second = np.split(rank.at(step).numpy(), 2)
            found += [a.tobytes() + b.tobytes() for a, b in zip(first, second, strict=True)]
        assert len(set(found)) == len(found)
        batches.append(set(found))
    for rank in pairs:
        rank.close()
    return batches


def test_global_batches_of_pairs_are_the_same_on_any_number_of_ranks(settings: Config, tmp_path: Path) -> None:
    def batches(size: int) -> list[set[bytes]]:
        return whole_batches(
            [pairs_of(settings, tmp_path, Comm(rank, size), neighbours=False) for rank in range(size)], range(4)
        )

    alone = batches(1)
    assert sum(map(len, alone[:3])) == tiny.NUM_ROWS - 1
    assert alone[3] != alone[0]  # another epoch has other views
    assert batches(3) == batches(5) == alone


def test_without_a_graph_a_pair_is_two_views_of_one_image(settings: Config, tmp_path: Path) -> None:
    pairs = pairs_of(settings, tmp_path, Comm(), neighbours=False)
    training = tiny.training_images(settings, ImageShards.open(settings.data.train, None))
    preprocess = build_backbone(settings.backbone).preprocess
    rows = training.order(1).batch(1, tiny.BATCH)
    pairs.begin(4)
    first, second = np.split(pairs.at(4).numpy(), 2)
    pairs.close()
    for place, row in enumerate(rows.tolist()):
        image = decode(training.images.image_bytes(row))
        for view, pixels in enumerate((first, second)):
            expected = preprocess.augment(image, view_generator(0, 1, row, view), settings.fuse.min_crop_area)
            np.testing.assert_array_equal(pixels[place], expected)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("neighbours", "refresh", "read"),
    [(False, True, [range(1, 6)]), (True, False, [range(1, 6)]), (True, True, [range(1, 3), range(3, 6)])],
)
def test_pairs_are_read_on_from_epoch_to_epoch_unless_the_next_one_has_a_graph_by_the_model_of_then(
    settings: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    neighbours: bool,
    refresh: bool,
    read: list[range],
) -> None:
    begun, graph = list[range](), random_graph(tmp_path, ImageShards.open(settings.data.train, None), 15)

    def noted(steps: range, *given: Any, **more: Any) -> Any:
        begun.append(steps)
        return device_batches(steps, *given, **more)

    monkeypatch.setattr(fuse_pairs, "device_batches", noted)
    monkeypatch.setattr(knn_graph.Graphs, "of", lambda graphs, epoch: graph)
    fuse = settings.fuse.model_copy(update={"refresh": refresh, "epochs": 2})
    pairs = pairs_of(settings.model_copy(update={"fuse": fuse}), tmp_path, Comm(), neighbours=neighbours)
    found = [pairs.at(step).numpy() for step in range(1, 6)]
    pairs.close()
    assert begun == read
    pairs.begin(4)  # as a job that resumes there
    np.testing.assert_array_equal(pairs.at(4).numpy(), found[3])
    pairs.close()


def random_graph(folder: Path, images: ImageShards, most: int = tiny.NUM_ROWS) -> RowArrays:
    draws = np.random.default_rng(0)
    paths = []
    for shard, about in enumerate(images.shards):
        paths.append(str(folder / f"near-{shard}.npy"))
        np.save(paths[-1], draws.integers(0, most, (about.rows, 3)))
    return RowArrays(tuple(paths), tuple(images.starts.tolist()))


def test_the_partner_is_a_neighbour_drawn_by_seed_epoch_and_row(settings: Config, tmp_path: Path) -> None:
    images = ImageShards.open(settings.data.train, None)
    pairs, graph = pairs_of(settings, tmp_path, Comm(), neighbours=True), random_graph(tmp_path, images)
    rows = np.arange(tiny.NUM_ROWS)
    near = graph.take(rows)
    partners = pairs._partners(rows, 2, graph)
    assert (partners[:, None] == near).any(1).all()
    shuffled = np.random.default_rng(1).permutation(rows)
    np.testing.assert_array_equal(pairs._partners(shuffled, 2, graph), partners[shuffled])
    np.testing.assert_array_equal(pairs._partners(rows[7:8], 2, graph), partners[7:8])
    assert (pairs._partners(rows, 3, graph) != partners).any()
    draws = {pairs._partners(rows[5:6], epoch, graph)[0] for epoch in range(60)}
    assert draws == set(near[5].tolist())


def test_a_row_without_neighbours_is_its_own_partner(settings: Config, tmp_path: Path) -> None:
    pairs = pairs_of(settings, tmp_path, Comm(), neighbours=True)
    path = tmp_path / "near.npy"
    np.save(path, np.array([[-1, -1], [0, -1], [-1, -1]]))
    lonely = RowArrays((str(path),), (0, 3))
    assert pairs._partners(np.array([2, 1, 0]), 0, lonely).tolist() == [2, 0, 0]
    assert pairs._partners(np.array([], dtype=np.int64), 0, lonely).tolist() == []


COPIES = (1, 1, 2, 1, 9, 1)  # of each of six pictures: alone, twice, and more often than 2k


def write_copies(folder: Path) -> list[str]:
    pictures = [tiny.picture(i, seed=i) for i, count in enumerate(COPIES) for _ in range(count)]
    for part in range(3):
        with ShardWriter(folder / f"part-{part}", rows_per_shard=None) as writer:
            for encoded in pictures[part * 6 : part * 6 + 6]:
                writer.write(encoded, "png")
    return [str(folder / f"part-{part}") for part in range(3)]


def graph_of_copies(comm: Comm, folder: Path, skip: bool) -> tuple[np.ndarray, dict[str, Any]]:
    settings = tiny.config(sorted(map(str, (folder / "images").iterdir())), fuse={"skip_duplicates": skip})
    images = ImageShards.open(settings.data.train, None)
    sets = (tiny.random_adaptors(Store(folder), settings, 1),)
    model = build(ModelSpec("k=1", settings.backbone, settings.adapt.bottleneck, sets), tiny.CPU)
    assert isinstance(model, Grappa)
    pairs = Pairs(
        tiny.Watcher().context(comm),
        tiny.training_images(settings, images, bad=()),
        model,
        build_backbone(settings.backbone).preprocess,
        settings=settings.fuse,
        neighbours=True,
        embedding=Embedding(settings.embed.batch_size, 1),
        labels={},
        folder=folder / f"knn-{comm.size}-{skip}",
    )
    graph = pairs._graphs.of(0)
    statistics = json.loads((folder / f"knn-{comm.size}-{skip}" / "epoch-0" / "statistics.json").read_text())
    return graph.take(np.arange(len(images))), statistics


@pytest.mark.parametrize("skip", [True, False])
def test_copies_are_counted_and_skipped_where_asked_for_on_any_number_of_ranks(tmp_path: Path, skip: bool) -> None:
    write_copies(tmp_path / "images")
    picture = np.repeat(np.arange(len(COPIES)), COPIES)  # of each row
    near, statistics = graph_of_copies(Comm(), tmp_path, skip)
    copies = (picture[near] == picture[:, None]) & (near >= 0)
    assert statistics["rows_with_duplicates_share"] == pytest.approx(11 / 15)
    assert statistics["duplicate_pairs"] == 2 + 9 * 3
    assert statistics["rows_without_neighbour"] == (9 if skip else 0)  # their 2k nearest are copies too
    assert copies.sum() == (0 if skip else 2 + 9 * 3)
    assert [(near[row] >= 0).sum() for row in range(4)] == [3, 3, 3, 3]
    for seen, of_rank in run_ranks(graph_of_copies, 3, tmp_path, skip, timeout_s=400):
        np.testing.assert_array_equal(seen, near)
        assert of_rank == statistics


def graph_on(comm: Comm, settings: Config, folder: Path) -> np.ndarray:
    pairs = pairs_of(settings, folder, comm, neighbours=True)
    pairs.begin(0)
    pairs.close()
    tables = sorted((folder / f"knn-{comm.size}" / "epoch-0").glob("rows-*.npy"))
    return np.concatenate([np.load(table) for table in tables])


def test_the_graph_is_the_same_to_the_bit_on_any_number_of_ranks(settings: Config, tmp_path: Path) -> None:
    alone = graph_on(Comm(), settings, tmp_path)
    good = np.delete(np.arange(tiny.NUM_ROWS), tiny.BAD)
    assert np.isin(alone[good], good).all()
    for seen in run_ranks(graph_on, 5, settings, tmp_path, timeout_s=400):  # one rank has no shard
        np.testing.assert_array_equal(seen, alone)


@pytest.mark.parametrize("refresh", [True, False])
def test_a_static_graph_is_made_once_and_gives_the_partners_of_every_epoch(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: bool
) -> None:
    settings = settings.model_copy(update={"fuse": settings.fuse.model_copy(update={"refresh": refresh, "epochs": 3})})
    pairs = pairs_of(settings, tmp_path, Comm(), neighbours=True)
    embedded, seen, partners_of = list[int](), list[tuple[int, RowArrays]](), pairs._partners

    def counting(model: Grappa, parts: Sequence[RowSet], **how: Any) -> Generator[Any, None, None]:
        embedded.append(sum(len(part.rows) for part in parts))
        return embed_row_sets(model, parts, **how)

    def watched(rows: np.ndarray, epoch: int, graph: RowArrays | None) -> np.ndarray:
        assert graph is not None
        seen.append((epoch, graph))
        return partners_of(rows, epoch, graph)

    monkeypatch.setattr(knn_graph, "embed_row_sets", counting)
    monkeypatch.setattr(pairs, "_partners", watched)
    for step in range(3 * tiny.STEPS_PER_EPOCH):
        pairs.at(step)
    pairs.close()
    epochs = range(3) if refresh else range(1)
    assert sum(embedded) == len(epochs) * (tiny.NUM_ROWS - 1)
    assert sorted(path.name for path in (tmp_path / "knn-1").iterdir()) == [f"epoch-{e}" for e in epochs]
    assert {epoch for epoch, _ in seen} == set(range(3))
    for epoch, graph in seen:
        made = tmp_path / "knn-1" / f"epoch-{epoch if refresh else 0}"
        assert {Path(path).parent for path in graph.paths} == {made}
