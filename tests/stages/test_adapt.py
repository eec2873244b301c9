from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.console import read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import ADAPTORS_FILE, build_backbone
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective, train_adaptors
from grappa_dist.stages.multi_set_jobs import begin_job
from grappa_dist.training.batches import rank_share
from grappa_dist.training.loop import Schedule, train
from tests.processes import run_ranks
from tests.stages import tiny

STEPS = 21
STOP = 7  # between checkpoints, in the middle of the third epoch


def job_in(folder: Path, out: str, **adapt: Any) -> AdaptJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, adapt=adapt)
    return tiny.adapt_job(settings, Store(folder / out), {4: folder / "labels"})


def artifact_of(folder: Path, out: str, **adapt: Any) -> Artifact:
    return job_in(folder, out, **adapt).sets[0].artifact


def with_set(job: AdaptJob, **changes: Any) -> AdaptJob:
    return replace(job, sets=(replace(job.sets[0], **changes),))


def adapt_all_ways(comm: Comm, folder: Path) -> dict[str, Any]:
    """Undisturbed, stopped and killed jobs of one world."""
    found: dict[str, Any] = {}
    straight, stopped, killed = (job_in(folder, f"{comm.size}-{way}") for way in ("straight", "stopped", "killed"))
    train_adaptors(tiny.Watcher().context(comm), straight)

    if comm.size == 3:
        return found

    stop_after = STOP if comm.rank == comm.size - 1 else None  # one rank is asked, all must stop
    train_adaptors(tiny.Watcher(stop_after=stop_after).context(comm), stopped)
    found["stopped at"] = len(tiny.steps_of(stopped.sets[0].artifact.partial))
    if comm.size == 1:  # what was stopped on two ranks goes on alone
        train_adaptors(tiny.Watcher().context(comm), stopped)

    with pytest.raises(tiny.Killed):
        train_adaptors(tiny.Watcher(kill_after=STOP).context(comm), killed)
    resumed = tiny.Watcher()
    train_adaptors(resumed.context(comm), killed)
    found["resumed at"] = resumed.statuses[0]["done"] - 1

    found |= poisoned(comm, job_in(folder, f"{comm.size}-poisoned"))
    with pytest.raises(ArithmeticError) as error:
        train_adaptors(
            tiny.Watcher().context(comm),
            job_in(folder, f"{comm.size}-huge", learning_rate=1e30, checkpoint_steps=1),
        )
    found["huge"] = str(error.value)
    return found


class Poisoned(AdaptObjective):
    """One rank alone meets NaN."""

    def begin(self, step: int) -> None:
        super().begin(step)
        if self._context.comm.rank == self._context.comm.size - 1:
            self.classifiers[0].state.rows.fill_(torch.nan)


def poisoned(comm: Comm, job: AdaptJob) -> dict[str, Any]:
    context = tiny.Watcher().context(comm)
    objective = Poisoned(context, job)
    before = {name: p.clone() for name, p in objective.module.named_parameters()}
    optimizer = torch.optim.Adam([p for p in objective.module.parameters() if p.requires_grad])
    schedule = Schedule(STEPS, 5, lambda step: 1e-3)
    with pytest.raises(ArithmeticError) as error:
        train(context, objective, optimizer, schedule, folder=begin_job(job.sets), job=job.name)
    objective.close()
    after = dict(objective.module.named_parameters())
    return {"poisoned": str(error.value), "untouched": all(torch.equal(p, after[n]) for n, p in before.items())}


def go_on_alone(comm: Comm, job: AdaptJob) -> None:
    train_adaptors(tiny.Watcher().context(comm), job)


def only_adaptors_move(comm: Comm, job: AdaptJob) -> tuple[set[str], set[str]]:
    """Names of tensors that three steps changed, and of those that they left."""
    context = tiny.Watcher().context(comm)
    objective = AdaptObjective(context, job)
    before = {name: t.clone() for name, t in objective.module.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in objective.module.parameters() if p.requires_grad], weight_decay=1e-3)
    train(
        context,
        objective,
        optimizer,
        Schedule(3, 5, lambda step: 1e-3),
        folder=job.sets[0].artifact.begin(),
        job=job.name,
    )
    objective.close()
    moved = {name for name, t in objective.module.state_dict().items() if not torch.equal(t, before[name])}
    return moved, before.keys() - moved


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("adapt")
    tiny.write_shards(folder / "images")
    return folder, {size: run_ranks(adapt_all_ways, size, folder, timeout_s=400) for size in (1, 2, 3)}


World = tuple[Path, dict[int, list[dict[str, Any]]]]


def losses(folder: Path, out: str) -> list[float]:
    return tiny.losses_of(artifact_of(folder, out).path)


def weights(folder: Path, out: str) -> bytes:
    return (artifact_of(folder, out).path / ADAPTORS_FILE).read_bytes()


def test_the_losses_do_not_depend_on_the_number_of_ranks(world: World) -> None:
    folder, _ = world
    alone = losses(folder, "1-straight")
    assert len(alone) == STEPS
    assert alone[-1] < alone[0]
    for size in (2, 3):
        np.testing.assert_allclose(losses(folder, f"{size}-straight"), alone, rtol=0, atol=1e-5)


def test_a_global_batch_has_the_same_rows_on_any_number_of_ranks(world: World) -> None:
    folder, _ = world
    images = job_in(folder, "rows").training
    for epoch in (0, 3):
        seen = []
        for t in range(images.steps_per_epoch()):
            whole = images.order(epoch).batch(t, tiny.BATCH, 0, 1)
            seen += whole.tolist()
            for size in (2, 3, 7):
                parts = [images.order(epoch).batch(t, tiny.BATCH, rank, size) for rank in range(size)]
                assert sorted(np.concatenate(parts)) == sorted(whole)
        assert sorted(seen) == [row for row in range(tiny.NUM_ROWS) if row != tiny.BAD]


