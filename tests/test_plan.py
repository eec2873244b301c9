from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grappa_dist import rates
from grappa_dist.artifacts import Store
from grappa_dist.config import BackboneConfig, Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.models import Backbone, PackedGrappa, trial
from grappa_dist.models.spec import build_backbone
from grappa_dist.plan import plan
from grappa_dist.rates import measure, store_rates
from grappa_dist.training.memory import memory_budget
from tests.models.tiny import TIMM, TIMM_KWARGS, timm_vit
from tests.stages import tiny

SECTIONS: dict[str, Any] = {
    "clustering": {"num_labels": (4, 8)},
    "fuse": {"variants": ("average", "transforms", "neighbours")},
}


def lines_of(config: Config, root: Path) -> dict[str, str]:
    text = plan(config, root)
    table = text[text.index("run directory") :]
    return {line[:14].strip(): line[14:].strip() for line in table.splitlines()}


def test_a_plan_names_every_stage_with_its_steps_and_writes_nothing(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS)
    (Path(settings.data.train[0]) / "index.json").unlink()  # not even an index for shards that have none
    before = tiny.files_below(tmp_path)
    lines = lines_of(settings, tmp_path / "run")
    assert tiny.files_below(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert "40 training images" in lines["embed"]
    assert "K = 4, 8" in lines["pseudo_label"]
    assert "2 jobs of 1 rank, 21 steps of 16 images" in lines["adapt"]
    assert "of K = 8: 8 classes a rank; rows and Adam 36 KiB a rank" in lines["classifier"]
    assert (
        "transforms, neighbours; one job each on all workers, 12 steps of 16 pairs, exact k-NN graph" in lines["fuse"]
    )
    assert "6 models on 40 training images, as there is no data.test, 360 KiB of features" in lines["evaluate"]
    for stage, number in {"embed": 4, "pseudo_label": 2, "partitions": 1, "adapt": 2, "fuse": 2}.items():
        assert f"0 of {number} reused" in lines[stage]


def test_a_plan_warns_of_ranks_that_would_have_no_images(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "images")
    settings = tiny.config(paths, data={"streams": 3}, resources={"workers": 5, "adapt_ranks": 4}, **SECTIONS)
    text = re.findall(
        r"warning: (\d+) ranks, but data.streams=3, .*: (\d+) ranks have no images; at least data.streams=(\d+)",
        plan(settings, tmp_path / "run"),
    )
    assert text == [("4", "1", "4"), ("5", "2", "5")]
    assert "warning" not in plan(settings.model_copy(update={"data": settings.data.model_copy(update={"streams": 5})}),
                                 tmp_path / "run")  # fmt: skip


def test_a_plan_names_the_jobs_of_rows_to_compare_with(tmp_path: Path) -> None:
    rows = ("average", "random-one", "random-all", "supervised")
    settings = tiny.config(
        tiny.write_shards(tmp_path / "images"),
        clustering={"num_labels": (4, 8)},
        adapt={"supervised": True},
        fuse={"variants": rows},
    )
    lines = lines_of(settings, tmp_path / "run")
    assert lines["fuse"].startswith("random-one, random-all; one job each on all workers, 12 steps of 16 pairs, exact")
    assert "0 of 2 reused" in lines["fuse"]
    assert "labels of the training images, read before anything else; one task; 0 of 2 reused" in lines["true_labels"]
    for name, ranks in {"supervised-set": "1 rank", "supervised": "all ranks"}.items():
        assert f"one job on {ranks}, at most 21 steps of 16 images; 0 of 1 reused" in lines[name]
    assert "8 models on 40 training images" in lines["evaluate"]
    assert not {"true_labels", "supervised-set"} & set(lines_of(tiny.config(settings.data.train), tmp_path / "run"))


def test_a_plan_prices_the_projector_in_memory_and_traffic(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "images")
    settings = tiny.config(shards, **{**SECTIONS, "fuse": {**SECTIONS["fuse"], "projector": (8192, 8192, 8192)}})
    lines = lines_of(settings, tmp_path / "run")
    projector = 384 * 8192 + 2 * 8192**2  # the paper's, 137 million parameters
    assert f"projector, gradients and momentum {16 * projector / 2**30:.1f} GiB" in lines["rough bytes"]
    assert "correlation matrix 256 MiB" in lines["rough bytes"]
    pairs = 8 * (16 * 8192 + 8 * 8192) // 2  # of 16 pairs, all second views and half of the first, there and back
    assert (
        f"on 2 ranks a step sends and receives about {(4 * projector + pairs) / 2**20:.0f} MiB each"
        in (lines["fuse traffic"])
    )
    assert f"and their gradients {pairs / 2**10:.0f} KiB" in lines["fuse traffic"]
    assert "cut up by rows, a rank holds 131 MiB" in lines["fuse traffic"]  # half of the matrix, and pairs
    small = lines_of(tiny.config(shards, **{**SECTIONS, "fuse": {**SECTIONS["fuse"], "projector": (8, 8)}}), tmp_path)
    assert "whole on every rank, a rank holds 256 B" in small["fuse traffic"]


def test_a_plan_shows_what_waits_for_what_and_the_memory_of_a_step(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "images")
    timm = {"name": "timm:vit_tiny_patch16_224", "kwargs": TIMM_KWARGS, "image_size": 32}

    def plan_with(**sections: Any) -> str:
        return plan(tiny.config(paths, **{**SECTIONS, **sections}), tmp_path / "run")

    text = plan_with(backbone=timm)
    assert "on 2 workers: 2 jobs of 1 rank, all at once" in text
    (line,) = (line for line in text.splitlines() if "activations in float32" in line)
    assert "a rank for 16 images and 1 set (" in line
    several = {"sets_per_job": 2, "micro_batch": 5}
    text = plan_with(backbone=timm, adapt=several, resources={"adapt_ranks": 2})
    assert "2 sets in 1 job of 2 ranks, 21 steps" in text
    assert "a rank for 5 images and 2 sets (" in text
    text = plan_with(backbone=timm, adapt={"sets_per_job": "auto"})
    assert "2 sets in jobs of 1 rank, as many to a job as measured rates say" in text
    assert "; counted for one set, of which auto may put several in a job" in text


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plan_prices_an_image_as_the_choice_of_the_micro_batch_does(tmp_path: Path, recompute: bool) -> None:
    timm = {"name": "timm:vit_tiny_patch16_224", "kwargs": {"depth": 4}, "image_size": 224}
    adapt = {"activation_checkpointing": recompute, "sets_per_job": 2}
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS, backbone=timm, adapt=adapt)
    (line,) = (line for line in plan(settings, tmp_path).splitlines() if "activations in float32" in line)

    def takes(recompute: bool) -> int:  # a model of real tensors
        backbone = build_backbone(settings.backbone, pretrained=False)
        return memory_budget(PackedGrappa(backbone, 1, settings.adapt.bottleneck, recompute=recompute), 1).image_bytes

    found = re.search(
        rf": (\S+) MiB an image and set \((\S+) with{'out' * recompute} adapt\.activation_checkpointing\), (\S+) GiB",
        line,
    )
    assert found is not None
    each, other, total = map(float, found.groups())
    assert each == pytest.approx(takes(recompute) / 2**20, rel=0.05)  # a decimal; without values other kernels count
    assert other == pytest.approx(takes(not recompute) / 2**20, rel=0.05)
    assert abs(each - other) > 1
    assert total == pytest.approx(16 * each / 2**10, abs=0.06)  # on a CPU 8 of the 16 images at a time, for two sets


