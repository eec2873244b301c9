"""Several adaptor sets in one job: each is what it would be alone, and none is lost when the job ends early."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.data.shards import ImageShards
from grappa_dist.dist.comm import Comm
from grappa_dist.dist.engine import Engine
from grappa_dist.dist.train import NAMED
from grappa_dist.dist.workers import let_go
from grappa_dist.models import PackedGrappa
from grappa_dist.observe import METRICS_FILE, read_events
from grappa_dist.ops.placement import Rates
from grappa_dist.ops.room import Room
from grappa_dist.stages import adapting, packs
from grappa_dist.stages.adapt import FEW, _most_sets, adapt, adaptors_of
from grappa_dist.stages.adapting import AdaptJob, train_adaptors
from grappa_dist.stages.compiling import compile_if_it_wins
from grappa_dist.stages.modelling import ADAPTORS_FILE, ModelSpec, built
from grappa_dist.stages.packs import AdaptSet
from grappa_dist.stages.pseudo_label import rows_file
from grappa_dist.stages.rates import Measured
from tests.models import tiny as tiny_models
from tests.processes import run_ranks
from tests.stages import tiny

KS = (3, 4, 5)
CLIP = 0.05  # of gradients whose norms are about 0.1 to 0.5: it scales, and each set by another factor
SCANT = 1_000_000  # bytes, for three images of three sets, beside their classifiers
TIMES = iter((2.0, 1.0))  # seconds, of a plain pass and of a compiled one
SETTINGS: dict[str, Any] = {"clip_norm": CLIP, "epochs": 3, "checkpoint_steps": 2}


def job_in(folder: Path, out: str, ks: tuple[int, ...] = KS, **adapt: Any) -> AdaptJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, adapt={**SETTINGS, **adapt})
    images, store, sets = ImageShards.open(paths, None), Store(folder / out), []
    for k in ks:
        parent = store.artifact(f"labels/k={k}", {}, {})
        artifact = adaptors_of(store, settings.backbone, settings.adapt, settings.data, settings.seed, parent)
        sets.append(AdaptSet(k, tiny.labels_in(folder / f"labels-{k}", images, k), artifact))
    return AdaptJob(tuple(sets), tiny.training_images(settings, images), settings.backbone, settings.adapt)


def run(comm: Comm, job: AdaptJob, **watched: Any) -> None:
    train_adaptors(tiny.Watcher(**watched).context(comm), job)


def train_all_ways(comm: Comm, folder: Path) -> None:
    """Packed in one job on these ranks, and in a world of one also each set alone."""
    run(comm, job_in(folder, f"packed-{comm.size}"))
    if comm.size == 1:
        for k in KS:
            run(comm, job_in(folder, "alone", (k,)))
        run(comm, job_in(folder, "unclipped", clip_norm=None))
        run(comm, job_in(folder, "sparing", micro_batch=3, activation_checkpointing=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapting, "usable_bytes", lambda device, sharing: SCANT)
            run(comm, job_in(folder, "fitted", micro_batch="auto"))
            cheap = partial(compile_if_it_wins, backend="aot_eager", measure=lambda work: next(TIMES), halves=False)
            patch.setattr(adapting, "compile_if_it_wins", cheap)
            run(comm, replace(job_in(folder, "compiled", micro_batch=5), compiled=True))
    else:
        run(comm, job_in(folder, "zero", micro_batch=5, zero_stage=2))
        stopped = job_in(folder, "stopped", zero_stage=1)
        run(comm, stopped, stop_after=3 if comm.rank == 1 else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    tiny.write_shards(folder / "images")
    for size in (1, 2):
        run_ranks(train_all_ways, size, folder, timeout_s=400)
    return folder


def weights(folder: Path, out: str, k: int, **adapt: Any) -> dict[str, torch.Tensor]:
    (one,) = job_in(folder, out, (k,), **adapt).sets
    assert one.artifact.complete
    return load_file(one.artifact.path / ADAPTORS_FILE)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():  # sums in another order, which Adam's first steps enlarge where gradients vanish
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("out", ["packed-1", "packed-2", "sparing", "fitted", "compiled", "zero"])
def test_a_packed_set_is_the_set_trained_alone(folder: Path, out: str, k: int) -> None:
    close(weights(folder, out, k), weights(folder, "alone", k))


@pytest.mark.parametrize("k", KS)
def test_a_packed_set_leaves_the_log_that_it_would_leave_alone(folder: Path, k: int) -> None:
    logs = []
    for out in ("packed-1", "alone"):
        (one,) = job_in(folder, out, (k,)).sets
        logs.append([e for e in read_events(one.artifact.path / "metrics.jsonl") if e["name"] == "step"])
    packed, alone = logs
    assert len(packed) == 3 * tiny.STEPS_PER_EPOCH
    for found, expected in zip(packed, alone, strict=True):
        assert found.keys() == expected.keys()
        assert found["job"] == f"k={k}"
        assert 0 <= found["data_wait_share"] <= 1
        for name in ("step", "lr", "images", "loss", "accuracy", "gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_the_log_says_how_many_images_at_a_time_and_why(folder: Path) -> None:
    (one,) = job_in(folder, "fitted", (3,)).sets
    (begins,) = [event for event in read_events(one.artifact.path / "metrics.jsonl") if event["name"] == "begins"]
    assert begins["micro_batch"] == "3"
    assert begins["micro_batch_because"] == "0.00 GiB may be used, an image takes 0.2 MiB"
    assert begins["last_block"] == "TransformerEncoderLayer with NoneType is not known"
    assert not (one.artifact.path / "checkpoints").exists()


def test_a_compiled_job_says_so_and_one_without_a_gpu_says_why_not(folder: Path) -> None:
    (one,) = job_in(folder, "compiled", (3,)).sets
    begins = next(event for event in read_events(one.artifact.path / "metrics.jsonl") if event["name"] == "begins")
    assert begins["compile"] == "compiled; 4 images take 1000.0 ms compiled, 2000.0 ms plain"
    context = tiny.Watcher().context(Comm())
    plain = adapting.AdaptObjective(context, replace(job_in(folder, "names"), compiled=True))
    assert plain.settled["compile"] == "not compiled: no GPU"


def images_at_a_time(comm: Comm, job: AdaptJob) -> list[Any]:
    """The most that is asked for, and what torch.compile is tried with."""
    seen, fit = list[Any](), adapting.fitted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "usable_bytes", lambda device, sharing: SCANT)
        patch.setattr(
            adapting, "fitted", lambda c, model, folder, most, usable: fit(c, model, folder, *note(most), usable)
        )
        patch.setattr(adapting, "compile_if_it_wins", lambda model, images: note(images) and "not compiled")

        def note(images: int) -> list[int]:
            seen.append(images)
            return [images]

        adapting.AdaptObjective(tiny.Watcher().context(comm), job)
    return seen


def test_no_more_images_are_tried_than_a_rank_has_of_a_step(folder: Path) -> None:
    auto = replace(job_in(folder, "tried", micro_batch="auto"), compiled=True)
    whole, some = (replace(job_in(folder, "tried", micro_batch=m), compiled=True) for m in (None, 7))
    assert tiny.BATCH == 16
    assert images_at_a_time(Comm(), whole) == [6]  # on a CPU a third, as there are three sets
    assert images_at_a_time(Comm(), some) == [6]  # three parts of even size
    assert run_ranks(images_at_a_time, 2, auto) == [[8, 3]] * 2  # three fit: eight are 3 + 3 + 2
    assert run_ranks(images_at_a_time, 2, whole) == [[3]] * 2
    assert run_ranks(images_at_a_time, 2, some) == [[4]] * 2


def test_clipping_bounds_each_set_by_itself(folder: Path) -> None:
    (_, one, _) = job_in(folder, "packed-1").sets
    norms = [e["gradient_norm"] for e in tiny.steps_of(one.artifact.path)]
    assert max(norms) > 2 * CLIP
    unclipped = weights(folder, "unclipped", 4, clip_norm=None)
    assert any(not torch.allclose(t, unclipped[n], atol=1e-3) for n, t in weights(folder, "packed-1", 4).items())


def test_a_pack_leaves_nothing_but_its_sets(folder: Path) -> None:
    for out in ("packed-1", "packed-2"):
        assert list((folder / out / "packs").iterdir()) == []
        for one in job_in(folder, out).sets:
            assert set(tiny.files_below(one.artifact.path)) == {
                "adaptors.safetensors",
                "metrics.jsonl",
                "manifest.json",
            }


def test_the_short_name_of_a_job_is_its_own_and_fits_a_folder(folder: Path) -> None:
    many = job_in(folder, "names", (3,)).sets[0]
    sets = [replace(many, num_labels=k, artifact=replace(many.artifact, kind=f"adaptors/k={k}")) for k in range(64)]
    names = {packs.short_name(sets[:count]) for count in (1, 2, 64)}
    names |= {packs.short_name(job_in(folder, "names", (3,), clip_norm=clip).sets) for clip in (None, 1.0)}
    assert len(names) == 5
    assert all(len(name) < 64 for name in names)
    assert packs.short_name(sets[:1]) == f"k=0-{many.artifact.fingerprint}"


def test_how_a_set_is_trained_does_not_name_it(folder: Path) -> None:
    names = {one.artifact.name for one in job_in(folder, "names").sets}
    for where in (
        {"sets_per_job": 8},
        {"micro_batch": 1},
        {"micro_batch": "auto"},
        {"activation_checkpointing": True},
        {"zero_stage": 2},
    ):
        assert {one.artifact.name for one in job_in(folder, "names", **where).sets} == names
    assert names.isdisjoint(one.artifact.name for one in job_in(folder, "names", clip_norm=1.0).sets)


def test_a_pack_stopped_on_two_ranks_under_zero_goes_on_alone_and_on_three_ranks(folder: Path) -> None:
    job = job_in(folder, "stopped", zero_stage=1)
    steps = packs.pack_folder(job.sets) / "checkpoints"
    assert [path.name for path in sorted(steps.iterdir())] == ["step-000000002", "step-000000004"]
    run_ranks(run_stopped_at, 1, job_in(folder, "stopped", zero_stage=2), 5, timeout_s=400)
    run_ranks(run_stopped_at, 3, job_in(folder, "stopped"), None, timeout_s=400)
    for k in KS:
        close(weights(folder, "stopped", k), weights(folder, "alone", k))
    assert begins(job) == [(2, 0), (1, 4), (3, 6)]


def begins(job: AdaptJob) -> list[tuple[int, int]]:
    """Ranks and first step of every attempt at a finished job, as each of its sets tells them."""
    logs = [[e for e in read_events(s.artifact.path / "metrics.jsonl") if e["name"] == "begins"] for s in job.sets]
    (found,) = {tuple((event["ranks"], event["at_step"]) for event in log) for log in logs}
    return list(found)


def run_stopped_at(comm: Comm, job: AdaptJob, step: int | None) -> None:
    run(comm, job, stop_after=step)


def run_killed(comm: Comm, job: AdaptJob, step: int) -> None:
    with pytest.raises(tiny.Killed):
        run(comm, job, kill_after=step)


def test_a_killed_pack_is_taken_up_as_it_was_whatever_the_settings_say_and_ends_with_the_same_bytes(
    folder: Path,
) -> None:
    job = job_in(folder, "killed")
    run_ranks(run_killed, 1, job, 5, timeout_s=400)
    assert packs.group(job.sets, 1) == [job.sets]
    assert packs.group(job.sets[:2], 1) == [(job.sets[0],), (job.sets[1],)]  # a pack that lacks a member is none
    run_ranks(run, 1, job, timeout_s=400)
    for one, straight in zip(job.sets, job_in(folder, "packed-1").sets, strict=True):
        ours, theirs = ((a.path / ADAPTORS_FILE).read_bytes() for a in (one.artifact, straight.artifact))
        assert ours == theirs


def test_a_kill_between_two_commits_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(folder, "commits")
    commits = []
    real = Artifact.commit

    def once(artifact: Artifact, discard: Any = ()) -> None:
        if commits:
            raise tiny.Killed
        commits.append(artifact)
        real(artifact, discard)

    begun = packs.begin(job.sets)
    (begun / METRICS_FILE).write_text("")
    tensors = [weights(folder, "packed-1", k) for k in KS]
    monkeypatch.setattr(Artifact, "commit", once)
    with pytest.raises(tiny.Killed):
        packs.finish(job.sets, tensors)
    monkeypatch.undo()
    assert [one.artifact.complete for one in job.sets] == [True, False, False]
    packs.commit_trained(job.sets)
    assert all(one.artifact.complete for one in job.sets)
    assert not begun.exists()


@pytest.mark.parametrize(("asked", "names"), [(1, ["k=3", "k=5"]), (2, ["k=3+k=5"]), ("auto", ["k=3+k=5"])])
def test_only_missing_sets_are_trained_in_jobs_of_the_size_asked_for(
    folder: Path, tmp_path: Path, asked: int | str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, adapt={"epochs": 1, "sets_per_job": asked, "classifier": "random"})
    here = tiny.Here(num_workers=1)
    run_of = tiny.run_in(settings, tmp_path, here)
    images, labels, adaptors = ImageShards.open(paths, None), {}, {}
    for k in KS:
        labels[k] = run_of.store.artifact(f"labels/k={k}", {}, {})
        for shard, path in enumerate(tiny.labels_in(tmp_path / f"rows-{k}", images, k).paths):
            np.save(labels[k].begin() / rows_file(shard), np.load(path))
        labels[k].commit()
        adaptors[k] = adaptors_of(run_of.store, settings.backbone, settings.adapt, settings.data, 0, labels[k])
    adaptors[4].begin()
    adaptors[4].commit()
    adapt(run_of, adaptors, labels, images, np.array([tiny.BAD]))
    assert [name for name in here.asked if name != "measure_rates"] == names
    assert all(artifact.complete for artifact in adaptors.values())
    said = capsys.readouterr().err
    assert ("2 sets to a job: an image takes" in said) == (asked == "auto")
    assert f"{len(names)} job" in said


def test_how_many_sets_memory_holds_follows_from_the_images_at_a_time_and_the_classes(folder: Path) -> None:
    job = job_in(folder, "names")
    job = replace(job, training=replace(job.training, data=job.training.data.model_copy(update={"streams": 16})))
    found = Measured(Rates(1.0, 0.1, 0.5, overlap=False), Room(2_000, 100), channels=10)

    def most(ranks: int, **settings: Any) -> int:
        return _most_sets(replace(job, adapt=job.adapt.model_copy(update=settings)), found, ranks)

    assert most(1) == 1  # 16 images of one set are 1600 bytes
    assert most(2) == 3  # 3 of three, of which together about as many go at a time as of one: 900, and their rows 720
    assert most(4) == 3
    assert most(2, micro_batch=8) == 1  # 8 of two are 1600 too, and a rank's rows of their 5 + 4 classes 540
    assert most(1, micro_batch=2) == 2
    assert most(1, micro_batch="auto") == most(1, micro_batch=FEW) == 1
    assert most(4, micro_batch="auto") == 3


def run_with_late_files(comm: Comm, job: AdaptJob) -> bool:
    """Rank 1 sees none of rank 0's files yet, and must not write any."""
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == 1:
            patch.setattr(Artifact, "complete", property(lambda artifact: False))
            patch.setattr(packs, "begin", None)
            patch.setattr(adapting, "begin", None)
        run(comm, job)
    comm.barrier()  # rank 0 commits after the other is done
    return all(one.artifact.complete for one in job.sets)


