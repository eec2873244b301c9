"""The artefacts of a run by name: what a setting, a shard or a seed renames, and what it leaves."""

from __future__ import annotations

import gc
import pathlib
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig, FuseConfig
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.flow import Flow, artifacts_of
from grappa_dist.stages.fuse import fusion_of
from tests.stages import tiny

BOTH = {"variants": ("average", "transforms", "neighbours")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_shards(tmp_path_factory.mktemp("images"))


def flow_of(root: Path, shards: Sequence[str], seed: int = 0, **sections: Mapping[str, Any]) -> Flow:
    sections["fuse"] = BOTH | dict(sections.get("fuse", {}))
    settings = tiny.config(shards, **sections).model_copy(update={"seed": seed})
    return lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)


def test_without_test_images_every_model_is_evaluated_on_some_training_images(
    tmp_path: Path, shards: list[str]
) -> None:
    flow = flow_of(tmp_path, shards, evaluate={"train_images": 10})
    assert 10 <= len(flow.test) < len(flow.train)
    assert {len(features) for features in flow.test_features.values()} == {len(flow.test.shards)}
    assert set(flow.test_features["backbone"]) < set(flow.features)  # nothing is embedded twice
    assert flow_of(tmp_path, shards, evaluate={"train_images": tiny.NUM_ROWS}).test == flow.train


def stages_of(flow: Flow) -> dict[str, set[str]]:
    """Names of the artefacts of every stage."""

    def names(artifacts: Mapping[Any, Artifact]) -> set[str]:
        return {a.name for a in artifacts.values()}

    return {
        "features": {a.name for a in flow.features},
        "labels": names(flow.labels),
        "adaptors": names(flow.adaptors),
        "fusions": names(flow.fusions),
        "scores": names(flow.scores),
        "insights": names(flow.insights),
        "report": {flow.report.name},
        "model": {flow.model.name},
    }


ALL = ("features", "labels", "adaptors", "fusions", "scores", "insights", "report", "model")


@pytest.mark.parametrize(
    ("section", "key", "value", "kept"),
    [
        ("fuse", "beta", 0.01, (*ALL[:3], "model")),  # the model here is the average of the sets
        ("fuse", "lars_weight_decay", 0.0, (*ALL[:3], "model")),
        ("adapt", "gamma", 20.0, ALL[:2]),
        ("adapt", "bottleneck", 8, ALL[:2]),
        ("data", "streams", 8, ALL[:2]),
        ("data", "shuffle_window", 3, ALL[:2]),
        ("clustering", "iterations", 9, ALL[:1]),
        ("embed", "batch_size", 9, ()),
        ("backbone", "resize", "squash", ()),
        ("evaluate", "gallery_queries", 2, (*ALL[:5], "model")),
        # Where it runs, how often it saves and what is refused change nothing but the config in the report.
        ("resources", "workers", 1, (*ALL[:6], "model")),
        ("resources", "adapt_ranks", 2, (*ALL[:6], "model")),
        ("resources", "max_restarts", 9, (*ALL[:6], "model")),
        ("adapt", "checkpoint_steps", 9, (*ALL[:6], "model")),
        ("fuse", "checkpoint_steps", 9, (*ALL[:6], "model")),
        ("fuse", "micro_batch", 9, (*ALL[:6], "model")),
        ("data", "max_bad_share", 0.5, (*ALL[:6], "model")),
    ],
)
def test_a_changed_setting_makes_anew_what_depends_on_it(
    tmp_path: Path, shards: list[str], section: str, key: str, value: object, kept: tuple[str, ...]
) -> None:
    changes: tuple[dict[str, Any], ...] = ({}, {section: {key: value}})
    before, after = (stages_of(flow_of(tmp_path, shards, 0, **s)) for s in changes)
    for stage in ALL:
        if stage in kept:
            assert after[stage] == before[stage], stage
        elif stage in ("scores", "insights") and section != "evaluate":  # backbone, sets and average have no fusion
            untouched = 4 if "adaptors" in kept else 1 if "features" in kept else 0
            assert len(after[stage] & before[stage]) == untouched, stage
        else:
            assert not after[stage] & before[stage], stage