def test_more_ranks_than_workers_are_refused_by_the_plan(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), resources={"adapt_ranks": 3}, **SECTIONS)
    with pytest.raises(ValueError, match=r"resources\.adapt_ranks=3 is more than the 2 workers: 1 missing"):
        plan(settings, tmp_path / "run")


def test_with_elastic_jobs_are_planned_with_the_workers_that_there_are(tmp_path: Path) -> None:
    where = {"adapt_ranks": 3, "elastic": True}
    text = plan(tiny.config(tiny.write_shards(tmp_path / "images"), resources=where, **SECTIONS), tmp_path / "run")
    assert "on 2 workers: 2 jobs of 2 ranks, one after the other, in 2 waves" in text


def test_a_plan_shows_what_is_reused(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS)
    root = tmp_path / "run"
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)
    for artifact in (*flow.features, flow.labels[8]):
        np.save(artifact.begin() / "rows.npy", np.zeros((1, 16), dtype=np.float32))
        artifact.commit()
    lines = lines_of(settings, root)
    assert "all reused" in lines["embed"]
    assert "1 of 2 reused" in lines["pseudo_label"]
    assert "0 of 2 reused" in lines["adapt"]


def test_a_plan_shows_sizes_for_the_channels_that_are_known(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "images")
    timm = {"name": "timm:vit_tiny_patch16_224", "kwargs": TIMM_KWARGS, "image_size": 32}
    lines = lines_of(tiny.config(paths, **SECTIONS, backbone=timm), tmp_path / "run")
    text = "timm:vit_tiny_patch16_224: 24 channels; image_size=32, resize=crop, interpolation=bicubic"
    assert lines["backbone"] == text
    assert lines["rough bytes"].startswith("(at 24 channels) features 4 KiB,")
    assert lines["classifier"].startswith("(at 24 channels)")
    own = tiny.config(paths, **SECTIONS)
    assert lines_of(own, tmp_path / "run")["rough bytes"].startswith("(at 384 channels)")
    assert lines_of(own, tmp_path / "run")["backbone"].endswith(
        "not built for this plan; sizes below are those of 384 channels"
    )
    flow = lay_out(own, Store(tmp_path / "run"), ImageShards.open(own.data.train, None), None)
    np.save(flow.features[0].begin() / "rows.npy", np.zeros((1, 16), dtype=np.float32))
    flow.features[0].commit()
    assert lines_of(own, tmp_path / "run")["rough bytes"].startswith("(at 16 channels)")
    assert lines_of(own, tmp_path / "run")["backbone"].endswith(": 16 channels, by its features")


