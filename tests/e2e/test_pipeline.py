"""The whole program in real processes: what it leaves, reuses, survives and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from grappa_dist import load_model
from grappa_dist.stages.damages import read_damages
from grappa_dist.status import status
from tests.e2e import runs
from tests.stages.tiny import files_below

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no one has killed."""
    out = tmp_path_factory.mktemp("finished")
    ended = runs.run(out)
    assert ended.returncode == 0, ended.stderr
    assert "report.html" in ended.stdout
    return out


def test_a_run_leaves_scores_of_every_model_on_every_task(finished: Path) -> None:
    rows = json.loads((finished / "report" / "metrics.json").read_text())["rows"]
    models = {"backbone", "k=8", "k=24", "oracle", "average", "neighbours"}
    assert {(r["model"], r["task"]) for r in rows} == {
        (m, t) for m in models for t in ("kinds", "species", "instances")
    }
    for row in rows:
        assert all(0 <= row[figure] <= 1 for figure in ("r_precision", "map_at_r", "recall_at_1"))
        assert row["queries"] > 0


def test_a_run_writes_no_secret_of_its_environment(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    written = {path.name for path in files}
    assert {"manifest.json", "events.jsonl", "metrics.jsonl", "report.html", "config.json", "index.json"} <= written
    assert [path for path in files if runs.PLANTED.encode() in path.read_bytes()] == []


@pytest.mark.long
def test_a_run_can_end_after_a_stage_and_go_on_later(tmp_path: Path) -> None:
    begun = runs.run(tmp_path, "--until", "pseudo_label")
    assert begun.returncode == 0, begun.stderr
    assert "done up to pseudo_label" in begun.stdout
    left = files_below(tmp_path)
    made = {path: time for path, time in left.items() if path.endswith("manifest.json")}
    assert len([path for path in made if path.startswith("labels/k=")]) == 2
    assert not any(path.startswith(("adaptors/", "models/", "reports/")) for path in left)
    ended = runs.run(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "report.html" in ended.stdout
    assert made.items() <= files_below(tmp_path).items()  # what was there was not made again


def test_a_finished_run_has_a_log_and_a_status_that_say_so(finished: Path) -> None:
    found = status(finished)
    assert (found.state, found.stage, found.error) == ("done", "", "")
    assert found.next == (str(finished / "report" / "report.html"), str(finished / "model"))
    assert {"embed", "pseudo_label", "adapt", "fuse", "evaluate", "report"} <= found.ended_stages.keys()
    log = (finished / "run.log").read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d [\d:]{8}[+-]\d\d:\d\d embed: backbone, \d+ images in \d+ shards?$", log, re.M)
    assert re.search(r" embed backbone: (\d+)/\1 images", log)
    assert log.endswith(" done\n")


def test_steps_of_two_adaptor_jobs_overlap_in_time(finished: Path) -> None:
    spans = [
        [float(str(e["t"])) for e in runs.metrics(finished, f"adaptors/k={k}") if e["name"] == "step"] for k in (8, 24)
    ]
    assert max(span[0] for span in spans) < min(span[-1] for span in spans)


def test_the_exported_model_maps_images_to_unit_rows(finished: Path) -> None:
    model = load_model(finished)
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images).norm(dim=1), torch.ones(3))
    assert model.attention(images).shape == (3, len(model.grappa.layers), len(model.sets))


def test_a_second_run_reuses_everything_and_starts_no_cluster(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("manifest.json")}
    ended = runs.run(finished)
    assert ended.returncode == 0, ended.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("manifest.json")} == before
    assert "embed" not in ended.stderr


@pytest.mark.slow
def test_slices_of_the_centroids_change_no_byte_of_the_partitions(finished: Path, tmp_path: Path) -> None:
    out = runs.without_training(finished, tmp_path / "sliced")
    shutil.rmtree(out / "labels")
    ended = runs.run(out, "resources.centroid_shards=2", "--until", "pseudo_label")
    assert ended.returncode == 0, ended.stderr
    for k in (8, 24):
        assert f"K = {k}: centroids in 2 slices" in ended.stderr
    whole, sliced = (
        {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("labels/k=*/*.npy"))}
        for run in (finished, out)
    )
    assert len(whole) == 2 * 3  # rows of two shards, centroids
    assert sliced == whole


def test_a_changed_setting_reruns_only_what_depends_on_it(finished: Path) -> None:
    out = runs.run(finished, "--dry-run", "fuse.beta=0.01").stdout
    assert "adapt " in out
    lines = {line.split()[0]: line for line in out.splitlines() if "reused" in line}
    assert "all reused" in lines["adapt"]
    assert "0 of 1 reused" in lines["fuse"]