def test_strengths_add_rows_and_leave_all_other_artefacts_their_names(tmp_path: Path, shards: list[str]) -> None:
    plain = flow_of(tmp_path, shards)
    some, more = (flow_of(tmp_path, shards, evaluate={"strengths": s}) for s in ((0.5,), (0.5, 0.0)))
    assert list(some.models) == [
        *["backbone", "k=4", "k=6", "average@0.5", "average"],
        *["transforms@0.5", "transforms", "neighbours@0.5", "neighbours"],
    ]
    for fewer, flow in ((plain, some), (some, more)):
        assert stages_of(flow)["report"] != stages_of(fewer)["report"]
        assert all(stages_of(flow)[stage] == stages_of(fewer)[stage] for stage in (*ALL[:4], "model"))
        for name in fewer.models:
            assert flow.models[name] == fewer.models[name]
            assert flow.test_features[name] == fewer.test_features[name]
            assert (flow.scores[name], flow.insights[name]) == (fewer.scores[name], fewer.insights[name])
    assert {len(set(features)) for features in more.test_features.values()} == {len(more.test.shards)}
    assert len({a.name for features in more.test_features.values() for a in features}) == 12 * len(more.test.shards)
    named = flow_of(tmp_path, shards, evaluate={"strengths": (0.5,), "export": "average@0.5"})
    assert named.model.kind == "models/average@0.5"
    assert named.model.inputs["strength"] == "0.5"
    assert (named.models["average@0.5"].strength, named.models["average"].strength) == (0.5, 1)


def test_a_fusion_is_named_by_the_graph_that_auto_settles_on(tmp_path: Path, shards: list[str]) -> None:
    def named(**settings: Any) -> str:
        fuse = {"variants": ("neighbours",), **settings}
        return flow_of(tmp_path, shards, fuse=fuse, evaluate={"export": "neighbours"}).fusions["neighbours"].name

    assert len({named(), named(graph="exact"), named(recall_floor=0.5), named(graph="exact", recall_floor=0.5)}) == 1
    assert len({named(), named(graph="approximate"), named(graph="approximate", recall_floor=0.5)}) == 3


def test_a_changed_seed_keeps_the_features_alone(tmp_path: Path, shards: list[str]) -> None:
    before, after = (stages_of(flow_of(tmp_path, shards, seed)) for seed in (0, 1))
    assert [stage for stage in ALL if after[stage] == before[stage]] == ["features"]


def test_a_new_shard_changes_its_own_features_and_all_that_follows(tmp_path: Path, shards: list[str]) -> None:
    before, after = (stages_of(flow_of(tmp_path, s)) for s in (shards[:-1], shards))
    assert len(after["features"] - before["features"]) == 1
    assert before["features"] < after["features"]
    assert not any(after[stage] & before[stage] for stage in ALL[1:])


def test_another_order_of_shards_gives_other_labels(tmp_path: Path, shards: list[str]) -> None:
    before, after = (stages_of(flow_of(tmp_path, s)) for s in (shards, shards[::-1]))
    assert after["features"] == before["features"]
    assert not after["labels"] & before["labels"]


def test_one_more_number_of_labels_keeps_the_sets_that_exist(tmp_path: Path, shards: list[str]) -> None:
    before, after = (flow_of(tmp_path, shards, clustering={"num_labels": ks}) for ks in ((4, 6), (4, 6, 8)))
    assert before.labels.items() < after.labels.items()
    assert before.adaptors.items() < after.adaptors.items()
    assert after.fusions["transforms"] != before.fusions["transforms"]


@pytest.mark.parametrize(
    ("section", "value", "kept"),
    [
        ("adapt", {"gamma": 20.0}, True),
        ("evaluate", {"gallery_queries": 2}, True),
        ("clustering", {"iterations": 9}, False),
        ("clustering", {"num_labels": (4, 6, 8)}, False),
    ],
)
def test_the_statistics_of_partitions_depend_on_the_labels_of_all_k(
    tmp_path: Path, shards: list[str], section: str, value: dict[str, Any], kept: bool
) -> None:
    before, after = flow_of(tmp_path, shards), flow_of(tmp_path, shards, 0, **{section: value})
    assert (before.partitions.name == after.partitions.name) == kept
    assert before.partitions.fingerprint in before.report.inputs.values()


def test_moved_shards_keep_their_names(tmp_path: Path) -> None:
    flows = [flow_of(tmp_path, tiny.write_shards(tmp_path / name)) for name in ("here", "there")]
    kept = [stage for stage in ALL if stages_of(flows[0])[stage] == stages_of(flows[1])[stage]]
    assert kept == [stage for stage in ALL if stage != "report"]  # it shows the config, paths and all


def test_naming_the_artefacts_writes_nothing(tmp_path: Path, shards: list[str]) -> None:
    flow_of(tmp_path / "run", shards)
    assert not (tmp_path / "run").exists()


ROWS = ("random-one", "random-all", "supervised")


def test_rows_to_compare_with_rename_nothing_else(tmp_path: Path, shards: list[str]) -> None:
    plain = flow_of(tmp_path, shards)
    more = flow_of(tmp_path, shards, adapt={"supervised": True}, fuse={"variants": (*BOTH["variants"], *ROWS)})
    before, after = stages_of(plain), stages_of(more)
    assert all(before[stage] <= after[stage] for stage in ALL if stage != "report")  # which shows the config
    assert set(more.fusions) - set(plain.fusions) == set(ROWS)
    assert list(more.models)[-4:] == [*ROWS, "supervised-set"]
    assert plain.supervision is None
    assert more.supervision is not None
    assert list(more.supervision.trained) == ["supervised-set", "supervised"]
    assert {a for a in more.supervision if a is not None} <= set(artifacts_of(more))