def test_a_plan_refuses_an_image_size_that_a_model_of_timm_does_not_take(tmp_path: Path) -> None:
    timm = {"name": "timm:vit_tiny_patch16_224", "kwargs": {}, "image_size": 100}
    with pytest.raises(ValueError, match=r"backbone\.image_size=100 .* such as backbone\.image_size=96$"):
        plan(tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS, backbone=timm), tmp_path / "run")


def test_a_plan_builds_the_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = list[str]()

    def build(config: BackboneConfig, *, pretrained: bool = True) -> Backbone:
        built.append(config.name)
        return build_backbone(config, pretrained=pretrained)

    monkeypatch.setattr("grappa_dist.plan.build_backbone", build)
    timm = {"name": "timm:vit_tiny_patch16_224", "kwargs": {"depth": 2}, "image_size": 224}
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS, backbone=timm)
    text = plan(settings, tmp_path / "run")
    assert "192 channels; image_size=224" in text
    assert "(at 192 channels)" in text
    assert "activations in float32" in text
    assert built == ["timm:vit_tiny_patch16_224"]


def test_a_plan_ends_with_every_setting(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS)
    text = plan(settings, tmp_path / "run")
    assert text.startswith("run directory")
    assert text.endswith(f"\n\n{settings.yaml()}")


def test_a_plan_shows_what_a_classifier_takes_of_a_rank(tmp_path: Path) -> None:
    sections = {**SECTIONS, "clustering": {"num_labels": (4, 37)}, "resources": {"adapt_ranks": 2}}
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **sections, adapt={"sampled_classes": 0.5})
    text = lines_of(settings, tmp_path / "run")["classifier"]
    assert "of K = 37: 19 classes a rank; 50% of them in a step; rows and Adam 86 KiB a rank" in text
    assert "a step 0.000467 GFLOP a rank" in text  # 8 x 16 images x 9.5 classes x 384


def test_a_plan_adds_up_the_classifiers_of_sets_that_share_a_job(tmp_path: Path) -> None:
    sections = {**SECTIONS, "clustering": {"num_labels": (4, 37, 9)}, "adapt": {"sets_per_job": 2}}
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **sections)
    assert "of K = 37, 9: 46 classes a rank" in lines_of(settings, tmp_path / "run")["classifier"]