def test_killed_workers_and_a_killed_driver_change_no_byte_of_the_result(finished: Path, tmp_path: Path) -> None:
    out = runs.without_training(finished, tmp_path / "killed")
    trained = ("--until", "fuse")
    with runs.running(out, *trained) as driver:  # a worker in the middle of adapt, then the driver itself
        runs.wait_for(lambda: runs.last_step(out, "adaptors/k=8") >= 25, driver)  # the checkpoint is at 20
        runs.kill_rank_zero(out, "adaptors/k=8")
        runs.wait_for(lambda: runs.embeds_for_graph(out, "neighbours", epoch=1, rank=1), driver)
        runs.kill_rank_one(driver, out, "fusion/neighbours")
        assert runs.embeds_for_graph(out, "neighbours", epoch=1, rank=1)  # it was at it when it was killed
        runs.wait_for(lambda: runs.last_step(out, "fusion/neighbours") >= 7, driver)  # step 6 is the first of epoch 1
        at_work = status(out)
        driver.send_signal(signal.SIGKILL)
        driver.wait(timeout=30)
    assert (at_work.state, at_work.stage, status(out).state) == ("running", "fuse", "died")
    assert at_work.error.startswith("neighbours: ")  # the rank that was killed
    with runs.running(out, *trained) as driver:  # one of two ranks of fuse; the other sits in a collective
        runs.wait_for(lambda: runs.last_step(out, "fusion/neighbours") >= 12, driver)
        runs.kill_rank_zero(out, "fusion/neighbours")
        assert driver.stdout is not None
        output = driver.stdout.read()
        assert driver.wait(timeout=runs.PATIENCE_S) == 0, output
    begun = [e for e in runs.metrics(out, "fusion/neighbours") if e["name"] == "begins"]
    started, *resumed = [int(str(e["at_step"])) for e in begun]
    assert started == 0
    assert len(resumed) == 3
    assert all(step >= 4 and step % 4 == 0 for step in resumed)  # from a checkpoint, not from the beginning
    assert runs.weights(out) == runs.weights(finished)


@pytest.mark.long
def test_damage_that_workers_meet_is_made_anew_with_the_same_bytes(tmp_path: Path) -> None:
    until = ("--until", "pseudo_label", "data.collection_kwargs={scale: 0.1}", "clustering.num_labels=[24]")
    begun = runs.run(tmp_path, *until)
    assert begun.returncode == 0, begun.stderr
    (labels,), (rows,) = tmp_path.glob("labels/k=24-*/rows-000000.npy"), tmp_path.glob("features/backbone/*/rows.npy")
    before = {path: path.read_bytes() for path in (labels, rows)}
    for path, data in before.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    shutil.rmtree(next(tmp_path.glob("partitions-*")))  # whose task reads the labels, which are made of the features
    ended = runs.run_with("grappa_dist.stages.damages.CONTENT_BYTES = 0", tmp_path, *until)  # nothing is read before
    assert ended.returncode == 0, ended.stderr
    assert {path: path.read_bytes() for path in before} == before
    names = [path.parent.relative_to(tmp_path).as_posix() for path in before]
    assert [damage.artifact for damage in read_damages(tmp_path)] == names
    assert all((tmp_path / f"{name}.damaged" / path.name).is_file() for name, path in zip(names, before, strict=True))
    assert f"damaged: {names[0]}: rows-000000.npy does not hold what was written" in ended.stderr
    assert f"damaged and made anew: {names[0]}" in ended.stderr


@pytest.mark.long
def test_sigterm_saves_state_and_the_next_run_goes_on(finished: Path, tmp_path: Path) -> None:
    out = runs.without_training(finished, tmp_path / "terminated")
    with runs.running(out) as driver:
        runs.wait_for(lambda: runs.last_step(out, "adaptors/k=24") >= 2, driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=120) == 143
    saved = list((out / "adaptors").glob("k=24-*.partial/checkpoints/step-*"))
    assert saved
    assert runs.run(out).returncode == 0
    assert runs.weights(out) == runs.weights(finished)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapt.epoch=3", "did you mean 'epochs'"),
        ("clustering.num_labels=[100000]", "clustering.num_labels=100000"),
        ("backbone.name=nowhere:create", "nowhere"),
        (f"out=s3://AKIA:{runs.PLANTED}x@bucket/x", "out: holds a credential"),
        pytest.param("resources.workers=64", "64", marks=pytest.mark.slow),
    ],
)
def test_bad_settings_end_with_one_line_and_exit_code_two(tmp_path: Path, override: str, message: str) -> None:
    ended = runs.run(tmp_path / "run", override)
    assert ended.returncode == 2
    error = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in ended.stderr
    assert runs.PLANTED not in ended.stdout + ended.stderr


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    ended = runs.run(tmp_path / "run", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "adapt" in ended.stdout
    assert not os.path.exists(tmp_path / "run")