def test_artefacts_have_the_names_that_they_had_before_there_were_rows_to_compare_with() -> None:
    store, backbone, data = (
        Store(Path("run")),
        BackboneConfig(name="timm:vit_small_patch16_224.dino"),
        DataConfig(train=("shards",)),
    )
    adaptors = adaptors_of(store, backbone, AdaptConfig(), data, 0, store.artifact("labels/k=4", {}, {}))
    variants = ("transforms", "neighbours-adam")
    fusions = [fusion_of(store, v, backbone, FuseConfig(), data, 0, {"adaptors 0": adaptors}).name for v in variants]
    assert adaptors.name == "adaptors/k=4-aede1b2c41"
    assert fusions == ["fusion/transforms-ced228443c", "fusion/neighbours-adam-be7a8823af"]


def test_rows_to_compare_with_depend_on_what_they_are_made_of(tmp_path: Path, shards: list[str]) -> None:
    def names(images: Sequence[str] = shards, **sections: Any) -> dict[str, str]:
        sections["fuse"] = {"variants": ROWS, **sections.get("fuse", {})}
        sections["adapt"] = {"supervised": True, **sections.get("adapt", {})}
        flow = flow_of(tmp_path, images, evaluate={"export": None}, **sections)
        assert flow.supervision is not None
        return {name: a.name for name, a in {**flow.fusions, **flow.supervision.trained}.items()}

    plain = names()

    def changed(**sections: Any) -> set[str]:
        return {name for name, value in names(**sections).items() if value != plain[name]}

    assert changed(adapt={"gamma": 20.0}) == {"supervised-set", "supervised"}
    assert changed(adapt={"bottleneck": 8}) == {"supervised-set", *ROWS}
    assert changed(fuse={"beta": 0.01}) == changed(fuse={"neighbours": 2}) == {"random-one", "random-all"}
    assert changed(fuse={"adam_learning_rate": 1.0}) == set()
    assert changed(clustering={"iterations": 9}) == {"supervised"}
    assert changed(embed={"batch_size": 9}) == changed(images=shards[:-1]) == set(plain)
    assert changed(clustering={"num_labels": (4, 6, 8)}) == {"supervised", "random-all"}


def test_with_one_partition_there_is_a_random_set_and_no_supervised_fusion(tmp_path: Path, shards: list[str]) -> None:
    flow = flow_of(tmp_path, shards, clustering={"num_labels": (4,)}, fuse={"variants": ("average", *ROWS)})
    assert set(flow.fusions) == {"random-one", "random-all"}
    assert flow.supervision is None
    assert flow.models["random-all"].sets == ["random 1"]


def test_more_labels_than_images_are_refused(tmp_path: Path, shards: list[str]) -> None:
    with pytest.raises(ValueError, match=r"clustering\.num_labels=41 is more than the 40 training images"):
        flow_of(tmp_path, shards, clustering={"num_labels": (41,)})


def test_one_set_has_nothing_to_weigh(tmp_path: Path, shards: list[str]) -> None:
    flow = flow_of(tmp_path, shards, clustering={"num_labels": (4,)})
    assert flow.fusions == {}
    assert {m for m, spec in flow.models.items() if spec.adaptors} == {"k=4", "average", "transforms", "neighbours"}


def test_auto_climbs_a_ladder_of_labels(tmp_path: Path, shards: list[str]) -> None:
    assert list(flow_of(tmp_path, shards, clustering={"num_labels": "auto"}).labels) == [4, 8, 16, 32]


def test_a_further_shard_takes_the_driver_few_bytes(tmp_path: Path) -> None:
    settings, store = tiny.config(["/none"], fuse=BOTH), Store(tmp_path)

    def flow_of_shards(count: int) -> Flow:
        made = (Shard(f"{i:06d}.tar", f"/none/{i:06d}.tar", 9, 9999, f"{i:064d}") for i in range(count))
        images = ImageShards(tuple(made), ("/none.npy",) * count)
        return lay_out(settings, store, images, images)

    def held(count: int) -> int:
        tracemalloc.start()
        flow = flow_of_shards(count)
        gc.collect()
        without_table = tracemalloc.Filter(False, pathlib.__file__)  # of all interned strings, doubled now and then
        found = tracemalloc.take_snapshot().filter_traces([without_table]).statistics("filename")
        tracemalloc.stop()
        assert len(flow.features) == count
        return sum(of_file.size for of_file in found)

    held(10)  # what is imported and cached once
    few, many = held(200), held(400)
    of_artefacts = len(flow_of_shards(1).models) + 1  # the features of a shard by every model, twice by the backbone
    assert (many - few) / 200 < 1500 * of_artefacts