def test_a_plan_gives_seconds_of_a_core_only_where_workers_have_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS)

    def shows_seconds(gpus: int | str) -> bool:
        where = settings.resources.model_copy(update={"gpus_per_worker": gpus})
        lines = lines_of(settings.model_copy(update={"resources": where}), tmp_path / "run")
        return lines["classifier"].endswith(" s of a CPU core")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert (shows_seconds(0), shows_seconds(1), shows_seconds("auto")) == (True, False, not here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert (shows_seconds(0), shows_seconds("auto")) == (True, False)


def test_a_data_set_that_is_to_be_generated_is_planned_without_generating_it(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "train": (),
        "collection": "tests.data.test_open_images:draw",
        "collection_kwargs": {"count": 20},
    }
    lines = lines_of(tiny.config([], data=data, **SECTIONS), tmp_path / "run")
    assert "generates 20 training and 3 test images" in lines["load"]
    assert "14 steps of 16 images" in lines["adapt"]
    assert "to be made" in lines["fuse"]
    assert not (tmp_path / "run").exists()


def test_a_plan_with_more_labels_than_images_is_refused(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), clustering={"num_labels": (4, 64)})
    with pytest.raises(ValueError, match=r"clustering\.num_labels=64"):
        plan(settings, tmp_path / "run")


def test_a_plan_trains_no_fusion_of_a_single_set_and_shows_the_memory_of_k_means(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "images")
    one = tiny.config(shards, clustering={"num_labels": (4,)}, fuse={"variants": ("average", "neighbours")})
    text = plan(one, tmp_path / "run")
    words = "one adaptor set only, so there is nothing to fuse: average, neighbours will score as that set does ("
    assert re.search(r"^fuse {11}" + re.escape(words) + r"clustering\.num_labels with two K or more .*\)$", text, re.M)
    assert "fuse traffic" not in text
    assert f"k-means of K = 4 {56 * 4 * 384 // 1024} KiB" in text
    several = one.model_copy(update={"clustering": one.clustering.model_copy(update={"num_labels": (4, 6)})})
    assert "fuse           neighbours; one job each" in plan(several, tmp_path / "run")
    untrained = several.model_copy(update={"fuse": several.fuse.model_copy(update={"variants": ("average",)})})
    assert "fuse           nothing to train: none of fuse.variants learns from pairs\n" in plan(untrained, tmp_path)
    with_random = one.model_copy(update={"fuse": one.fuse.model_copy(update={"variants": ("average", "random-all")})})
    assert "to fuse: average will score as that set does" in lines_of(with_random, tmp_path / "run")["fuse"]
    assert "0 of 1 reused" in lines_of(with_random, tmp_path / "run")["fuse"]


