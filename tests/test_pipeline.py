"""The flow without Ray: names of artefacts, and one whole run in which tasks run here and jobs on real ranks."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import grappa_dist
from grappa_dist import pipeline
from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import AdaptConfig, BackboneConfig, Config, DataConfig, FuseConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.fuse import fusion_of
from grappa_dist.stages.mirror import artifacts_of
from grappa_dist.stages.modelling import check_ready
from tests.stages import tiny

BOTH = {"variants": ("average", "transforms", "neighbours")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_shards(tmp_path_factory.mktemp("images"))


def flow_of(root: Path, shards: Sequence[str], seed: int = 0, **sections: Mapping[str, Any]) -> Flow:
    sections["fuse"] = BOTH | dict(sections.get("fuse", {}))
    settings = tiny.config(shards, **sections).model_copy(update={"seed": seed})
    return lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)


def test_without_test_images_some_training_images_are_looked_at_by_every_model(
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


def test_a_check_names_a_file_that_is_no_longer_what_its_manifest_says(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.config(shards)
    pipeline._run(tiny.run_in(settings, tmp_path, tiny.Here()), "pseudo_label")
    workers = SimpleNamespace(workers=lambda: [1, 2], facts={}, close=lambda: None)
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: workers)
    assert pipeline.check(settings, tmp_path).endswith("2 workers can start; 7 artefacts are there and whole")
    (cut,) = tmp_path.glob("labels/k=4-*/centroids.npy")
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"centroids.npy has \d+ bytes, its manifest says \d+; remove"):
        pipeline.check(settings, tmp_path)


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


def test_another_order_of_shards_is_another_collection_of_labels(tmp_path: Path, shards: list[str]) -> None:
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
def test_what_is_said_of_the_partitions_depends_on_the_labels_of_all_k(
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
    assert {a for a in more.supervision if a is not None} <= set(artifacts_of(more))  # copied to a mirror as well


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


def test_a_check_refuses_an_image_size_before_any_worker_starts(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: pytest.fail("workers start"))
    backbone = {"name": "tests.models.tiny:create", "image_size": 20}
    with pytest.raises(ValueError, match=r"backbone\.image_size=20 .* do not reach the last 4 of 20 pixels; .*=16$"):
        pipeline.check(tiny.config(shards, backbone=backbone), tmp_path)


def test_weights_that_cannot_be_had_are_missed_before_any_worker_is_asked(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: urllib.request.Request, timeout: float) -> None:
        raise urllib.error.URLError("no network")

    declare_torchvision_ops()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = tiny.config(shards, backbone={"name": "timm:vit_small_patch16_224.dino", "kwargs": {}})
    here = tiny.Here()
    with pytest.raises(
        ValueError, match=r"the weights of backbone\.name=timm:vit_small_patch16_224\.dino are not in the"
    ):
        pipeline._run(tiny.run_in(settings, tmp_path / "run", here))
    assert here.asked == []
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")  # whose machines have caches of their own
    check_ready(settings.backbone)


def test_more_labels_than_images_are_refused(tmp_path: Path, shards: list[str]) -> None:
    with pytest.raises(ValueError, match=r"clustering\.num_labels=41 is more than the 40 training images"):
        flow_of(tmp_path, shards, clustering={"num_labels": (41,)})


def test_one_set_has_nothing_to_weigh(tmp_path: Path, shards: list[str]) -> None:
    flow = flow_of(tmp_path, shards, clustering={"num_labels": (4,)})
    assert flow.fusions == {}
    assert {m for m, spec in flow.models.items() if spec.adaptors} == {"k=4", "average", "transforms", "neighbours"}


def test_auto_climbs_a_ladder_of_labels(tmp_path: Path, shards: list[str]) -> None:
    assert list(flow_of(tmp_path, shards, clustering={"num_labels": "auto"}).labels) == [4, 8, 16, 32]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: list[str]) -> tuple[Path, Config, list[str]]:
    """A run on images without labels, one of them bad, that ends with the average of two sets."""
    root = tmp_path_factory.mktemp("run")
    settings, here = tiny.config(shards, adapt={"epochs": 1}, fuse={"variants": ("average",)}), tiny.Here()
    pipeline._run(tiny.run_in(settings, root, here))
    return root, settings, here.asked


Finished = tuple[Path, Config, list[str]]


def test_a_run_does_every_stage_once(finished: Finished) -> None:
    _, _, asked = finished
    models = ["embed_shard"] * len(tiny.SIZES)
    adapted = ["pseudo_label", "judge", "k=4", "k=6"]
    assert asked == [*models, *adapted, *models * 3, "read_truth", *["evaluate_model"] * 4]


def test_the_nodes_are_asked_for_what_is_still_to_be_made(tmp_path: Path, shards: list[str]) -> None:
    for variants, need in ((("average",), False), (("average", "neighbours"), True)):
        settings = tiny.config(shards, fuse={"variants": variants})
        flow = lay_out(settings, Store(tmp_path), ImageShards.open(settings.data.train, None), None)
        checks = pipeline.checks_of(settings, Store(tmp_path), flow)
        assert checks.root == tmp_path
        assert (checks.worker_bytes > 0) == need
        checks.read_data()


def test_a_run_without_labels_has_no_rows_and_its_report_says_so(finished: Finished) -> None:
    root, _, _ = finished
    assert json.loads((root / "report" / "metrics.json").read_text()) == {"rows": []}
    page = (root / "report" / "report.html").read_text().lower()
    assert "there is no test set (data.test), so the models were looked at on training images" in page
    assert "40 training, no test set: 40 of these were looked at" in page
    assert "augmented view finds its source" in page


def test_the_report_shows_sample_clusters_without_the_bad_image_and_how_nested_they_are(finished: Finished) -> None:
    root, _, _ = finished
    (found,) = root.glob("partitions-*/partitions.json")
    shown = [c for sheet in json.loads(found.read_text())["sheets"] for c in sheet["clusters"]]
    assert tiny.BAD not in {row for cluster in shown for row in cluster["rows"]}
    page = (root / "report" / "report.html").read_text()
    section = page[page.index('id="clusterings"') : page.index("</section>", page.index('id="clusterings"'))]
    assert section.count("<use ") == sum(len(cluster["rows"]) for cluster in shown) > 0
    assert "k=6 in k=4" in section
    assert "not an image" not in section


def test_the_report_lists_the_bad_image(finished: Finished) -> None:
    page = (finished[0] / "report" / "report.html").read_text()
    assert "part2-000000.tar" in page
    assert "UnidentifiedImageError" in page


def test_a_second_run_does_nothing_but_tell_of_the_bad_image_again(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings, _ = finished
    before, here = tiny.files_below(root), tiny.Here()
    pipeline._run(tiny.run_in(settings, root, here))
    assert here.asked == []
    told = capsys.readouterr().err
    assert "40 training images and no test set: 40 of them are looked at in its place; K = 4, 6" in told
    said = "bad images, which take part in nothing: 1 of 40 training images; "
    assert said + "the report lists them with reasons" in told
    pipeline._run(tiny.run_in(settings, root, here), until="embed")
    assert said + "features/backbone/*/bad.json list them with reasons" in capsys.readouterr().err
    after = tiny.files_below(root)
    assert {path for path in after if after[path] != before.get(path)} <= {"events.jsonl"}


def test_artefacts_of_a_run_are_whole(finished: Finished) -> None:
    root, settings, _ = finished
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)
    for artifact in [*flow.features, *flow.labels.values(), *flow.adaptors.values(), *flow.scores.values(), flow.model]:
        artifact.check()
    assert not list(root.rglob("*.partial"))


@pytest.mark.long
def test_a_run_with_all_rows_to_compare_with_scores_them_and_says_which_saw_labels(tmp_path: Path) -> None:
    train = tiny.write_shards(
        tmp_path / "train", label=lambda row: None if row % 7 == 0 else f"{row % 5}", task=lambda row: f"t{row % 2}"
    )
    test = tiny.write_shards(tmp_path / "test", (9, 12), bad=(), label=lambda row: f"{row % 4}", seed=1)
    settings = tiny.config(
        train,
        data={"train": train, "test": test, "streams": 4, "max_bad_share": 0.05},
        adapt={"epochs": 1, "supervised": True},
        fuse={"variants": ("average", *ROWS), "epochs": 1},
        evaluate={"export": "random-all"},
    )
    here = tiny.Here()
    pipeline._run(tiny.run_in(settings, tmp_path / "run", here))
    assert here.asked[0] == "read_truth"  # a run that lacks labels ends at once
    assert [name for name in here.asked if name in (*ROWS, "supervised-set")] == ["supervised-set", *ROWS]
    rows = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["backbone", "k=4", "k=6", "oracle", "average", *ROWS, "supervised-set"]
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "supervised-set and supervised: trained with the labels of the training images (10 classes of 33" in page
    assert "random 2" in page  # a set of random-all, in its attention
    model = grappa_dist.load_model(tmp_path / "run")
    assert model.sets == ["random 1", "random 2"]
    again = tiny.Here()
    pipeline._run(tiny.run_in(settings, tmp_path / "run", again))
    assert again.asked == []
