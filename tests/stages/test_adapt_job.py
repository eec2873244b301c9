"""A job of adaptor sets: the memory that it takes and releases, and its errors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.console import read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import release_memory
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import ModelSpec, cached_model
from grappa_dist.stages import adapt_job
from grappa_dist.stages.adapt_job import AdaptJob
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.loop import NAMED
from tests.models.tiny import create
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.multi_set import KS, SCANT, close, job_in, run, weights


def test_the_log_has_the_batch_size_and_the_reason_for_it(trained: Path) -> None:
    (one,) = job_in(trained, "auto", (3,)).sets
    (begins,) = [event for event in read_events(one.artifact.path / "metrics.jsonl") if event["name"] == "begins"]
    assert begins["micro_batch"] == "3"
    assert begins["micro_batch_because"] == "0.00 GiB may be used, an image takes 0.2 MiB"
    assert begins["last_block"] == "TransformerEncoderLayer with NoneType is not known"
    assert not (one.artifact.path / "checkpoints").exists()


def test_a_compiled_job_logs_it_and_one_without_a_gpu_logs_why_not(trained: Path) -> None:
    (one,) = job_in(trained, "compiled", (3,)).sets
    begins = next(event for event in read_events(one.artifact.path / "metrics.jsonl") if event["name"] == "begins")
    assert begins["compile"] == "compiled; 4 images take 1000.0 ms compiled, 2000.0 ms plain"
    context = tiny.Watcher().context(Comm())
    plain = adapt_job.AdaptObjective(context, replace(job_in(trained, "names"), compiled=True))
    assert plain.decisions["compile"] == "not compiled: no GPU"


def batch_sizes_tried(comm: Comm, job: AdaptJob) -> list[Any]:
    """The largest batch that is asked for, and the one that torch.compile is tried with."""
    seen, fit = list[Any](), adapt_job.automatic_batch_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_job, "usable_bytes", lambda device, sharing: SCANT)
        patch.setattr(
            adapt_job,
            "automatic_batch_size",
            lambda c, model, folder, most, usable: fit(c, model, folder, *note(most), usable),
        )
        patch.setattr(adapt_job, "compile_if_faster", lambda model, images: note(images) and "not compiled")

        def note(images: int) -> list[int]:
            seen.append(images)
            return [images]

        adapt_job.AdaptObjective(tiny.Watcher().context(comm), job)
    return seen


def test_no_more_images_are_tried_than_a_rank_has_of_a_step(drawn: Path) -> None:
    auto = replace(job_in(drawn, "tried", micro_batch="auto"), compiled=True)
    whole, some = (replace(job_in(drawn, "tried", micro_batch=m), compiled=True) for m in (None, 7))
    assert tiny.BATCH == 16
    assert batch_sizes_tried(Comm(), whole) == [6]  # on a CPU a third, as there are three sets
    assert batch_sizes_tried(Comm(), some) == [6]  # three parts of even size
    assert run_ranks(batch_sizes_tried, 2, auto) == [[8, 3]] * 2  # three fit: eight are 3 + 3 + 2
    assert run_ranks(batch_sizes_tried, 2, whole) == [[3]] * 2
    assert run_ranks(batch_sizes_tried, 2, some) == [[4]] * 2


def broken(dim: int, depth: int) -> torch.nn.Module:
    """Gives features that are not finite for the second image of a batch."""
    model: Any = create(dim, depth)
    where = torch.zeros(tiny.BATCH, 1, 1).index_fill(0, torch.tensor(1), torch.nan)
    model.patch_embed.register_forward_hook(lambda module, given, tokens: tokens + where[: len(tokens)])
    return model  # type: ignore[no-any-return]


def error_when_a_gradient_overflows(comm: Comm, job: AdaptJob) -> str:
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
    trained: Path, size: int
) -> None:
    # Checkpoints are of two steps each.
    job = job_in(trained, f"overflow-{size}", clip_norm=None, micro_batch=tiny.BATCH)
    rows = job.training.order(0).batch(2, tiny.BATCH, 0, 1)
    named = ", ".join(f"{row} ({job.training.images.where(row)})" for row in sorted(rows)[:NAMED])
    found = run_ranks(error_when_a_gradient_overflows, size, job, timeout_s=400)
    for message in found:
        assert message.startswith(
            "k=3+k=4+k=5: gradient_norm k=4 is inf at step 2; nothing of it was saved; images of that"
        )
        assert f"images of that step: {named} and {len(rows) - NAMED} more" in message
    for k in KS:
        close(weights(trained, f"overflow-{size}", k, clip_norm=None), weights(trained, "unclipped", k, clip_norm=None))
    steps = tiny.steps_of(job.sets[1].artifact.path)
    assert len(steps) == 3 * tiny.STEPS_PER_EPOCH
    assert all(0 < step["gradient_norm"] < 10 for step in steps)


def left_of_a_job(comm: Comm, job: AdaptJob) -> tuple[set[str], set[str]]:
    """What lives of the parts of a job that is over, and of the model that the worker embedded with: before and after
    the worker releases memory, where the collector does not run by itself."""
    parts, init = dict[str, weakref.ref[Any]](), adapt_job.AdaptObjective.__init__

    def watched(objective: adapt_job.AdaptObjective, *given: Any) -> None:
        init(objective, *given)
        parts["model"], parts["rows"] = weakref.ref(objective.model), weakref.ref(objective.classifiers[0].state.rows)

    embedding = cached_model(ModelSpec("backbone", job.backbone), tiny.CPU)
    embedding.itself = [embedding]  # type: ignore[assignment]  # as some are held by what they are made of
    parts["embedding"] = weakref.ref(embedding)
    del embedding
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_job.AdaptObjective, "__init__", watched)
        run(comm, job)
    before = {name for name, part in parts.items() if part() is not None}
    release_memory()
    return before, {name for name, part in parts.items() if part() is not None}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_job_that_is_over_and_the_model_of_embedding_leave_no_memory_taken(drawn: Path, zero_stage: int) -> None:
    job = job_in(drawn, f"over-{zero_stage}", zero_stage=zero_stage, epochs=1)
    ((before, after),) = run_ranks(left_of_a_job, 1, job, timeout_s=400)
    assert "model" in before  # which the engine holds; else there is nothing to release
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
def test_a_lack_of_memory_ends_a_job_with_the_settings_that_take_less(drawn: Path, size: int) -> None:
    asked = "micro_batch is null, all of a rank's share at once; try adapt.micro_batch=auto or adapt.activation_ch"
    found = rf"ValueError: k=3: a step does not fit the GPU's memory: adapt\.{asked}.*total capacity of 79\.10 GiB\)$"
    with pytest.raises(RuntimeError, match=rf"(?m)rank {size - 1} of {size} failed[\s\S]*{found}"):
        run_ranks(run_out_of_memory, size, job_in(drawn, f"scant-{size}", (3,)), timeout_s=60)


def error_when_broken(comm: Comm, job: AdaptJob) -> str:
    with pytest.raises(ArithmeticError) as error:
        run(comm, job)
    return str(error.value)


def test_a_loss_that_is_not_finite_names_the_images_whose_features_are_not(drawn: Path) -> None:
    job = job_in(drawn, "nan", micro_batch=tiny.BATCH)
    job = replace(job, backbone=job.backbone.model_copy(update={"name": "tests.stages.test_adapt_job:broken"}))
    rows = [job.training.order(0).batch(0, tiny.BATCH, rank, 2)[1] for rank in range(2)]
    named = ", ".join(f"{row} ({job.training.images.where(row)})" for row in sorted(rows))
    losses = ", ".join(f"loss k={k} is nan" for k in KS)
    expected = f"k=3+k=4+k=5: {losses} at step 0; nothing of it was saved; images of that step: {named}"
    assert run_ranks(error_when_broken, 2, job, timeout_s=400) == [expected, expected]
    assert "image '" in expected