def test_rank_zero_alone_says_whether_a_job_is_done(folder: Path) -> None:
    for out, epochs in (("packed-2", 3), ("late", 1)):
        assert run_ranks(run_with_late_files, 2, job_in(folder, out, epochs=epochs), timeout_s=60) == [True, True]


def broken(dim: int, depth: int) -> torch.nn.Module:
    """Gives features that are not finite for the second image of a batch."""
    model: Any = tiny_models.create(dim, depth)
    where = torch.zeros(tiny.BATCH, 1, 1).index_fill(0, torch.tensor(1), torch.nan)
    model.patch_embed.register_forward_hook(lambda module, given, tokens: tokens + where[: len(tokens)])
    return model  # type: ignore[no-any-return]


def said_when_a_gradient_overflows(comm: Comm, job: AdaptJob) -> str:
    """On one rank the middle set's gradient of the third step is infinite, its loss is not; then it goes on well."""
    backward, passes = Engine.backward, list[torch.Tensor]()

    def overflowing(engine: Engine, loss: torch.Tensor, *, last: bool = True) -> None:
        passes.append(loss)
        weight = engine.optimizer.param_groups[0]["params"][4]  # four are the first set's
        hook = weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        if len(passes) != 3 or comm.rank != comm.size - 1:
            hook.remove()
        backward(engine, loss, last=last)
        hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "backward", overflowing)
        with pytest.raises(ArithmeticError) as error:
            run(comm, job)
    run(comm, job)
    return str(error.value)