def test_a_plan_warns_of_images_missing_in_a_damaged_tar_and_ends_as_the_run_would(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), data={"max_bad_share": 0.5}, **SECTIONS)
    folder = Path(settings.data.train[2])
    (folder / "index.json").unlink()
    tar = next(folder.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2 + 100])  # inside a member
    text = plan(settings, tmp_path / "run")
    assert re.search(rf"\nwarning: about \d+ images? (is|are) missing in {re.escape(str(tar))}", text)
    strict = settings.model_copy(update={"data": settings.data.model_copy(update={"max_bad_share": 0.05})})
    with pytest.raises(ValueError, match=r"images are bad \(about \d+ have no row\)"):
        plan(strict, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:crossvit_9_240", "CrossVit.patch_embed is a ModuleList"),
        ("timm:deepseek_vit_412m_enc", "a forward pass of images of .* pixels raises NotImplementedError"),
        ("tests.models.odd:nothing", "has no 'nothing'; its functions: wrapped, with_block"),
        ("tests.models.odd:with_block", "backbone.kwargs={} lacks name"),
        ("tests.models.odd:NUMBER", "'NUMBER' is of type int, expected a function"),
        ("no_such_module:create", "there is no module 'no_such_module'"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused_as_far_as_that_is_seen_without_building_it(
    name: str, words: str, tmp_path: Path
) -> None:
    settings = Config(name="x", data={"train": ["demo"]}, backbone={"name": name})
    with pytest.raises(ValueError, match=words):
        plan(settings, tmp_path)


@pytest.mark.parametrize("name", [TIMM, "tests.models.tiny:create"])
def test_a_checkpoint_that_cannot_be_used_is_refused_by_the_plan(name: str, tmp_path: Path) -> None:
    shards, path = tiny.write_shards(tmp_path / "images"), tmp_path / "w.pth"

    def planned(**tensors: Any) -> str:
        if tensors:
            torch.save(tensors, path)
        return plan(tiny.config(shards, backbone={"name": name, **kwargs, "checkpoint": str(path)}), tmp_path / "run")

    kwargs: dict[str, Any] = {"kwargs": TIMM_KWARGS} if name == TIMM else {"kwargs": {}}
    with pytest.raises(ValueError, match=r"^backbone\.checkpoint='.*w\.pth' does not exist$"):
        planned()
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="it is a web page"):
        planned()
    if name == TIMM:
        with pytest.raises(ValueError, match="it has 1 block, the backbone 2"):
            planned(**timm_vit(**{**TIMM_KWARGS, "depth": 1}).state_dict())
        assert "\nwarning: backbone.checkpoint=" in planned(
            **timm_vit(**TIMM_KWARGS).state_dict(), decoder=torch.ones(1)
        )


@pytest.mark.parametrize(
    ("collection", "words"),
    [
        ("tests.data.test_open_images:nothing", "the module tests.data.test_open_images has no 'nothing'"),
        ("tests.data.test_open_images:COLLECTION", "'COLLECTION' is of type str, expected a function"),
        ("tests.nowhere:draw", "No module named 'tests.nowhere'; is its folder on PYTHONPATH?"),
        ("tests.models.tiny:create", r"a plan needs the numbers of images; .*expected sizes\("),
    ],
)
def test_a_data_set_that_cannot_be_generated_is_refused_by_the_plan(
    collection: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^data\.collection={collection}: .*{words}"):
        plan(tiny.config([], data={"train": (), "collection": collection}), tmp_path / "run")


def test_a_plan_of_a_folder_of_images_says_how_long_it_takes_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(tiny.picture(number))
    settings, before = tiny.config([str(tmp_path / "photos")], **SECTIONS), tiny.files_below(tmp_path)
    monkeypatch.setattr(rates, "PART_S", 0.01)
    text = plan(settings, tmp_path / "run", measured=True)
    assert tiny.files_below(tmp_path) == before
    lines = text.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("time  "))
    assert re.search(r"about .* on 2 workers, by rates measured on this machine in ", lines[place])
    assert re.search(r"start .*, shards .*, embed .*, adapt .*, fuse .*, evaluate .*, report ", lines[place + 1])
    assert lines[place + 2].startswith("memory         about")
    assert lines[place + 3].startswith("disk           about")
    assert place < lines.index("name: tiny")
    assert "time  " not in plan(settings, tmp_path / "run")  # nobody has measured
    store_rates(tmp_path / "run", measure(settings, 2, build_backbone(settings.backbone), [], fuses=True))
    text = plan(settings, tmp_path / "run", measured=True)
    assert "on 2 workers, by rates that were measured here before\n" in text
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert "; the machines of the cluster may be others, and more\n" in plan(settings, tmp_path / "run")


PLANNED = """
import sys
from pathlib import Path
from grappa_dist.config import load
from grappa_dist.plan import plan
print(plan(load(sys.argv[1], []), Path(sys.argv[2]), measured=True), end="")
print(*[name for name in ("timm", "torchvision", "torch._dynamo", "deepspeed", "faiss", "ray") if name in sys.modules])
"""


def test_a_plan_of_a_run_that_knows_its_backbone_says_the_same_and_imports_nothing_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PART_S", 0.01)
    monkeypatch.setattr(trial, "KEPT_FROM_S", 1e9)
    weights, root = tmp_path / "vit.safetensors", tmp_path / "run"
    save_file({**timm_vit(**TIMM_KWARGS).state_dict(), "decoder": torch.ones(1)}, weights)
    timm = {"name": TIMM, "kwargs": TIMM_KWARGS, "image_size": 32, "checkpoint": str(weights)}
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), **SECTIONS, backbone=timm)
    store_rates(root, measure(settings, 2, build_backbone(settings.backbone, pretrained=False), [], fuses=True))
    built = plan(settings, root, measured=True).splitlines()
    trial.verdict_of(settings.backbone, root / "index")
    (tmp_path / "config.yaml").write_text(settings.yaml())
    command = [sys.executable, "-c", PLANNED, str(tmp_path / "config.yaml"), str(root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    *known, imported = done.stdout.splitlines()
    assert [line for line in known if " free " not in line] == [line for line in built if " free " not in line]
    assert any(line.startswith("warning: backbone.checkpoint=") for line in known)
    assert any("activations in float32" in line for line in known)
    assert imported == ""
