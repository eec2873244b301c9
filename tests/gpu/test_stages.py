"""Every stage on a GPU that is not there: what CUDA refuses ends them, and their results are those of a CPU."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.distributed.collectives import Comm
from grappa_dist.stages.adapt_job import train_adaptors
from grappa_dist.stages.fuse import train_fusion
from tests.gpu.guard import why_not
from tests.gpu.process import PretendGpu
from tests.processes import run_ranks
from tests.stages import multi_set, test_fuse, tiny

PRECISION = 0.05  # of losses about 1: the device computes in bfloat16
ADAPT = ["plain", "micro-batches, sampled", "automatic", "recomputed", "zero 1", "zero 2"]
FUSE = ["transforms", "neighbours", "through lists", "by rows", "by Adam"]
METHODS = ["exact", "oversampled", "sampled", "hierarchical", "approximate", "balanced"]


def test_it_refuses_what_cuda_refuses_and_nothing_else(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.stages:refused")
    assert found == {
        "two devices": "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "a scalar of the host": "",
        "a generator of the host": "Expected a 'cuda' device type for generator but found 'cpu'",
        "numpy": "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory",
        "integer products": '"addmm_cuda" not implemented for torch.int64',
        "another rank's tensor of the host": "No backend type associated with device type cpu",
        "what another stream wrote": "a stream uses what another stream wrote, and has not waited for it",
        "what has not arrived": "the host reads what a copy from the device has not been waited for",
        "what has arrived": "",
        "a copy that the host has overtaken": "[1.0, 1.0, 1.0, 1.0]",
        "one value into a mask": "[3.0, 0.0]",
    }


class Left(Exception):
    """A call is left, as one is by the time limit of a test."""


@pytest.mark.slow
def test_a_call_that_is_left_ends_what_it_began_and_the_next_one_has_its_own_answer() -> None:
    if reason := why_not():
        pytest.skip(reason)

    def leave(*signalled: Any) -> None:
        raise Left

    before = signal.signal(signal.SIGUSR1, leave)
    alarm = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with PretendGpu() as gpu:
            first = gpu.pid
            alarm.start()
            with pytest.raises(Left):
                gpu.run("tests.gpu.stages:lasting", seconds=3600)
            assert gpu.run("tests.gpu.stages:lasting", seconds=0) == [0]
            assert gpu.pid != first
    finally:
        alarm.cancel()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [True, False])
def test_k_means_has_the_bits_of_the_cpu(gpu: PretendGpu, kernel: bool) -> None:
    names = ["exact", "hierarchical"] if kernel else ["exact"]
    assert gpu.run("tests.gpu.rows:differing_methods", names=names, kernel=kernel) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("held_rows", [0, 300])
def test_k_means_of_rows_that_the_memory_does_not_hold_has_the_bits_of_the_cpu(gpu: PretendGpu, held_rows: int) -> None:
    assert gpu.run("tests.gpu.rows:differing_methods", names=["exact"], kernel=False, held_rows=held_rows) == [[]]


def test_k_nn_graphs_and_searches_have_the_bits_of_the_cpu(gpu: PretendGpu) -> None:
    assert gpu.run("tests.gpu.rows:differing_graphs") == [[]]


def test_retrieval_scores_have_the_bits_of_the_cpu(gpu: PretendGpu) -> None:
    assert gpu.run("tests.gpu.rows:differing_scores") == [[]]


@pytest.mark.slow
def test_a_whole_run_ends_with_a_model_that_is_the_same_on_both(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.stages:whole_run")
    assert {"embed_shards", "evaluate", "transforms", "neighbours", "supervised"} <= set(found["asked"])
    models = {row["model"] for row in found["scores"]}
    assert {"backbone", "average", "gallery", "transforms", "neighbours", "supervised"} <= models
    assert all(0 < row["r_precision"] <= 1 for row in found["scores"])
    assert found["apart"] < 0.02


def losses_on_a_cpu(comm: Comm, folder: Path) -> dict[str, list[float]]:
    """The losses of the first job of each kind."""
    tiny.write_shards(folder / "images")
    context = tiny.Watcher().context(comm)
    adapt, fuse = multi_set.job_in(folder, "adapt", (3, 4)), test_fuse.job_in(folder, "fuse", "transforms", epochs=2)
    train_adaptors(context, adapt)
    train_fusion(context, fuse)
    return {
        "adapt": [float(step["loss"]) for step in tiny.steps_of(adapt.sets[0].artifact.path)],
        "fuse": tiny.losses_of(fuse.artifact.path),
    }


def check_losses(found: dict[str, Any], expected: dict[str, list[float]]) -> None:
    for name, losses in found["adapt"].items():
        assert np.isfinite(losses).all(), name
        assert len(losses) == len(expected["adapt"]), name
        if "sampled" not in name:
            np.testing.assert_allclose(losses, expected["adapt"], rtol=PRECISION, atol=PRECISION, err_msg=name)
    for name, losses in found["fuse"].items():
        assert np.isfinite(losses).all(), name
        assert len(losses) == len(expected["fuse"]), name
    np.testing.assert_allclose(found["fuse"]["transforms"], expected["fuse"], rtol=PRECISION, atol=PRECISION)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_jobs_go_on_from_their_checkpoints_with_the_losses_of_a_cpu(
    gpu: PretendGpu, tmp_path: Path, ranks: int
) -> None:
    (expected,) = run_ranks(losses_on_a_cpu, 1, tmp_path)
    for found in gpu.run("tests.gpu.stages:on_ranks", ranks, adapt=ADAPT, fuse=FUSE, methods=METHODS):
        assert found["methods"] == found["graphs"] == []
        check_losses(found, expected)


@pytest.mark.slow
def test_two_ranks_as_nccl_train_cluster_and_search(gpu: PretendGpu, tmp_path: Path) -> None:
    (expected,) = run_ranks(losses_on_a_cpu, 1, tmp_path)
    few = {"adapt": ["plain"], "fuse": ["transforms"], "methods": ["exact"]}
    for found in gpu.run("tests.gpu.stages:on_ranks", 2, **few):
        assert found["methods"] == found["graphs"] == []
        check_losses(found, expected)