@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_update_and_spoils_no_checkpoint(
    folder: Path, size: int
) -> None:
    # Checkpoints are of two steps each.
    job = job_in(folder, f"overflow-{size}", clip_norm=None, micro_batch=tiny.BATCH)
    rows = job.training.order(0).batch_share(2, tiny.BATCH, 0, 1)
    named = ", ".join(f"{row} ({job.training.images.where(row)})" for row in sorted(rows)[:NAMED])
    found = run_ranks(said_when_a_gradient_overflows, size, job, timeout_s=400)
    for said in found:
        assert said.startswith("k=3+k=4+k=5: gradient_norm k=4 is inf at step 2; nothing was updated; images of that")
        assert f"images of that step: {named} and {len(rows) - NAMED} more" in said
    for k in KS:
        close(weights(folder, f"overflow-{size}", k, clip_norm=None), weights(folder, "unclipped", k, clip_norm=None))
    steps = tiny.steps_of(job.sets[1].artifact.path)
    assert len(steps) == 3 * tiny.STEPS_PER_EPOCH
    assert all(0 < step["gradient_norm"] < 10 for step in steps)


def left_of_a_job(comm: Comm, job: AdaptJob) -> tuple[set[str], set[str]]:
    """What lives of the parts of a job that is over, and of the model that the worker embedded with: before and after
    the worker lets go, where the collector does not run by itself."""
    parts, init = dict[str, weakref.ref[Any]](), adapting.AdaptObjective.__init__

    def watched(objective: adapting.AdaptObjective, *given: Any) -> None:
        init(objective, *given)
        parts["model"], parts["rows"] = weakref.ref(objective.model), weakref.ref(objective.classifiers[0].state.rows)

    embedding = built(ModelSpec("backbone", job.backbone), tiny.CPU)
    embedding.itself = [embedding]  # type: ignore[assignment]  # as some are held by what they are made of
    parts["embedding"] = weakref.ref(embedding)
    del embedding
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting.AdaptObjective, "__init__", watched)
        run(comm, job)
    before = {name for name, part in parts.items() if part() is not None}
    let_go()
    return before, {name for name, part in parts.items() if part() is not None}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_job_that_is_over_and_the_model_of_embedding_leave_no_memory_taken(folder: Path, zero_stage: int) -> None:
    job = job_in(folder, f"over-{zero_stage}", zero_stage=zero_stage, epochs=1)
    ((before, after),) = run_ranks(left_of_a_job, 1, job, timeout_s=400)
    assert "model" in before  # which the engine holds; else there is nothing to let go
    assert "embedding" not in before
    assert after == set()


