"""Whole pipelines on several machines; cables are cut and power is lost while they train."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cluster.machines import Bench, Machine
from tests.cluster.rays import Pipeline, pipeline_on, ray_on
from tests.cluster.sameness import CLUSTERED, digests, losses, on_one_machine
from tests.e2e import runs
from tests.stages import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]
NOTICED_S = 30.0
LONG = {"epochs": 150, "checkpoint_steps": 5}  # of three steps each
SETS = (4, 6)
NEXT = 20  # losses that other ranks do not change by more than 1e-5 of each


def write_config(folder: Path, **sections: dict[str, object]) -> Path:
    """Settings of the two-block model on generated shards, for as many workers as there are."""
    given = {"adapt": LONG, "fuse": {**LONG, "variants": ("average", "neighbours"), "refresh": False}, **sections}
    where = {"workers": "auto", "num_cpus": None, "decode_threads": 1, "adapt_ranks": 3}
    config = tiny.config(
        tiny.write_shards(folder / "shards"), **{**given, "resources": {**where, **sections.get("resources", {})}}
    )
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def workers_of(machine: Machine) -> set[int]:
    """Our worker processes there, by pid."""
    return {pid for pid, line in machine.processes().items() if line.startswith("ray::Worker")}


def lose(pipeline: Pipeline, machine: Machine, action: str, job: str) -> tuple[float, float]:
    """Cuts off or crashes a machine in the middle of a job: when, and how many seconds until the driver noticed."""
    pipeline.wait_for(lambda: runs.last_step(pipeline.run, job) >= 10)
    failures = len(pipeline.events("job_failed"))
    at = time.time()
    machine.cut() if action == "cut" else machine.crash()
    pipeline.wait_for(lambda: len(pipeline.events("job_failed")) > failures)
    return at, float(str(pipeline.events("job_failed")[-1]["t"])) - at


@pytest.fixture(scope="module")
def undisturbed(storage: Path) -> Path:
    """The run directory of one worker on one machine, to which nothing has happened."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=storage))
    config = write_config(folder, resources={"adapt_ranks": 1}, clustering={"num_labels": SETS})
    on_one_machine(config, folder / "run", "resources.num_cpus=1")
    return folder / "run"


def resumed_at(run: Path, job: str) -> list[int]:
    """The step at which each attempt of a job began."""
    return [int(str(event["at_step"])) for event in runs.metrics(run, job) if event["name"] == "begins"]


@pytest.mark.parametrize("action", ["cut", "crash"])
def test_a_run_survives_the_loss_of_a_machine_in_adapt_and_of_another_in_fuse(
    bench: Bench, folder: Path, figure: Callable[..., None], action: str, undisturbed: Path
) -> None:
    """Three workers, then two, then one; the partitions are those of an undisturbed run, the losses nearly."""
    config = write_config(
        folder, resources={"elastic": True, "placement_timeout_s": 60}, clustering={"num_labels": SETS}
    )
    head, *workers = [bench[number] for number in range(4)]
    try:
        with ray_on(head, workers) as (address, _), pipeline_on(head, address, config, folder / "run") as pipeline:
            for lost, job, left in ((2, "adaptors/k=4", 2), (1, "fusion/neighbours", 1)):
                pipeline.wait_for(lambda job=job: runs.last_step(pipeline.run, job) >= 0)
                before = {machine.name: workers_of(machine) for machine in workers[:lost]}
                assert all(before.values())
                lost_at, noticed = lose(pipeline, workers[lost], action, job)
                figure(f"{action} in {job}: noticed after", noticed)
                assert noticed < NOTICED_S
                failed = pipeline.events("job_failed")[-1]
                pipeline.wait_for(lambda t=failed["t"]: [e for e in pipeline.events("job_begins") if e["t"] > t])
                begun = pipeline.events("job_begins")[-1]
                assert (begun["job"], begun["ranks"]) == (failed["job"], left)
                figure(f"{action} in {job}: goes on after", float(str(begun["t"])) - float(str(failed["t"])) + noticed)
                if action == "cut":  # its workers are out of reach, and end by themselves
                    pipeline.wait_for(lambda machine=workers[lost]: not workers_of(machine), patience_s=30)
                    figure(f"{action} in {job}: no worker left on the machine after", time.time() - lost_at)
                for machine in workers[:lost]:
                    assert not before[machine.name] & workers_of(machine), f"survivors on {machine.name}"
            assert pipeline.ends() == 0, pipeline.log.read_text()[-3000:]
            for job in ("adaptors/k=4", "fusion/neighbours"):
                resumed = resumed_at(pipeline.run, job)[-1]
                assert resumed > 0, f"{job} began again from nothing"
                found, expected = losses(pipeline.run, job), losses(undisturbed, job)
                assert found[: resumed + NEXT] == pytest.approx(expected[: resumed + NEXT], rel=1e-5)
                apart = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
                figure(f"{action} in {job}: a loss differs from an undisturbed run's by at most", apart, "of it")
            assert digests(pipeline.run, *CLUSTERED) == digests(undisturbed, *CLUSTERED)
            assert (pipeline.run / "report" / "report.html").exists()
    finally:
        for machine in workers[1:]:
            machine.reboot()


