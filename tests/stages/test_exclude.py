"""Excluded images: found by their names, in nothing that follows; near-duplicates that take turns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grappa_dist import pipeline
from grappa_dist.artifacts import Store, label_rows
from grappa_dist.config import Config
from grappa_dist.console import read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.distributed.collectives import Comm
from grappa_dist.layout import lay_out
from grappa_dist.models.spec import build_backbone
from grappa_dist.plan import plan
from grappa_dist.stages.evaluate import QUERIES_FILE
from grappa_dist.stages.exclude import excluded_rows, turns_of
from grappa_dist.stages.flow import Exclusion, Flow
from grappa_dist.training.batches import TrainingImages, Turns, augmented_batches
from tests.processes import run_ranks
from tests.stages import tiny

COPIES = {0: (12, 14, 38), 20: (21,)}  # near-duplicates by the row that stays: in other shards, and in one
DROPPED = sorted(row for rows in COPIES.values() for row in rows)
OUTLIER = 33
LISTED = sorted([*DROPPED, OUTLIER])


def write_shards(folder: Path) -> list[str]:
    """The tiny shards, with the names of files; rows that are near-duplicates have the same image."""
    same = {copy: first for first, rows in COPIES.items() for copy in rows}
    paths, row = [], 0
    for number, size in enumerate(tiny.SIZES):
        paths.append(str(folder / f"part-{number}"))
        with ShardWriter(paths[-1], rows_per_shard=None, prefix=f"part{number}") as writer:
            for _ in range(size):
                image = b"no image" if row == tiny.BAD else tiny.picture(same.get(row, row))
                writer.write(image, "png", label=f"group {row % tiny.GROUPS}", name=f"photos/{row}.png")
                row += 1
    return paths


def write_lists(folder: Path) -> tuple[str, str]:
    """A list of the near-duplicates, and one of an outlier and a name that no image has."""
    groups, others = folder / "groups.csv", folder / "others.csv"
    lines = [(first, row, int(row != first)) for first, rows in COPIES.items() for row in (first, *rows)]
    groups.write_text("group,name,drop\n" + "".join(f"{g},photos/{row}.png,{drop}\n" for g, row, drop in lines))
    others.write_text(f"name,reason,side\nphotos/{OUTLIER}.png,outlier,train\nphotos/none.png,outlier,train\n")
    return str(groups), str(others)


def settings_of(shards: list[str], lists: tuple[str, ...], **more: Any) -> Config:
    return tiny.config(
        shards,
        data={"exclude": lists, "test": tuple(shards), **more},
        clustering={"num_labels": (4,)},
        adapt={"epochs": 1},
    )


def flow_of(settings: Config, root: Path) -> Flow:
    images = ImageShards.open(settings.data.train, None)
    return lay_out(settings, Store(root), images, images if settings.data.test else None)


Made = tuple[Config, Path, tiny.Here]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that excludes nothing, then one that does, in the same directory."""
    folder = tmp_path_factory.mktemp("exclude")
    shards, here = write_shards(folder / "images"), tiny.Here()
    pipeline.run_in(tiny.run_in(settings_of(shards, ()), folder / "run", tiny.Here()), "embed")
    settings = settings_of(shards, write_lists(folder))
    pipeline.run_in(tiny.run_in(settings, folder / "run", here))
    return settings, folder / "run", here


def test_excluded_images_are_in_no_partition_score_or_figure_and_their_features_are_kept(made: Made) -> None:
    settings, root, here = made
    flow = flow_of(settings, root)
    assert excluded_rows(flow.excluded.train).tolist() == LISTED
    assert excluded_rows(flow.excluded.test).tolist() == DROPPED  # the outlier is listed for the side train
    for k, artifact in flow.labels.items():
        labels = label_rows(artifact, flow.train.starts, k).take(np.arange(tiny.NUM_ROWS))
        assert np.flatnonzero(labels < 0).tolist() == sorted([*LISTED, tiny.BAD])
    queries = np.load(flow.scores["backbone"].path / QUERIES_FILE)[:, 0]
    assert sorted(queries.tolist()) == [r for r in range(tiny.NUM_ROWS) if r not in [*DROPPED, tiny.BAD]]
    assert here.asked.count("embed_shards") == len(tiny.SIZES)
    events = [event for event in read_events(root / "events.jsonl") if event["name"] == "stage_begins"]
    *_, begun = [event["what"] for event in events if event["stage"] == "embed"]
    assert begun.startswith(", ".join(name for name in flow.models if name != "backbone") + ", 40 images in 4 shards")
    assert here.asked.count("find_excluded") == 2