@pytest.mark.parametrize("streams", [1, 4, 7, 16])
def test_no_rank_has_more_of_a_batch_than_its_share(world: World, streams: int) -> None:
    folder, _ = world
    images = job_in(folder, "rows").training
    images = replace(images, data=images.data.model_copy(update={"streams": streams}))
    for ranks in (1, 2, 3, 5):
        places = [[(start + i) % streams % ranks for i in range(tiny.BATCH)] for start in range(streams)]
        assert images.rank_share(ranks) == max(of_batch.count(rank) for of_batch in places for rank in range(ranks))
        for t, rank in np.ndindex(images.steps_per_epoch(), ranks):
            assert len(images.order(0).batch(t, tiny.BATCH, rank, ranks)) <= images.rank_share(ranks)
    assert rank_share(128, 4, 128) == 32


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_job_that_goes_on_ends_with_the_same_bytes(world: World, size: int) -> None:
    folder, found = world
    assert {rank["resumed at"] for rank in found[size]} == {5}
    assert weights(folder, f"{size}-killed") == weights(folder, f"{size}-straight")
    assert losses(folder, f"{size}-killed") == losses(folder, f"{size}-straight")


def test_a_stopped_job_that_goes_on_ends_with_the_same_bytes(world: World) -> None:
    folder, found = world
    assert [rank["stopped at"] for rank in found[1]] == [STOP + 1]
    assert weights(folder, "1-stopped") == weights(folder, "1-straight")
    assert losses(folder, "1-stopped") == losses(folder, "1-straight")


def test_a_job_stopped_on_two_ranks_goes_on_alone_with_the_same_losses(world: World) -> None:
    folder, found = world
    job = job_in(folder, "2-stopped")
    assert [rank["stopped at"] for rank in found[2]] == [STOP + 1] * 2
    assert not job.sets[0].artifact.complete
    run_ranks(go_on_alone, 1, job, timeout_s=400)
    np.testing.assert_allclose(losses(folder, "2-stopped"), losses(folder, "2-straight"), rtol=0, atol=1e-5)
    begins = [e for e in read_events(job.sets[0].artifact.path / "metrics.jsonl") if e["name"] == "begins"]
    assert [(e["ranks"], e["at_step"]) for e in begins] == [(2, 0), (1, STOP + 1)]


def test_a_finished_set_holds_nothing_but_weights_and_log(world: World) -> None:
    folder, _ = world
    files = tiny.files_below(artifact_of(folder, "2-killed").path)
    assert set(files) == {"adaptors.safetensors", "metrics.jsonl", "manifest.json"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(world: World, size: int) -> None:
    folder, found = world
    for rank in found[size]:
        assert "k=4" in rank["poisoned"]
        assert "step 0" in rank["poisoned"]
        assert rank["untouched"]
    assert tiny.steps_of(artifact_of(folder, f"{size}-poisoned").partial) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_diverging_job_names_itself_and_the_step(world: World, size: int) -> None:
    folder, found = world
    done = len(tiny.steps_of(artifact_of(folder, f"{size}-huge", learning_rate=1e30, checkpoint_steps=1).partial))
    assert 1 <= done < STEPS
    assert {rank["huge"].split(":")[0] for rank in found[size]} == {"k=4"}
    assert all(f"at step {done};" in rank["huge"] for rank in found[size])


def test_training_moves_the_adaptors_alone(world: World) -> None:
    folder, _ = world
    moved, left = run_ranks(only_adaptors_move, 1, job_in(folder, "moves"), timeout_s=400)[0]
    assert all(".sets." in name for name in moved)
    assert {name for name in left if ".sets." in name} == set()
    assert any("patch_embed" in name for name in left)


def test_sampled_classes_make_another_set_and_all_classes_are_left_out_of_the_fingerprint(world: World) -> None:
    folder, _ = world
    jobs = (job_in(folder, "names"), job_in(folder, "names", sampled_classes=0.5))
    plain, sampled = (job.sets[0].artifact for job in jobs)
    assert "sampled_classes" not in dict(plain.settings["adapt"])  # so, the name of sets made before it was a setting
    assert sampled.fingerprint != plain.fingerprint


def test_a_fresh_adaptor_set_is_the_backbone_bit_for_bit(world: World) -> None:
    folder, _ = world
    job = job_in(folder, "fresh")
    objective = AdaptObjective(tiny.Watcher().context(Comm()), job)
    images = torch.rand(5, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(objective.model(images)[0], build_backbone(job.backbone)(images))


def test_the_start_of_a_set_depends_on_seed_and_number_of_labels(world: World) -> None:
    folder, _ = world
    job = job_in(folder, "fresh")
    other = replace(job, training=replace(job.training, seed=1))

    def down(job: AdaptJob) -> torch.Tensor:
        return AdaptObjective(tiny.Watcher().context(Comm()), job).model.adaptors(0)[0].down_weight.detach()

    assert torch.equal(down(job), down(job))
    assert not torch.equal(down(job), down(other))
    assert not torch.equal(down(job), down(with_set(job, num_labels=5)))


def test_the_classifier_starts_as_unit_rows_along_the_centroids_where_there_are_any(world: World) -> None:
    folder, _ = world
    centroids = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    np.save(folder / "centroids.npy", centroids)
    job = job_in(folder, "fresh")

    def start(job: AdaptJob) -> np.ndarray:
        found: np.ndarray = AdaptObjective(tiny.Watcher().context(Comm()), job).classifiers[0].state.rows.numpy()
        return found

    expected = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    np.testing.assert_allclose(start(with_set(job, centroids=folder / "centroids.npy")), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(start(job), axis=1), 1, atol=1e-6)