def test_a_job_of_one_rank_whose_machine_is_lost_ends_elsewhere_with_the_same_bytes(
    bench: Bench, folder: Path, undisturbed: Path
) -> None:
    resources = {"elastic": True, "placement_timeout_s": 60, "adapt_ranks": 1}
    config = write_config(
        folder, resources=resources, clustering={"num_labels": SETS}, fuse={**LONG, "variants": ("average",)}
    )
    head, *workers = [bench[number] for number in range(4)]
    with ray_on(head, workers) as (address, _), pipeline_on(head, address, config, folder / "run") as pipeline:
        pipeline.wait_for(lambda: runs.last_step(pipeline.run, "adaptors/k=4") >= 0)
        first = next(str(e["host"]) for e in runs.metrics(pipeline.run, "adaptors/k=4") if e["name"] == "begins")
        try:
            lose(pipeline, bench[int(first.removeprefix("n"))], "crash", "adaptors/k=4")
            assert pipeline.ends() == 0, pipeline.log.read_text()[-3000:]
        finally:
            bench[int(first.removeprefix("n"))].reboot()
    began = resumed_at(pipeline.run, "adaptors/k=4")
    assert len(began) == 2
    assert began[1] > 0
    adaptors = "adaptors/*/*.safetensors"
    assert digests(pipeline.run, adaptors) == digests(undisturbed, adaptors)


def test_without_elastic_a_lost_machine_ends_the_run_with_an_error_that_names_it(bench: Bench, folder: Path) -> None:
    config = write_config(folder, resources={"placement_timeout_s": 45})
    head, *workers = [bench[number] for number in range(4)]
    try:
        with ray_on(head, workers) as (address, _), pipeline_on(head, address, config, folder / "run") as pipeline:
            lose(pipeline, workers[2], "crash", "adaptors/k=4")
            assert pipeline.ends(150) == 1
            line = pipeline.log.read_text().splitlines()[-1]
            assert "error: 1 of 3 workers did not start within 45 s" in line
            assert "or is a node gone?" in line
            assert list(pipeline.run.glob("adaptors/k=4-*.partial/checkpoints/step-*"))
    finally:
        workers[2].reboot()


def test_a_run_directory_that_the_machines_do_not_share_is_refused_before_any_work(bench: Bench, folder: Path) -> None:
    config = write_config(folder, resources={"adapt_ranks": 1})
    head, *workers = [bench[number] for number in range(3)]
    with ray_on(head, workers) as (address, _), pipeline_on(head, address, config, Path("/tmp/own/run")) as pipeline:
        assert pipeline.ends(120) == 2
    line = pipeline.log.read_text().splitlines()[-1]
    where = "n1 (10.77.0.11), n2 (10.77.0.12): the run directory /tmp/own/run is not the one that the driver writes to"
    assert line.startswith(f"error: preflight: {where}; put --out on storage that all share")
    assert not (head.tmp / "own" / "run" / "features").exists()
