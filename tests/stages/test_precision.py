from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.config import Config, read
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.models.spec import ModelSpec, backbone_settings
from grappa_dist.stages import precision
from grappa_dist.stages.embed import features_of
from grappa_dist.stages.precision import PRECISION_FILE, record, settle, settled
from grappa_dist.stages.run import Run
from grappa_dist.variants import BACKBONE
from tests.test_layout_names import made_up_shards

TRAIN = made_up_shards("train", 6, 3)


def config(asked: str = "auto") -> Config:
    tree: dict[str, Any] = {"name": "a", "data": {"train": ["none"]}, "backbone": {"name": "timm:vit_tiny_patch16_224"}}
    return read(tree, [f"backbone.precision={asked}"])


def run_in(root: Path, of: Config, gpus: bool = False, log: Callable[[str], None] = lambda line: None) -> Run:
    console = SimpleNamespace(log=log, event=lambda name, **figures: None, stage=nullcontext)
    return cast(Run, Run(of, Store(root), cast(Any, SimpleNamespace(has_gpus=lambda: gpus)), cast(Any, console)))


def features(root: Path, of: Config, images: ImageShards = TRAIN) -> tuple[Any, ...]:
    return features_of(Store(root), ModelSpec(BACKBONE, of.backbone), of.embed, images)


def commit_one(root: Path, of: Config) -> None:
    one = features(root, of)[1]
    one.begin()
    one.commit()


@pytest.mark.parametrize(("gpus", "found"), [(False, "fp32"), (True, "bf16")])
def test_auto_settles_by_the_workers_once_and_stays_on_other_machines(tmp_path: Path, gpus: bool, found: str) -> None:
    first = settle(run_in(tmp_path, config(), gpus), TRAIN)
    assert first.config.backbone.computes_in == found
    record(first)
    again = settle(run_in(tmp_path, config(), not gpus), TRAIN)
    assert again.config.backbone.computes_in == found == settled(config(), Store(tmp_path), TRAIN).backbone.computes_in


def test_a_run_beside_gpus_says_that_it_goes_on_in_fp32_and_what_would_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = list[str]()
    record(settle(run_in(tmp_path, config()), TRAIN))
    monkeypatch.setattr(precision, "may_have_gpus", lambda resources: True)
    settle(run_in(tmp_path, config(), gpus=True, log=lines.append), TRAIN)
    assert lines == [
        "precision: float32 (as the run directory began); backbone.precision=bf16 is faster on GPUs, and another result"
    ]
    settle(run_in(tmp_path, config("fp32"), gpus=True, log=lines.append), TRAIN)
    assert len(lines) == 1


def test_a_run_that_is_killed_before_its_record_goes_on_as_its_features_were_computed(tmp_path: Path) -> None:
    commit_one(tmp_path, config("bf16"))
    assert settle(run_in(tmp_path, config()), TRAIN).config.backbone.computes_in == "bf16"


def test_a_run_directory_that_is_older_than_the_setting_stays_in_fp32(tmp_path: Path) -> None:
    commit_one(tmp_path, config())
    assert settle(run_in(tmp_path, config(), gpus=True), TRAIN).config.backbone.computes_in == "fp32"


def test_what_is_asked_for_holds_and_is_what_auto_goes_on_with(tmp_path: Path) -> None:
    record(settle(run_in(tmp_path, config(), gpus=True), TRAIN))
    asked = settle(run_in(tmp_path, config("fp32"), gpus=True), TRAIN)
    assert asked.config.backbone.computes_in == "fp32"
    record(asked)
    assert settle(run_in(tmp_path, config(), gpus=True), TRAIN).config.backbone.computes_in == "fp32"


def test_a_damaged_record_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / PRECISION_FILE).write_text('{"precision"')
    assert settle(run_in(tmp_path, config(), gpus=True), TRAIN).config.backbone.computes_in == "bf16"


def names(of: Config, root: Path) -> set[str]:
    flow = lay_out(of, Store(root), TRAIN, None)
    models = {a.name for found in flow.test_features.values() for a in found}
    trained = {a.name for a in (*flow.adaptors.values(), *flow.fusions.values(), *flow.labels.values())}
    return (
        {a.name for a in flow.features} | models | trained | {a.name for a in flow.scores.values()} | {flow.model.name}
    )


def test_no_artefact_of_one_precision_has_the_name_of_one_of_the_other(tmp_path: Path) -> None:
    fp32, bf16 = names(config("fp32"), tmp_path), names(config("bf16"), tmp_path)
    assert fp32 == names(config(), tmp_path)
    assert len(fp32) == len(bf16)
    assert not fp32 & bf16


def test_the_exported_backbone_too_is_named_by_its_precision(tmp_path: Path) -> None:
    def exported(asked: str) -> str:
        of = config(asked).model_copy(update={"evaluate": config().evaluate.model_copy(update={"export": BACKBONE})})
        return lay_out(of, Store(tmp_path), TRAIN, None).model.name

    assert exported("fp32") == exported("auto") != exported("bf16")


@pytest.mark.parametrize(("asked", "named"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_settings_of_fp32_name_what_they_named_before_there_was_a_precision(asked: str, named: bool) -> None:
    assert ("precision" in backbone_settings(config(asked).backbone)) == named


def test_settings_that_are_written_are_read_as_the_same() -> None:
    def kept(asked: str) -> object:
        return json.loads(config(asked).backbone.model_dump_json()).get("precision")

    assert [kept(asked) for asked in ("auto", "fp32", "bf16")] == [None, "fp32", "bf16"]
