from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.console import read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import Attention
from grappa_dist.models.spec import FUSION_FILE
from grappa_dist.stages.fuse import FuseJob, FuseObjective, decay_ratios, train_fusion
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.memory import FILE, MemoryBudget
from tests.processes import run_ranks
from tests.stages import tiny

STEPS = 12
STOP = 4  # one step of the second epoch, whose graph is there, is done and no checkpoint follows it


def job_in(folder: Path, out: str, variant: str, **fuse: Any) -> FuseJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, fuse={"lars_learning_rate": 20.0, "checkpoint_steps": 3, **fuse})
    return tiny.fuse_job(settings, folder, Store(folder / out), variant, 3)


def fuse_all_ways(comm: Comm, folder: Path) -> dict[str, Any]:
    """Undisturbed jobs of one world; on up to two ranks also other micro batches and a killed job."""
    out = str(comm.size)

    def run(job: FuseJob) -> Artifact:
        train_fusion(tiny.Watcher().context(comm), job)
        return job.artifact

    run(job_in(folder, out, "transforms"))
    run(job_in(folder, out, "neighbours"))
    if comm.size == 3:
        return {}
    run(job_in(folder, f"{out}-micro", "transforms", micro_batch=5))
    run(job_in(folder, f"{out}-adam", "neighbours-adam", epochs=1))
    killed = job_in(folder, f"{out}-killed", "neighbours")
    with pytest.raises(tiny.Killed):
        train_fusion(tiny.Watcher(kill_after=STOP + 1).context(comm), killed)
    graphs = {k: v for k, v in tiny.files_below(killed.artifact.partial / "knn").items() if k.startswith("epoch-1/")}
    resumed = tiny.Watcher()
    train_fusion(resumed.context(comm), killed)
    comm.barrier()  # rank 0 has committed
    after = tiny.files_below(killed.artifact.path / "knn")
    phases = [str(status["phase"]) for status in resumed.statuses if "phase" in status]
    kept = graphs["epoch-1/statistics.json"] == after["epoch-1/statistics.json"]  # its neighbours are not
    return {"graphs": graphs, "kept": kept, "phases": phases}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("fuse")
    tiny.write_shards(folder / "images")
    job_in(folder, "prepare", "transforms")  # adaptors and labels, before several ranks read them
    return folder, {size: run_ranks(fuse_all_ways, size, folder, timeout_s=400) for size in (1, 2, 3)}


def error_of_a_nan_gradient(comm: Comm, job: FuseJob) -> str:
    """One rank's gradient of the projector is NaN in the second step, and the loss is not; then it goes on."""
    backward, passes = Engine.backward, list[torch.Tensor]()

    def poisoned(engine: Engine, loss: torch.Tensor, *, last: bool = True) -> None:
        passes.append(loss)
        backward(engine, loss, last=last)
        if len(passes) == 2 and comm.rank == comm.size - 1:
            engine.optimizer.param_groups[0]["params"][-1].grad.fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "backward", poisoned)
        with pytest.raises(ArithmeticError) as error:
            train_fusion(tiny.Watcher().context(comm), job)
    train_fusion(tiny.Watcher().context(comm), job)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_update(world: World, size: int) -> None:
    folder, _ = world
    job = job_in(folder, f"{size}-poisoned", "transforms", checkpoint_steps=1)
    for error in run_ranks(error_of_a_nan_gradient, size, job, timeout_s=400):
        assert error == "transforms: gradient_norm is nan at step 1; nothing of it was saved"
    steps = tiny.steps_of(job.artifact.path)
    np.testing.assert_allclose([s["loss"] for s in steps], losses(folder, "1", "transforms"), rtol=0, atol=1e-5)
    assert all(step["gradient_norm"] > 0 for step in steps)


def fuse_until(comm: Comm, job: FuseJob, kill_after: int | None) -> None:
    watcher = tiny.Watcher(kill_after=kill_after)
    if kill_after is None:
        train_fusion(watcher.context(comm), job)
    else:
        with pytest.raises(tiny.Killed):
            train_fusion(watcher.context(comm), job)