def test_the_run_its_events_and_the_report_say_what_was_excluded_and_which_names_are_unknown(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, root, _ = made
    found = [event for event in read_events(root / "events.jsonl") if event["name"] == "excluded"]
    assert [(event["images"], event["reasons"]) for event in found] == [
        (5, {"near-duplicate": 4, "outlier": 1}),
        (4, {"near-duplicate": 4}),
    ]
    page = (root / "report" / "report.html").read_text()
    assert "5 of 40 training images excluded (4 near-duplicate, 1 outlier)" in page
    assert "4 of 40 test images excluded (4 near-duplicate)" in page
    assert "4 near-duplicates took no part; the first image of each group did" in page
    here = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root, here))  # nothing is left to do, and names are still told
    told = capsys.readouterr().err
    assert "warning: data.exclude: 1 of 8 names in" in told
    assert "the first is 'photos/none.png', names are as in 'photos/0.png'" in told
    assert "find_excluded" not in here.asked
    assert "exclude        images that" in plan(settings, root)


@pytest.mark.parametrize("lines", ["", "photos/0.png,1,test\n"])
def test_a_list_that_says_nothing_of_the_images_leaves_none_out(
    lines: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, _, _ = made
    path = tmp_path / "none.csv"
    path.write_text(f"name,drop,side\n{lines}")
    none = settings_of(list(settings.data.train), (str(path),), test=())
    pipeline.run_in(tiny.run_in(none, tmp_path / "run", tiny.Here()), "embed")
    assert f"data.exclude: {path}: says nothing of these images" in capsys.readouterr().err
    assert flow_of(none, tmp_path / "run").excluded == Exclusion()


def test_a_list_renames_what_it_affects_and_no_list_renames_nothing(made: Made, tmp_path: Path) -> None:
    settings, root, _ = made
    with_lists, without = flow_of(settings, root), flow_of(settings_of(list(settings.data.train), ()), root)
    assert without.excluded == Exclusion()
    assert with_lists.features == without.features
    assert with_lists.test_features["backbone"] == without.test_features["backbone"]
    for name in ("labels", "adaptors", "scores", "insights", "partitions", "report", "model"):
        assert getattr(with_lists, name) != getattr(without, name)
    moved = tmp_path / "elsewhere.csv"
    moved.write_bytes(Path(settings.data.exclude[0]).read_bytes())
    elsewhere = flow_of(settings_of(list(settings.data.train), (str(moved), settings.data.exclude[1])), root)
    assert elsewhere.labels == with_lists.labels  # named by what lists say, wherever they lie
    weighed = flow_of(
        settings.model_copy(update={"data": settings.data.model_copy(update={"duplicates": "weigh"})}), root
    )
    assert weighed.labels == with_lists.labels
    assert weighed.adaptors != with_lists.adaptors


def test_excluded_images_do_not_count_as_bad_and_a_list_of_no_image_ends_the_run(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "images")
    (tmp_path / "bad.csv").write_text(f"file,reason\nphotos/{tiny.BAD}.png,no image\n")
    none = settings_of(shards, (), max_bad_share=0.0)
    with pytest.raises(ValueError, match="1 of 40 images are bad"):
        pipeline.run_in(tiny.run_in(none, tmp_path / "run", tiny.Here()), "embed")
    listed = settings_of(shards, (str(tmp_path / "bad.csv"),), max_bad_share=0.0)
    pipeline.run_in(tiny.run_in(listed, tmp_path / "run", tiny.Here()), "embed")
    (tmp_path / "bad.csv").write_text("file\nelsewhere.png\n")
    with pytest.raises(ValueError, match=r"no image is called so; the first is 'elsewhere\.png', names are as in"):
        pipeline.run_in(tiny.run_in(listed, tmp_path / "run", tiny.Here()), "embed")


def test_a_line_of_one_side_may_be_added_when_the_other_side_was_excluded_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, path, here = write_shards(tmp_path / "images"), tmp_path / "list.csv", tiny.Here()
    path.write_text("name,side\nphotos/1.png,train\nphotos/2.png,test\n")
    settings = settings_of(shards, (str(path),))
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", tiny.Here()), "embed")
    path.write_text("name,side\nphotos/none.png,test\nphotos/1.png,train\nphotos/2.png,test\nphotos/3.png,test\n")
    capsys.readouterr()
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", here), "embed")
    assert here.asked.count("find_excluded") == 1  # of the test images alone
    told = capsys.readouterr().err
    assert "1 of 4 names in" in told
    assert "the first is 'photos/none.png'" in told
    flow = flow_of(settings, tmp_path / "run")
    assert [excluded_rows(side).tolist() for side in (flow.excluded.train, flow.excluded.test)] == [[1], [2, 3]]
    path.write_text("name\nphotos/4.png\n")  # after the artefacts were named
    monkeypatch.setattr(pipeline, "lay_out", lambda *_, **__: flow)
    with pytest.raises(ValueError, match=r"list\.csv changed while the run began; start it again"):
        pipeline.run_in(tiny.run_in(settings, tmp_path / "run", tiny.Here()), "embed")


def test_near_duplicates_take_turns_in_the_place_of_the_image_that_stands_for_them(made: Made) -> None:
    settings, root, _ = made
    artifact = flow_of(settings, root).excluded.train
    weighed = settings.data.model_copy(update={"duplicates": "weigh"})
    assert turns_of(settings.data, artifact, np.zeros(0, np.int64)) is None
    turns = turns_of(weighed, artifact, np.array([14]))  # one that does not decode is never shown
    assert turns == Turns({0: (12, 38), 20: (21,)})
    counts = Counter(turns.shown(0, seed=1, epoch=epoch) for epoch in range(300))
    assert counts.keys() == {0, 12, 38}
    assert min(counts.values()) > 60
    assert [turns.shown(0, 1, epoch) for epoch in range(9)] == [turns.shown(0, 1, epoch) for epoch in range(9)]
    assert turns.shown(5, 1, 0) == 5


def shown_rows(comm: Comm, shards: list[str]) -> NDArray[Any]:
    """What one rank reads in two epochs: step, row, and a pixel's sum of its crop."""
    settings = tiny.config(shards)
    images, bad = ImageShards.open(shards, None), np.array(sorted([*LISTED, tiny.BAD]))
    training = TrainingImages.of(settings, images, bad, tiny.BATCH, turns=Turns(COPIES))
    preprocess = build_backbone(settings.backbone).preprocess
    steps = range(training.num_steps(2))
    found = [
        (step, row, int(crop.sum()))
        for step, (crops, rows) in zip(
            steps, augmented_batches(training, preprocess, comm, steps, area=0.5, device=tiny.CPU), strict=True
        )
        for crop, row in zip(crops, rows.tolist(), strict=True)
    ]
    return np.array(sorted(found)).reshape(-1, 3)


def test_every_number_of_ranks_reads_the_same_images_in_turn(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path)  # whose images all differ, so that crops tell which was shown
    alone = run_ranks(shown_rows, 1, shards)[0]
    together = np.concatenate(run_ranks(shown_rows, 3, shards))
    assert np.array_equal(together[np.lexsort(together.T[::-1])], alone)
    rows = alone[:, 1]
    assert not np.isin(rows, LISTED).any()  # batches have the rows that stand for others
    assert Counter(rows.tolist())[0] == 2
