"""cluster/slurm on a real Slurm of several machines. What `long` marks takes minutes and is not run on every push."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.jobs import Job, submit, write_config
from tests.cluster.machines import Bench
from tests.cluster.slurm import Slurm
from tests.e2e import runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
Figure = Callable[[str, float], None]
LONG = {"adapt": {"epochs": 150, "checkpoint_steps": 20}}  # long enough to be met in the middle
SHOW = """
import json, os, socket, sys
import ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_gpus=1, num_cpus=0, scheduling_strategy="SPREAD")
class Holder:
    def where(self):
        return [socket.gethostname(), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["GLOO_SOCKET_IFNAME"]]
holders = [Holder.remote() for _ in range(4)]  # all at once: each holds another GPU
print("SHOW", json.dumps(sorted(ray.get([holder.where.remote() for holder in holders]))))
sys.exit(7)
"""


def _resumed_at(job: Job, adaptors: str) -> list[int]:
    return [int(str(e["at_step"])) for e in runs.metrics(job.run, adaptors) if e["name"] == "begins"]


def test_a_pipeline_on_two_nodes_succeeds_and_leaves_logs_and_nothing_else(
    cluster: Slurm, folder: Path, figure: Figure
) -> None:
    write_config(folder, resources={"adapt_ranks": 2})
    job = submit(cluster, folder)
    figure("2 nodes: from submission to all nodes up", job.wait_for_log("2 nodes are up"))
    assert job.ends() == ("COMPLETED", 0), job.everything()
    assert (job.run / "report" / "report.html").exists()
    assert (job.run / "model" / "model.safetensors").exists()
    assert cluster.left_behind([1, 2, 3]) == {}
    logs = job.run / "slurm" / f"{job.number}.0"
    assert {path.name for path in logs.iterdir()} == {"head.log", "workers.log", "n1", "n2"}
    assert all(any(path.rglob("raylet*")) for path in logs.iterdir() if path.is_dir())


def test_the_exit_status_of_a_failing_program_is_the_jobs(cluster: Slurm, folder: Path) -> None:
    write_config(folder)
    job = submit(cluster, folder, "NODES=1", "OVERRIDES=(clustering.num_labels=[100000])")
    assert job.ends() == ("FAILED", 2), job.everything()
    assert "error: clustering.num_labels=100000" in job.log
    assert cluster.left_behind([1, 2, 3]) == {}


def test_scancel_leaves_no_process_and_no_file(cluster: Slurm, folder: Path, figure: Figure) -> None:
    write_config(folder, **LONG)
    job = submit(cluster, folder)
    job.reaches("adaptors/k=4", 5)
    cluster.command("scancel", job.number)
    took = cluster.wait_for(lambda: not cluster.left_behind([1, 2, 3]), "clean nodes", patience_s=30)
    figure("from scancel to clean nodes", took)
    assert job.ends()[0] == "CANCELLED"
    cluster.wait_for(lambda: cluster.states() == ["idle"] * 3, "idle nodes", patience_s=30)


def test_after_a_node_died_the_job_starts_again_without_it_and_resumes(
    cluster: Slurm, bench: Bench, folder: Path, figure: Figure
) -> None:
    write_config(folder, **LONG)
    job = submit(cluster, folder)
    for adaptors in ("adaptors/k=4", "adaptors/k=6"):
        job.reaches(adaptors, 25)  # the checkpoint is at 20
    bench[2].crash()
    figure("from a node's death to its notice", job.wait_for_log("1 of 2 nodes are alive: asking the program"))
    try:
        figure("from there to the job being put back", job.wait_for_log("putting the job back into the queue"))
        # which is logged before Slurm is asked; a node that goes down in between would start the job by itself
        cluster.wait_for(lambda: cluster.state(job.number) != "RUNNING", f"job {job.number} is put back")
        cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=dead")  # or after SlurmdTimeout
        figure("from there to its leaving the nodes", cluster.skip_the_pause(job.number))
        job.wait_for_log("start 1 on n1, n3")
        assert job.ends() == ("COMPLETED", 0), job.everything()
        begun = [_resumed_at(job, adaptors) for adaptors in ("adaptors/k=4", "adaptors/k=6")]
        assert [steps[0] for steps in begun] == [0, 0]
        resumed = [step for steps in begun for step in steps[1:]]  # the one on the dead node, from a checkpoint
        assert resumed
        assert all(step >= 20 for step in resumed)
        assert cluster.left_behind([1, 3]) == {}
    finally:
        cluster.bring_back(bench[2])


@pytest.mark.long
def test_before_the_time_limit_the_job_saves_and_goes_on_in_its_next_life(
    cluster: Slurm, folder: Path, figure: Figure
) -> None:
    # no checkpoint but the one that the signal asks for
    write_config(folder, adapt={"epochs": 20000, "checkpoint_steps": 10**6})
    job = submit(cluster, folder, "NODES=2 TIME=3 SAVE_SECONDS=45")
    job.wait_for_log("the time limit is near", patience_s=180)
    figure("from the signal to the end of the program", job.wait_for_log("the program ended with 143"))
    figure("from there to the job being put back", job.wait_for_log("putting the job back into the queue"))
    saved = runs.last_step(job.run, "adaptors/k=4")
    assert saved > 0
    cluster.skip_the_pause(job.number, "TimeLimit=30")
    job.wait_for_log("start 1 on")
    job.reaches("adaptors/k=4", saved + 2)
    assert _resumed_at(job, "adaptors/k=4")[:2] == [0, saved + 1], job.everything()
    cluster.command("scancel", job.number)
    cluster.wait_for(lambda: not cluster.left_behind([1, 2, 3]), "clean nodes", patience_s=30)


@pytest.mark.long
def test_a_job_that_is_asked_to_save_and_end_does_so_and_is_not_requeued(cluster: Slurm, folder: Path) -> None:
    write_config(folder, **LONG)
    job = submit(cluster, folder, "NODES=1")
    job.reaches("adaptors/k=4", 5)
    cluster.command("scancel", "--batch", "--signal=TERM", job.number)
    assert job.ends() == ("FAILED", 143), job.everything()
    assert "state is saved" in job.log
    assert list((job.run / "adaptors").glob("k=*.partial/checkpoints/step-*/engine.safetensors"))
    assert cluster.left_behind([1, 2, 3]) == {}


@pytest.mark.long
def test_two_jobs_on_one_node_do_not_meet(cluster: Slurm, folder: Path) -> None:
    jobs = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        write_config(folder / name)
        jobs.append(submit(cluster, folder / name, "NODES=1", flags=("--nodelist=n1",)))
    for job in jobs:
        assert job.ends() == ("COMPLETED", 0), job.everything()
        assert "1 nodes are up" in job.log
    addresses = {match[1] for job in jobs if (match := re.search(r"RAY_ADDRESS=(\S+)", job.log))}
    assert len(addresses) == 2
    assert cluster.left_behind([1]) == {}


@pytest.mark.long
def test_a_pipeline_on_three_nodes_succeeds(cluster: Slurm, folder: Path) -> None:
    write_config(folder, resources={"adapt_ranks": 3})
    job = submit(cluster, folder, "NODES=3")
    assert job.ends() == ("COMPLETED", 0), job.everything()
    assert "3 nodes are up" in job.log
    assert cluster.left_behind([1, 2, 3]) == {}


@pytest.mark.long
def test_a_node_that_cannot_start_ends_the_job_at_once(
    cluster: Slurm, bench: Bench, folder: Path, figure: Figure
) -> None:
    write_config(folder)
    (bench[1].tmp / "scratch").mkdir()
    (bench[2].tmp / "scratch").write_text("a file where a folder should be")
    try:
        job = submit(cluster, folder, "TEMP_ROOT=/tmp/scratch", flags=("--nodelist=n1,n2",))
        job.wait_for_log("start 0 on")
        figure("from the job's start to its end when a worker cannot start", job.wait_for_log("the nodes have ended"))
        assert job.ends() == ("FAILED", 75), job.everything()
        assert "Ray failed on n2" in job.log
        assert cluster.left_behind([1, 2, 3]) == {}
    finally:
        (bench[1].tmp / "scratch").rmdir()
        (bench[2].tmp / "scratch").unlink()


@pytest.mark.long
def test_every_node_offers_the_gpus_that_slurm_gave_it(cluster: Slurm, folder: Path) -> None:
    (folder / "show.py").write_text(SHOW)
    job = submit(cluster, folder, "GPUS_PER_NODE=2", f"COMMAND=(python {folder}/show.py)")
    assert job.ends() == ("FAILED", 7), job.everything()
    shown = [[host, gpu, "eth0"] for host in ("n1", "n2") for gpu in ("0", "1")]
    assert f"SHOW {json.dumps(shown)}" in job.log, job.everything()


@pytest.mark.long
def test_a_job_may_go_on_with_the_nodes_that_are_left(cluster: Slurm, bench: Bench, folder: Path) -> None:
    program = f"COMMAND=(bash -c 'until [ -e {folder}/go ]; do sleep 0.2; done')"
    job = submit(cluster, folder, "NODE_LOSS=stay", program, flags=("--nodelist=n1,n2",))
    job.wait_for_log("2 nodes are up")
    bench[2].crash()
    try:
        job.wait_for_log("1 of 2 nodes are alive; going on")
        (folder / "go").touch()
        job.wait_for_log("the program ended with 0")
    finally:
        cluster.bring_back(bench[2])
    assert job.ends() == ("COMPLETED", 0), job.everything()


@pytest.mark.long
def test_after_the_first_node_died_slurm_starts_the_job_again(cluster: Slurm, bench: Bench, folder: Path) -> None:
    program = f"COMMAND=(bash -c 'until [ -e {folder}/go ]; do sleep 0.2; done')"
    job = submit(cluster, folder, program, flags=("--exclude=n3",))
    job.wait_for_log("2 nodes are up")
    bench[1].crash()
    try:
        cluster.command("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=dead")  # or after SlurmdTimeout
        cluster.wait_for(lambda: not cluster.left_behind([2]), "a clean worker node", patience_s=60)
        cluster.wait_for(lambda: cluster.job(job.number).get("Restarts") == "1", "a requeued job", patience_s=60)
    finally:
        cluster.bring_back(bench[1])
    (folder / "go").touch()
    cluster.skip_the_pause(job.number)
    assert job.ends() == ("COMPLETED", 0), job.everything()
