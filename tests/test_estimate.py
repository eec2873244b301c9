"""Seconds, memory and disk of a run: arithmetic on rates that are given."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grappa_dist import estimate
from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.estimate import Estimator, describe_seconds, dominating, makespan, needs, work_ahead, work_of
from grappa_dist.layout import lay_out
from grappa_dist.rates import Rates
from grappa_dist.training.memory import ModelSizes
from tests.stages import tiny

SIZES = ModelSizes(
    channels=16,
    image_size=8,
    resize="crop",
    interpolation="bicubic",
    weights=10_000,
    layers=2,
    kept_image_bytes=100_000,
    recomputed_image_bytes=50_000,
    whole_because="",
)
RATES = Rates(
    decode_s=0.01,
    augment_s=0.02,
    forward_s=0.1,
    adapted_s=0.14,
    shared_s=0.05,
    set_s=0.15,
    fused_s=0.3,
    flops=4e10,
    weight_s=1e-8,
    sizes=SIZES,
    on_gpu=False,
    of="",
    measured_s=1.0,
)
BATCH = 50


def settings(**sections: Any) -> Config:
    given: dict[str, Any] = {
        "embed": {"batch_size": BATCH},
        "clustering": {"num_labels": (4, 8)},
        "adapt": {"epochs": 2, "global_batch": 100},
        "fuse": {"variants": ("average", "neighbours"), "projector": (32, 32), "epochs": 3, "micro_batch": 1000},
        "evaluate": {"view_queries": 100, "export": None},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return tiny.config(["nowhere"], **given)


def ahead(config: Config, rows: int = 1000, test: int = 0, *, per_shard: int = 100, rates: Rates = RATES) -> Estimator:
    work = work_ahead(config, {"train": rows, "test": test}, sharded=rows, rows_per_shard=per_shard)
    return Estimator(config, work, rates, dim=16)


def test_tasks_are_taken_in_order_by_whoever_is_free() -> None:
    assert makespan([], 2) == 0
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 4], 2) == 5
    assert makespan([1, 2], 5) == 2


def test_seconds_follow_from_images_sets_epochs_and_workers() -> None:
    stages = ahead(settings()).stages()
    assert list(stages) == ["start", "shards", "embed", "pseudo_label", "adapt", "fuse", "evaluate", "report"]
    assert stages["embed"] == pytest.approx(1000 * 0.11 / 2)
    assert stages["adapt"] == pytest.approx(2 * 1000 * (0.02 + 0.05 + 0.15), rel=0.05)  # two jobs at once
    pairs, graphs = 3 * 2 * 1000 * 0.32 / 2, 3 * 1000 * 0.15 / 2
    assert stages["fuse"] == pytest.approx(pairs + graphs, rel=0.05)
    models = 1000 / 2 * (0.01 + 2 * 0.12 + 2 * 0.14)  # read once; the backbone's features are there
    scores = 5 * 0.3 + 100 * (0.02 + 5 * 0.14) / 2  # of five models; views are decoded once
    assert stages["evaluate"] == pytest.approx(models + scores, rel=0.01)
    together = ahead(settings(adapt={"sets_per_job": 2})).stages()["adapt"]
    assert together == pytest.approx(2 * 1000 * (0.02 + 0.05 + 2 * 0.15), rel=0.05)
    assert ahead(settings(resources={"workers": 1})).stages()["embed"] == pytest.approx(1000 * 0.11)


def test_models_that_need_the_features_of_others_read_the_images_once_more() -> None:
    variants = ("average", "gallery")
    once, twice = (ahead(settings(fuse={"variants": v})).parts()["embed"] for v in (variants[:1], variants))
    assert once == pytest.approx([1000 / 2 * 0.11, 1000 / 2 * (0.01 + 2 * 0.12 + 0.14)])
    assert twice == pytest.approx([*once, 1000 / 2 * (0.01 + 0.14)])


def test_padded_batches_a_single_shard_and_several_micro_batches_take_longer() -> None:
    embeds = ahead(settings(), 60, per_shard=1000).stages()["embed"]
    assert embeds == pytest.approx(60 * 0.01 + 100 * 0.1)  # by one of the two workers, padded to two batches
    whole, parts = (ahead(settings(fuse={"micro_batch": size})).stages()["fuse"] for size in (1000, 10))
    assert parts - whole == pytest.approx(3 * 2 * 1000 * 0.14 / 2)  # each image goes forward once more


def test_on_a_gpu_decoding_runs_beside_the_rest() -> None:
    fast = replace(RATES, on_gpu=True)
    assert ahead(settings(), rates=fast).stages()["embed"] == pytest.approx(1000 * 0.1 / 2)
    slow_reading = replace(fast, decode_s=0.5)
    assert ahead(settings(), rates=slow_reading).stages()["embed"] == pytest.approx(1000 * 0.5 / 2)


def test_a_projector_costs_products_and_an_update_of_its_weights() -> None:
    narrow, wide = (ahead(settings(fuse={"projector": (w, w, w), "global_batch": 256})) for w in (64, 1024))
    weights = 16 * 1024 + 2 * 1024**2
    expected = (12 * 128 * weights + 6 * 128 * 1024**2) / 4e10 + 1e-8 * (weights + 1024**2 / 2)
    assert wide.projector_s() == pytest.approx(expected)
    assert narrow.projector_s() < expected / 50


def test_what_is_there_takes_no_time(tmp_path: Path) -> None:
    config = settings(data={"train": tuple(tiny.write_shards(tmp_path / "images"))})
    store, images = Store(tmp_path / "run"), ImageShards.open(config.data.train, None)
    flow = lay_out(config, store, images, None)
    work = work_of(flow)
    assert work == replace(work_ahead(config, {"train": 40, "test": 0}, sharded=0, rows_per_shard=40),
                           embedded=tiny.SIZES, tested=work.tested)  # fmt: skip
    assert work.tested["backbone"] == ()
    assert work.tested["k=4"] == tiny.SIZES
    for artifact in (*flow.features[:3], flow.labels[4], flow.adaptors[8], *flow.fusions.values()):
        artifact.begin()
        artifact.commit()
    left = work_of(lay_out(config, store, images, None))
    assert (left.embedded, left.labels, left.sets, left.fusions) == (tiny.SIZES[3:], (8,), (4,), ())
    done = replace(left, embedded=(), labels=(), sets=(), tested={}, scored=0, reports=False)
    assert describe_seconds(Estimator(config, done, RATES, 16)) == ("nothing is left to be made", "")


def test_a_slow_or_busy_core_takes_longer_for_what_does_not_depend_on_the_sizes() -> None:
    plain, busy = (ahead(settings(), rates=replace(RATES, flops=flops)).stages()["start"] for flops in (9e10, 1e10))
    assert (plain, busy) == (estimate.START_S, 4 * estimate.START_S)


def test_the_setting_that_dominates_is_named_with_a_cheaper_value() -> None:
    wide = {"projector": (8192, 8192, 8192), "global_batch": 256}
    small = {name: getattr(RATES, name) / 100 for name in ("forward_s", "adapted_s", "shared_s", "set_s", "fused_s")}
    fast = replace(RATES, flops=1e10, decode_s=1e-4, augment_s=2e-4, **small)
    text = dominating(ahead(settings(fuse=wide), rates=fast))
    assert text.startswith("warning: fuse.projector=[8192, 8192, 8192] takes ")
    assert "with fuse.projector=[1024, 1024, 1024] the run takes about" in text
    assert dominating(ahead(settings(fuse=wide), 20, rates=fast)) == ""  # not long enough to be worth a line
    plain = {"variants": ("average",)}
    assert dominating(ahead(settings(fuse=plain))) == ""  # no single one does
    assert "fuse.variants=[average, neighbours] takes" in dominating(ahead(settings()))
    long = dominating(ahead(settings(adapt={"epochs": 90})))
    assert long.startswith("warning: adapt.epochs=90 takes ")
    many = dominating(ahead(settings(clustering={"num_labels": tuple(range(2, 18))}, fuse=plain)))
    assert "clustering.num_labels=[2, 10, 17]" in many


def test_memory_and_disk_are_held_against_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(resources={"workers": 1}, adapt={"global_batch": 512, "micro_batch": 512})
    estimator = ahead(config)
    root = tmp_path / "not" / "there"
    monkeypatch.setattr(estimate, "free_memory", lambda: 2**40)
    found = needs(estimator, root, sharded_bytes=10**9)
    assert not root.exists()
    assert (found.workers, found.worker > estimate.WORKER_BYTES) == (1, True)
    assert found.disk > 10**9
    assert not any("warning" in line for line in found.lines())
    monkeypatch.setattr(estimate, "free_memory", lambda: 2**20)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage(0, 0, 10**6))
    text = "\n".join(needs(estimator, root, sharded_bytes=10**9).lines())
    assert "warning: memory may not do for that: lower resources.workers" in text
    assert "warning: the disk is too small for that" in text