World = tuple[Path, dict[int, list[dict[str, Any]]]]


def losses(folder: Path, out: str, variant: str, **fuse: Any) -> list[float]:
    return tiny.losses_of(job_in(folder, out, variant, **fuse).artifact.path)


def weights(folder: Path, out: str, variant: str = "neighbours") -> bytes:
    return (job_in(folder, out, variant).artifact.path / FUSION_FILE).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["transforms", "neighbours"])
def test_the_losses_do_not_depend_on_the_number_of_ranks(world: World, variant: str) -> None:
    folder, _ = world
    alone = losses(folder, "1", variant)
    assert len(alone) == STEPS
    for size in (2, 3):
        np.testing.assert_allclose(losses(folder, str(size), variant), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_the_micro_batch_changes_no_loss(world: World, size: int) -> None:
    folder, _ = world
    whole = losses(folder, str(size), "transforms")
    np.testing.assert_allclose(losses(folder, f"{size}-micro", "transforms"), whole, rtol=0, atol=1e-5)


def fuse_with_memory(comm: Comm, job: FuseJob, images: int, kill_after: int | None) -> None:
    """As in a memory that holds the activations of so many images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBudget, "images", lambda budget, most: min(images, most))
        fuse_until(comm, job, kill_after)


@pytest.mark.parametrize("size", [1, 2])
def test_an_automatic_micro_batch_changes_no_loss_and_is_kept_when_the_job_goes_on(world: World, size: int) -> None:
    folder, _ = world
    job = job_in(folder, f"{size}-auto", "transforms", micro_batch="auto", checkpoint_steps=1)
    run_ranks(fuse_with_memory, size, job, 3, STEPS - 2, timeout_s=400)
    kept = json.loads((job.artifact.partial / FILE).read_text())
    assert kept["ranks"] == size
    assert 1 <= kept["images"] <= 3
    run_ranks(fuse_with_memory, size, job, 100, None, timeout_s=400)  # there is more memory now
    whole = losses(folder, str(size), "transforms")
    np.testing.assert_allclose(tiny.losses_of(job.artifact.path), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["neighbours", "neighbours-adam"])
def test_both_recipes_move_queries_and_keys_of_every_layer(world: World, recipe: str) -> None:
    folder, _ = world
    out, fuse = ("1-adam", {"epochs": 1}) if recipe.endswith("-adam") else ("1", {})
    tensors = load_file(job_in(folder, out, recipe, **fuse).artifact.path / FUSION_FILE)
    assert set(tensors) == {f"layers.{i}.{name}" for i in range(2) for name in ("query", "key")}
    objective = FuseObjective(tiny.Watcher().context(Comm()), job_in(folder, "start", recipe), folder)
    start = objective.grappa.attention_tensors()
    assert all(torch.isfinite(t).all() and not torch.equal(t, start[name]) for name, t in tensors.items())


@pytest.mark.parametrize("size", [1, 2])
def test_a_job_killed_in_the_second_epoch_reuses_its_graph_and_ends_with_the_same_bytes(
    world: World, size: int
) -> None:
    folder, found = world
    for rank in found[size]:
        assert len(rank["graphs"]) == 2 * len(tiny.SIZES) + 1  # a table a shard and its checksum, and statistics
        assert rank["kept"]
        assert not any(phase.startswith("epoch 1:") for phase in rank["phases"])
        assert any(phase.startswith("epoch 2:") for phase in rank["phases"])
    assert weights(folder, f"{size}-killed") == weights(folder, str(size))
    assert losses(folder, f"{size}-killed", "neighbours") == losses(folder, str(size), "neighbours")


def test_a_job_killed_on_two_ranks_then_on_one_goes_on_on_three_with_the_same_losses(world: World) -> None:
    folder, _ = world
    job = job_in(folder, "moving", "neighbours")
    for ranks, kill_after in ((2, STOP + 1), (1, 2 * STOP), (3, None)):
        run_ranks(fuse_until, ranks, job, kill_after, timeout_s=400)
    begins = [e for e in read_events(job.artifact.path / "metrics.jsonl") if e["name"] == "begins"]
    assert [e["ranks"] for e in begins] == [2, 1, 3]
    assert [e["at_step"] for e in begins] == [0, 3, 6]  # of the last checkpoint before each kill
    np.testing.assert_allclose(
        losses(folder, "moving", "neighbours"), losses(folder, "1", "neighbours"), rtol=0, atol=1e-5
    )
    ours, alone = (load_file(job_in(folder, out, "neighbours").artifact.path / FUSION_FILE) for out in ("moving", "1"))
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)


def graph(folder: Path, out: str, epoch: int) -> np.ndarray:
    tables = sorted((job_in(folder, out, "neighbours").artifact.path / "knn" / f"epoch-{epoch}").glob("rows-*.npy"))
    return np.concatenate([np.load(table) for table in tables])


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_graph_holds_neither_bad_rows_nor_the_row_itself(world: World, epoch: int) -> None:
    near = graph(world[0], "2", epoch)
    assert near.shape == (tiny.NUM_ROWS, 3)
    assert (near[tiny.BAD] == -1).all()
    good = np.delete(np.arange(tiny.NUM_ROWS), tiny.BAD)
    assert np.isin(near[good], good).all()
    assert not (near == np.arange(tiny.NUM_ROWS)[:, None]).any()
    assert all(len(set(line)) == 3 for line in near[good].tolist())


def test_the_first_graph_is_the_same_to_the_bit_on_any_number_of_ranks(world: World) -> None:
    for size in ("2", "3"):
        np.testing.assert_array_equal(graph(world[0], size, 0), graph(world[0], "1", 0))


def test_figures_of_the_attention_do_not_depend_on_ranks_or_micro_batch(world: World) -> None:
    folder, _ = world
    names = [f"{figure}.{layer}" for figure in ("entropy", "decay_to_gradient") for layer in range(2)]
    names += [f"attention.{i}" for i in range(3)]

    def figures(out: str) -> np.ndarray:
        events = tiny.steps_of(job_in(folder, out, "transforms").artifact.path)
        return np.array([[event[name] for name in names] for event in events])

    alone = figures("1")
    assert (alone[:, :2] > 0).all()
    assert (alone[:, :2] <= 1).all()
    np.testing.assert_allclose(alone[:, 4:].sum(1), 1, rtol=1e-6)
    for out in ("2", "3", "1-micro", "2-micro"):
        np.testing.assert_allclose(figures(out), alone, rtol=2e-3, atol=1e-5)


def test_every_step_logs_how_long_it_waited_for_data(world: World) -> None:
    shares = [event["data_wait_share"] for event in tiny.steps_of(job_in(world[0], "2", "neighbours").artifact.path)]
    assert len(shares) == STEPS
    assert all(0 <= share <= 1 for share in shares)


def test_where_attention_has_no_gradient_the_share_of_decay_is_unknown() -> None:
    layers = [SimpleNamespace(attention=Attention(2)) for _ in range(3)]
    for layer, gradient in zip(layers, (None, 0.0, 0.5), strict=True):
        for parameter in layer.attention.parameters():
            parameter.data.fill_(1.0)
            parameter.grad = None if gradient is None else torch.full((2, 2), gradient)
    found = decay_ratios(SimpleNamespace(layers=layers), 0.25).tolist()
    assert found == pytest.approx([math.nan, math.nan, 0.5], nan_ok=True)


def test_a_finished_fusion_keeps_its_first_graph_and_its_last_and_no_scratch(world: World) -> None:
    files = tiny.files_below(job_in(world[0], "2-killed", "neighbours").artifact.path)
    tables = {f"knn/epoch-{e}/rows-{s:06d}.npy" for e in (0, 3) for s in range(len(tiny.SIZES))}
    statistics = {f"knn/epoch-{e}/statistics.json" for e in range(4)}
    assert set(files) == {"grappa.safetensors", "metrics.jsonl", "manifest.json", *tables, *statistics}