def run_out_of_memory(comm: Comm, job: AdaptJob) -> None:
    """On the last rank, in its second pass; the others wait for its gradients."""
    forward, passes = PackedGrappa.forward, list[int]()

    def limited(model: PackedGrappa, images: torch.Tensor) -> torch.Tensor:
        passes.append(len(images))
        if len(passes) == 2 and comm.rank == comm.size - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 79.10 GiB\nand much more")
        return forward(model, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedGrappa, "forward", limited)
        run(comm, job)


@pytest.mark.parametrize("size", [1, 2])
def test_a_lack_of_memory_ends_a_job_with_the_settings_that_take_less(folder: Path, size: int) -> None:
    asked = "micro_batch is null, all of a rank's share at once; try adapt.micro_batch=auto or adapt.activation_ch"
    found = rf"ValueError: k=3: a step does not fit the GPU's memory: adapt\.{asked}.*total capacity of 79\.10 GiB\)$"
    with pytest.raises(RuntimeError, match=rf"(?m)rank {size - 1} of {size} failed[\s\S]*{found}"):
        run_ranks(run_out_of_memory, size, job_in(folder, f"scant-{size}", (3,)), timeout_s=60)


def said_when_broken(comm: Comm, job: AdaptJob) -> str:
    with pytest.raises(ArithmeticError) as error:
        run(comm, job)
    return str(error.value)


def test_a_loss_that_is_not_finite_names_the_images_whose_features_are_not(folder: Path) -> None:
    job = job_in(folder, "nan", micro_batch=tiny.BATCH)
    job = replace(job, backbone=job.backbone.model_copy(update={"name": "tests.stages.test_packs:broken"}))
    rows = [job.training.order(0).batch_share(0, tiny.BATCH, rank, 2)[1] for rank in range(2)]
    named = ", ".join(f"{row} ({job.training.images.where(row)})" for row in sorted(rows))
    losses = ", ".join(f"loss k={k} is nan" for k in KS)
    said = f"k=3+k=4+k=5: {losses} at step 0; nothing was updated; images of that step: {named}"
    assert run_ranks(said_when_broken, 2, job, timeout_s=400) == [said, said]
    assert "image '" in said
