"""Whole runs without Ray: tasks run here and jobs on real ranks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grappa_dist
from grappa_dist import pipeline
from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.preflight import Checks, survey
from grappa_dist.layout import lay_out
from grappa_dist.models.spec import check_ready
from grappa_dist.plan import plan
from grappa_dist.report.verdict import conclusion
from tests.models.tiny import TIMM, timm_vit
from tests.stages import tiny
from tests.test_layout import ROWS

Finished = tuple[Path, Config, list[str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_shards(tmp_path_factory.mktemp("images"))


def test_a_check_names_a_file_that_is_no_longer_what_its_manifest_says(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.config(shards)
    pipeline.run_in(tiny.run_in(settings, tmp_path, tiny.Here()), "pseudo_label")
    workers = SimpleNamespace(workers=lambda: [1, 2], facts={}, close=lambda: None)
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: workers)
    assert pipeline.check(settings, tmp_path).endswith("2 workers can start; 7 artefacts there and whole")
    (cut,) = tmp_path.glob("labels/k=4-*/centroids.npy")
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"centroids.npy has \d+ bytes, its manifest says \d+\. A run sets them aside"):
        pipeline.check(settings, tmp_path)


def test_a_backbone_is_tried_before_any_worker_is_used_and_again_on_every_node(
    tmp_path: Path, shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    here = tiny.Here()
    odd = {"name": "tests.models.odd:by_numpy", "kwargs": {}, "image_size": 32}
    with pytest.raises(ValueError, match="each call makes other weights"):
        pipeline.run_in(tiny.run_in(tiny.config(shards, backbone=odd), tmp_path / "refused", here))
    assert here.asked == []
    odd = {"name": "tests.models.odd:with_head", "kwargs": {}, "image_size": 32}
    pipeline.run_in(tiny.run_in(tiny.config(shards, backbone=odd), tmp_path / "run", here), "embed")
    assert "1 of its parameters change no feature: head.weight" in capsys.readouterr().err
    compare = here.checks[-1].backbone
    assert compare is not None
    assert compare() == ""
    pipeline.run_in(tiny.run_in(tiny.config(shards, backbone=odd), tmp_path / "run", here), "embed")
    assert here.checks[-1].backbone is None  # nothing that needs it is missing


def test_a_check_refuses_an_image_size_before_any_worker_starts(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: pytest.fail("workers start"))
    backbone = {"name": "tests.models.tiny:create", "image_size": 20}
    with pytest.raises(ValueError, match=r"backbone\.image_size=20 .* do not reach the last 4 of 20 pixels; .*=16$"):
        pipeline.check(tiny.config(shards, backbone=backbone), tmp_path)


def test_slices_of_centroids_that_no_ranks_can_hold_are_refused_before_any_work(
    tmp_path: Path, shards: list[str]
) -> None:
    settings = tiny.config(shards, resources={"centroid_shards": len(shards) + 1, "workers": 9, "gpus_per_worker": 0})
    here, words = (
        tiny.Here(),
        rf"centroid_shards={len(shards) + 1} is more than the {len(shards)} ranks of pseudo_label",
    )
    with pytest.raises(ValueError, match=words):
        plan(settings, tmp_path)
    with pytest.raises(ValueError, match=words):
        pipeline.check(settings, tmp_path)
    with pytest.raises(ValueError, match=words):
        pipeline.run_in(tiny.run_in(settings, tmp_path, here))
    assert here.asked == []


def test_a_check_refuses_a_missing_function_as_a_run_does(tmp_path: Path) -> None:
    nothing = {"train": (), "collection": "tests.data.test_open_images:nothing"}
    with pytest.raises(ValueError, match=r"the module tests\.data\.test_open_images has no 'nothing'"):
        pipeline.check(tiny.config([], data=nothing), tmp_path)


def test_a_check_refuses_weights_of_another_model_before_any_worker_starts(
    tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: SimpleNamespace(workers=lambda: pytest.fail("workers start")))
    torch.save({"layer1.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    backbone = {"name": "tests.models.tiny:create", "image_size": 32, "checkpoint": str(tmp_path / "w.pth")}
    with pytest.raises(ValueError, match=r"w\.pth' does not fit the backbone: .*it has layer1\.0\.conv1\.weight"):
        pipeline.check(tiny.config(shards, backbone=backbone), tmp_path / "run")
    small = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    torch.save(timm_vit(TIMM, depth=13, **small).state_dict(), tmp_path / "w.pth")  # timm takes its first blocks
    backbone = {"name": TIMM, "kwargs": small, "checkpoint": str(tmp_path / "w.pth")}
    with pytest.raises(ValueError, match=r"w\.pth' does not fit the backbone: it has 13 blocks, the backbone 12"):
        pipeline.check(tiny.config(shards, backbone=backbone), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_an_error_before_any_worker_is_used(
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
        pipeline.run_in(tiny.run_in(settings, tmp_path / "run", here))
    assert here.asked == []
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")  # whose machines have other caches
    check_ready(settings.backbone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("grappa_dist.demo.backbon:create", "grappa_dist.demo.backbon"),
    ],
)
def test_a_wrong_name_of_the_backbone_is_an_error_before_shards_are_made(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(9):
        (tmp_path / "photos" / f"{number}.png").write_bytes(tiny.picture(number))
    settings = tiny.config([str(tmp_path / "photos")], backbone={"name": name, "kwargs": {}})
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.run_in(tiny.run_in(settings, tmp_path / "run", tiny.Here()))
    assert not (tmp_path / "run" / "shards").exists()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, finished: Finished) -> tuple[Config, pipeline.Finished]:
    """The same run, now with test images that have labels, which choose the model."""
    root = tmp_path_factory.mktemp("labelled")
    shutil.copytree(finished[0], root, dirs_exist_ok=True, symlinks=True)
    test = tiny.write_shards(root / "images", label=lambda row: str(row % tiny.GROUPS), seed=1)
    old = finished[1]
    data, evaluate = {**old.data.model_dump(), "test": test}, {**old.evaluate.model_dump(), "export": "auto"}
    settings, here = Config.model_validate({**old.model_dump(), "data": data, "evaluate": evaluate}), tiny.Here()
    found = pipeline.run_in(tiny.run_in(settings, root, here))
    assert found is not None
    assert {"k=4", "pseudo_label"}.isdisjoint(here.asked)  # nothing is trained again
    return settings, found


def test_a_model_chosen_by_half_of_the_queries_is_exported_and_says_why(
    labelled: tuple[Config, pipeline.Finished],
) -> None:
    settings, found = labelled
    assert found.verdict is not None
    config = json.loads((found.model / "config.json").read_text())
    assert config["variant"] == found.verdict.exported
    assert config["why"]["validation"] == found.verdict.validation
    assert set(found.verdict.validation) == {"backbone", "average", "k=4", "k=6"}
    assert found.model.resolve().name.startswith("auto-")
    flow = lay_out(
        settings,
        Store(found.model.parent),
        *(ImageShards.open(p, None) for p in (settings.data.train, settings.data.test)),
    )
    assert flow.model.path == found.model.resolve()
    model = grappa_dist.load_model(found.model, trust_modules=True)
    assert model(torch.rand(2, 3, tiny.SIZE_PX, tiny.SIZE_PX)).shape == (2, 16)


def test_galleries_show_the_chosen_model_beside_the_backbone(labelled: tuple[Config, pipeline.Finished]) -> None:
    _, found = labelled
    assert found.verdict is not None
    lanes = set(re.findall(r'class="lane"><p>([^<]*)', (found.report / "report.html").read_text()))
    assert lanes == {"backbone", "average", found.verdict.compared}


def test_what_is_printed_last_and_what_metrics_say_is_the_verdict(labelled: tuple[Config, pipeline.Finished]) -> None:
    _, found = labelled
    assert found.verdict is not None
    lines = found.text().splitlines()
    assert lines[-1] == conclusion(found.verdict, str(found.model.parent)).replace("−", "-")
    metrics = json.loads((found.report / "metrics.json").read_text())
    assert metrics["verdict"]["mean"]["gain"] == found.verdict.mean.gain
    assert metrics["verdict"]["exported"] == found.verdict.exported
    queries = found.verdict.mean.queries + found.verdict.validation_queries
    assert queries == metrics["rows"][0]["queries"] == tiny.NUM_ROWS - 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: list[str]) -> tuple[Path, Config, list[str]]:
    """A run on images without labels, one of them bad, that ends with the average of two sets."""
    root = tmp_path_factory.mktemp("run")
    settings, here = tiny.config(shards, adapt={"epochs": 1}, fuse={"variants": ("average",)}), tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root, here))
    return root, settings, here.asked


def test_a_run_does_every_stage_once(finished: Finished) -> None:
    _, _, asked = finished
    shards = ["embed_shards"] * len(tiny.SIZES)
    adapted = ["pseudo_label", "compute_statistics", "k=4", "k=6"]
    # by the backbone, and later in one pass by both sets and their average
    assert asked == [*shards, *adapted, *shards, "read_ground_truth", "evaluate"]


def test_the_nodes_are_checked_for_what_is_still_to_be_made(tmp_path: Path, shards: list[str]) -> None:
    for variants, need in ((("average",), False), (("average", "neighbours"), True)):
        settings = tiny.config(shards, fuse={"variants": variants})
        flow = lay_out(settings, Store(tmp_path), ImageShards.open(settings.data.train, None), None)
        checks = pipeline.checks_of(settings, Store(tmp_path), flow)
        assert checks.root == tmp_path
        assert (checks.worker_bytes > 0) == need
        checks.read_data()


def test_a_run_without_labels_has_no_rows_and_its_report_says_so(finished: Finished) -> None:
    root, _, _ = finished
    assert json.loads((root / "report" / "metrics.json").read_text()) == {"rows": [], "verdict": None}
    page = (root / "report" / "report.html").read_text().lower()
    assert "there is no test set (data.test), so the models were looked at on training images" in page
    assert "40 training, no test set: 40 of them looked at" in page
    assert "augmented view finds its source" in page


def test_without_labels_the_last_lines_say_what_is_not_known_and_what_would_settle_it(tmp_path: Path) -> None:
    for has_test, why in ((True, ["None of 3 test images has a label."]), (False, [])):
        found = pipeline.Finished(tmp_path / "report", tmp_path / "model", [], None, [], has_test, "", "".join(why))
        report, place, unknown, *said, command = found.text().splitlines()
        assert (report[:6], place, said) == ("report", f"model   {tmp_path / 'model'}", why)
        assert unknown.startswith("Not known: whether this model is better than the backbone")
        assert command.endswith(f"grappa-dist evaluate --model {tmp_path} --images FOLDER")


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
    assert "that can be read" in page


def test_a_second_run_does_nothing_but_tell_of_the_bad_image_again(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings, _ = finished
    before, here = tiny.files_below(root), tiny.Here()
    done = pipeline.run_in(tiny.run_in(settings, root, here))
    assert here.asked == []
    assert done is not None
    listed = root / "bad_images.csv"
    assert f"\nleft out  1 of 40 training images could not be used: named, with reasons, in {listed}\n" in done.text()
    assert 'part2-000000.tar: 000000001,"no JPEG' in listed.read_text()
    printed = capsys.readouterr().err
    assert "40 training images and no test set: 40 of them are looked at in its place; K = 4, 6" in printed
    message = "left out: 1 of 40 training images could not be used; "
    assert "could not be used" not in printed  # said once, at the end
    pipeline.run_in(tiny.run_in(settings, root, here), until="embed")
    assert message + "features/backbone/*/bad.json list them with reasons" in capsys.readouterr().err
    after = tiny.files_below(root)
    assert {path for path in after if after[path] != before.get(path)} <= {"events.jsonl"}


def test_weights_are_required_only_while_something_is_missing_that_needs_them(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: object) -> None:
        raise ValueError("no weights")

    root, settings = shutil.copytree(finished[0], tmp_path / "run", symlinks=True), finished[1]
    monkeypatch.setattr(pipeline, "check_ready", gone)
    workers = SimpleNamespace(workers=lambda: [1, 2], facts={}, close=lambda: None)
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: workers)
    assert "artefacts there and whole" in pipeline.check(settings, root)
    pipeline.run_in(tiny.run_in(settings, root, tiny.Here()))
    (adaptors,) = root.glob("adaptors/k=6-*")
    shutil.rmtree(adaptors)  # the features that it is made with are there
    here = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root, here), until="pseudo_label")
    for end in (None, "adapt"):
        with pytest.raises(ValueError, match="no weights"):
            pipeline.run_in(tiny.run_in(settings, root, here), until=end)
    with pytest.raises(ValueError, match="no weights"):
        pipeline.check(settings, root)
    assert here.asked == []


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
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", here))
    assert here.asked[0] == "read_ground_truth"  # a run that lacks labels ends at once
    assert [name for name in here.asked if name in (*ROWS, "supervised-set")] == ["supervised-set", *ROWS]
    rows = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["backbone", "k=4", "k=6", "oracle", "average", *ROWS, "supervised-set"]
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "supervised-set and supervised: trained with the labels of the training images (10 classes of 33" in page
    assert "random 2" in page  # a set of random-all, in its attention
    model = grappa_dist.load_model(tmp_path / "run")
    assert model.sets == ["random 1", "random 2"]
    again = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", again))
    assert again.asked == []


READ_ONLY: set[str] = set()  # folders that the hook guards; a hook stays for as long as the process
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime")


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(c in (mode or "") for c in "wax+")
    else:
        path, writes = arguments[0], event in WRITES
    if writes and READ_ONLY and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(tuple(READ_ONLY)):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))


@pytest.fixture(scope="module")
def hooked() -> None:
    sys.addaudithook(lambda event, arguments: _refuse(event, arguments) if READ_ONLY else None)


@pytest.fixture
def read_only(hooked: None, finished: Finished) -> Iterator[tuple[Path, Config]]:
    root, settings, _ = finished
    READ_ONLY.add(str(root))
    yield root, settings
    READ_ONLY.clear()


def test_the_plan_and_the_check_of_a_finished_run_write_nothing(
    read_only: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, settings = read_only
    with pytest.raises(OSError, match="Read-only"):
        (root / "x").write_text("x")
    before = tiny.files_below(root)
    assert "all reused" in plan(settings, root)
    surveyed = list[str]()

    class Cluster(SimpleNamespace):
        checks: Checks

        def workers(self) -> list[int]:
            assert not self.checks.writes
            surveyed.append(survey(self.checks, None, "id", "here", workers=1, gpu=False).storage)
            return [1, 2]

    monkeypatch.setattr(pipeline, "Cluster", lambda *_: Cluster(facts={}, close=lambda: None))
    assert "artefacts there and whole" in pipeline.check(settings, root, deep=True)
    assert surveyed == [""]
    assert tiny.files_below(root) == before
    only_read = r"cannot be written to: Read-only"
    with pytest.raises(ValueError, match=only_read), Store(root).lock():
        pass
    elsewhere = Checks(root / "nowhere", lambda: None, writes=False)
    assert "is not there" in survey(elsewhere, None, "id", "here", workers=1, gpu=False).storage
