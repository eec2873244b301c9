"""Adaptors trained in bf16: near those of fp32, and a killed job goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import Store
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.precision import Precision
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective, train_adaptors
from tests.processes import run_ranks
from tests.stages import tiny

RANKS = (1, 2)


def job_in(folder: Path, out: str, precision: Precision) -> AdaptJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(
        paths,
        backbone={"precision": precision},
        adapt={"epochs": 2, "checkpoint_steps": 2, "activation_checkpointing": True},
    )
    return tiny.adapt_job(settings, Store(folder / out), {4: folder / "labels"})


def adapt_all_ways(comm: Comm, folder: Path) -> set[torch.dtype]:
    """The types of the frozen weights of linear layers, as the engine leaves them."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        train_adaptors(tiny.Watcher().context(comm), job_in(folder, f"{comm.size}-{precision}", precision))
    killed = job_in(folder, f"{comm.size}-killed", "bf16")
    with pytest.raises(tiny.Killed):
        train_adaptors(tiny.Watcher(kill_after=3).context(comm), killed)
    train_adaptors(tiny.Watcher().context(comm), killed)
    objective = AdaptObjective(tiny.Watcher().context(comm), killed)
    return {p.dtype for p in objective.module.parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[set[torch.dtype]]]]:
    folder = tmp_path_factory.mktemp("adapt")
    tiny.write_shards(folder / "images")
    return folder, {size: run_ranks(adapt_all_ways, size, folder, timeout_s=400) for size in RANKS}


World = tuple[Path, dict[int, list[set[torch.dtype]]]]


def losses(folder: Path, out: str, precision: Precision = "bf16") -> list[float]:
    return tiny.losses_of(job_in(folder, out, precision).sets[0].artifact.path)


@pytest.mark.slow
def test_frozen_weights_of_products_are_held_in_bf16_on_every_rank(world: World) -> None:
    assert all(types == {torch.bfloat16, torch.float32} for ranks in world[1].values() for types in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("size", RANKS)
def test_losses_in_bf16_are_those_of_fp32_to_its_rounding(world: World, size: int) -> None:
    found, right = losses(world[0], f"{size}-bf16"), losses(world[0], f"{size}-fp32", "fp32")
    assert len(found) == len(right) > 4
    assert found != right
    np.testing.assert_allclose(found, right, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size", RANKS)
def test_a_killed_job_in_bf16_goes_on_to_the_same_bytes(world: World, size: int) -> None:
    sets = [job_in(world[0], f"{size}-{way}", "bf16").sets[0].artifact.path for way in ("bf16", "killed")]
    straight, killed = ((path / "adaptors.safetensors").read_bytes() for path in sets)
    assert straight == killed


def test_sets_of_two_precisions_have_two_names(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path / "images")
    wide, narrow = (job_in(tmp_path, "names", precision).sets[0].artifact.name for precision in ("fp32", "bf16"))
    assert wide != narrow
