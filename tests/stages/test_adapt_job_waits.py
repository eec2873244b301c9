"""What a step of training asks of a device: nothing that the host has to wait for, and no batch without images."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages import adapt_job
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective, ClassificationObjective
from grappa_dist.stages.fuse import FuseObjective
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, PendingFigures
from grappa_dist.training.optim import Lars, adam
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.multi_set import job_in, run
from tests.stages.test_fuse import job_in as fuse_job_in

ASKED = {  # of a device: each is a wait for all that it was given to do
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::masked_select",
}


class Asked(TorchDispatchMode):
    """Counts what would wait for a GPU, by the line of the package or of DeepSpeed that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Counter[str]()

    def note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            if "/torch/optim/" in frame.filename:  # on a CPU its numbers are not fused, on a GPU they are
                return
            if "/grappa_dist/" in frame.filename or "/deepspeed/" in frame.filename:
                self.lines[f"{what} {Path(frame.filename).name}:{frame.lineno}"] += 1
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if name in ASKED or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


def asked_in_steps(objective: Any, engine: Engine, comm: Comm, sharded: Any = ()) -> Counter[str]:
    """What two steps ask, after one that warms up."""
    pending, asked = PendingFigures(tiny.Watcher().context(comm), DEFAULT_PACE), Asked()
    objective.begin(0)
    tolist = Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        for step in range(3):
            with asked:
                patch.setattr(Tensor, "tolist", lambda tensor: asked.note("tolist") or tolist(tensor))
                pending.add(step, objective.backward(engine, step))
                engine.step(1e-3)
                for module in sharded:
                    module.step(1e-3)
            patch.undo()
            if not step:
                asked.lines.clear()
    objective.close()
    engine.close()
    assert len(pending.read().steps) == 3
    return asked.lines


ADAPT: tuple[dict[str, Any], ...] = (
    {},
    {"micro_batch": 5},
    {"sampled_classes": 0.5, "micro_batch": 5},
    {"zero_stage": 1},
    {"zero_stage": 2, "micro_batch": 5, "clip_norm": 0.05},
)


def asked_by_adapt(comm: Comm, folder: Path) -> list[Counter[str]]:
    found = []
    for number, settings in enumerate(ADAPT):
        job = job_in(folder, f"waits-{comm.size}-{number}", **settings)
        objective = AdaptObjective(tiny.Watcher().context(comm), job)
        optimizer = adam([p for p in objective.module.parameters() if p.requires_grad], 1e-3)
        stage = job.adapt.zero_stage if comm.size > 1 else 0  # as the loop
        engine = Engine(objective.module, optimizer, comm, tiny.CPU, zero_stage=stage)
        found.append(asked_in_steps(objective, engine, comm, objective.classifiers))
    return found


def asked_by_fuse(comm: Comm, folder: Path) -> list[Counter[str]]:
    found = []
    for number, settings in enumerate(({}, {"micro_batch": 5}, {"projector": (24, 256)})):
        job = fuse_job_in(folder, f"waits-{comm.size}-{number}", "transforms", **settings)
        objective = FuseObjective(tiny.Watcher().context(comm), job, job.artifact.begin())
        optimizer = Lars([p for p in objective.module.parameters() if p.requires_grad], 1e-3)
        found.append(asked_in_steps(objective, Engine(objective.module, optimizer, comm, tiny.CPU), comm))
    return found


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("asked_by", [asked_by_adapt, asked_by_fuse])
def test_no_step_asks_a_device_for_a_number(
    drawn: Path, size: int, asked_by: Callable[[Comm, Path], list[Counter[str]]]
) -> None:
    fuse_job_in(drawn, "waits", "transforms")  # makes the adaptor sets, before ranks would side by side
    for found in run_ranks(asked_by, size, drawn, timeout_s=300):
        assert found == [Counter()] * len(found)


def refusing(patch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """A model that refuses a batch without images, as flash attention does, and notes how many images it is given."""
    forward = PackedGrappa.forward

    def checked(model: PackedGrappa, images: Tensor) -> Tensor:
        assert len(images), "batch size must be positive"
        sizes.append(len(images))
        return forward(model, images)

    patch.setattr(PackedGrappa, "forward", checked)


def one_stream(folder: Path, out: str, **adapt: Any) -> AdaptJob:
    """A job whose only stream of images is read by rank 0."""
    job = job_in(folder, out, epochs=1, **adapt)
    data = job.training.data.model_copy(update={"streams": 1})
    return replace(job, training=replace(job.training, data=data))


EMPTY: dict[str, dict[str, Any]] = {"whole": {}, "micro": {"micro_batch": 5}, "zero": {"zero_stage": 2}}


def train_with_an_idle_rank(comm: Comm, folder: Path) -> list[int]:
    """With a model that refuses a batch of none, and with one that is given it."""
    sizes = list[int]()
    for way, settings in EMPTY.items():
        with pytest.MonkeyPatch.context() as patch:
            refusing(patch, sizes)
            run(comm, one_stream(folder, f"refusing-{way}", **settings))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClassificationObjective, "_forward", forward_of_none)
            run(comm, one_stream(folder, f"given-none-{way}", **settings))
    return sizes


def forward_of_none(objective: Any, engine: Engine, pixels: Any, after: Any) -> Tensor:
    z = engine.forward(adapt_job.to_images(pixels, tiny.CPU))
    return z.view(len(objective._classes), len(pixels), z.shape[-1])


def test_a_rank_without_images_gives_a_model_none_and_adds_nothing_to_the_gradient(drawn: Path) -> None:
    sizes = run_ranks(train_with_an_idle_rank, 2, drawn, timeout_s=300)
    assert set(sizes[1]) == {1}  # an image of noise, of whose features nothing is used
    assert max(sizes[0]) > 1
    for way, settings in EMPTY.items():
        of_ways = [one_stream(drawn, f"{model}-{way}", **settings).sets for model in ("refusing", "given-none")]
        for sets in zip(*of_ways, strict=True):
            found, expected = (load_file(one.artifact.path / ADAPTORS_FILE) for one in sets)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
