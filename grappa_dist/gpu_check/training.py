"""Training on this device: what must agree agrees, what cannot run says which setting to change.

Two jobs that differ in how they compute alone end with the same sets up to the rounding of sums in another order, which
Adam's first steps enlarge: |difference| / |weights| of what started at zero. They compute in float32, where that is
little; what is killed and resumed computes as a run does on this device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grappa_dist.config import BackboneConfig
from grappa_dist.demo.backbone import create as demo_vit
from grappa_dist.gpu_check.checks import Found, Machine
from grappa_dist.gpu_check.inputs import only_rank, write_photos
from grappa_dist.gpu_check.jobs import Watcher, World, alone, distance, same_bits
from grappa_dist.stages.adapt_job import AdaptObjective
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.fuse import FuseObjective
from grappa_dist.training.barlow_twins_loss import accumulate
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.optim import adam

APART = 0.02  # |difference| / |weights| of jobs that must agree


def _compared(distances: dict[str, float]) -> Found:
    wrong = [f"{name} is {far:.1e} apart, {APART:g} allowed" for name, far in distances.items() if not far <= APART]
    text = "apart by " + ", ".join(f"{far:.1e} ({name})" for name, far in distances.items())
    return Found(text, wrong="; ".join(wrong))


def packed(machine: Machine) -> Found:
    """Three sets in one job, and each in a job of its own."""
    world = World.small(machine)
    together = world.run(world.adapt_job("packed"))
    found = {}
    for index, one in enumerate(world.adapt_job("alone").sets):
        machine.log(f"{one.name} alone")
        found[one.name] = distance(world.run(alone(world.adapt_job("alone"), index)), together[index : index + 1])
    return _compared(found)


def micro_batch(machine: Machine) -> Found:
    """A batch in parts of uneven size, also with activations recomputed, and the whole batch."""
    world = World.small(machine)
    whole = world.run(world.adapt_job("whole", micro_batch=world.batch))
    third = -(-world.batch // 3)
    parts = world.run(world.adapt_job("parts", micro_batch=third))
    again = world.run(world.adapt_job("again", micro_batch=third, activation_checkpointing=True))
    return _compared({"in thirds": distance(parts, whole), "recomputed": distance(again, whole)})


def resume(machine: Machine) -> Found:
    """Killed after a step that no checkpoint follows, and resumed: the bits of an undisturbed job.

    Where two undisturbed jobs differ, the device itself adds up in changing order, and the resumed one may lie as far.
    """
    world, (first, then) = World.small(machine, machine.precision), machine.sized((3, 5), (1, 2))
    settings: dict[str, Any] = {"checkpoint_steps": first}
    one, other = (world.run(world.adapt_job(out, **settings)) for out in ("straight", "once more"))
    killed = world.adapt_job("killed", **settings)
    if world.run(killed, Watcher(kill_after=then)):
        return Found(wrong=f"the job ended before it could be killed after step {then}")
    resumed = world.run(killed)
    if same_bits(resumed, one):
        return Found(f"killed after step {then}, checkpoint after {first}: the same bits")
    by_chance, far = distance(other, one), distance(resumed, one)
    text = f"two undisturbed jobs are {by_chance:.1e} apart, the resumed one {far:.1e}"
    if same_bits(other, one) or far > 4 * by_chance:
        return Found(wrong=f"the resumed job ends with other bits: {text}")
    return Found(f"{text}: this device adds up in changing order")


def zero(machine: Machine) -> Found:
    """ZeRO stages 1 and 2 against 0; with one rank they cut nothing up, but their flat pieces are used."""
    world = World.small(machine)
    stages = [world.run(world.adapt_job(f"zero-{stage}", zero_stage=stage)) for stage in (0, 1, 2)]
    return _compared({f"stage {i}": distance(stages[i], stages[0]) for i in (1, 2)})


def fuse(machine: Machine) -> Found:
    """Q and K after a few steps, in micro-batches against whole batches; and on neighbours, by a k-NN graph."""
    world = World.small(machine)
    whole = world.run(world.fuse_job("whole", micro_batch=2 * world.batch))
    parts = world.run(world.fuse_job("parts", micro_batch=5 * world.batch // 8))
    found = {"in parts": distance(parts, whole)}
    machine.log("pairs of neighbours")
    near = world.run(world.fuse_job("near", "neighbours"))
    finite = all(bool(t.isfinite().all()) for one in near for t in one.values())
    compared = _compared(found)
    return (
        compared if near and finite else Found(wrong="the fusion on pairs of neighbours has values that are no numbers")
    )


def no_images(machine: Machine) -> Found:
    """Forward and backward of a step without images, as of a rank that has none: nothing learns."""
    world, wrong = World.small(machine, machine.precision), list[str]()
    none = np.zeros((0, 48, 48, 3), dtype=np.uint8)
    with only_rank(machine.device) as context:
        sets = AdaptObjective(context, world.adapt_job("sets"))
        fusion = FuseObjective(context, world.fuse_job("fusion"), machine.folder)

        def of_sets(engine: Engine) -> None:
            engine.backward(sets._forward(engine, torch.from_numpy(none), lambda: None).sum())

        def of_fusion(engine: Engine) -> None:
            accumulate(engine, fusion.module, to_images(none, machine.device), _product, micro_batch=2)

        for name, model, backward in (("sets", sets.module, of_sets), ("fusion", fusion.module, of_fusion)):
            learning = [p for p in model.parameters() if p.requires_grad]
            engine = Engine(model, adam(learning, 1e-3), context.comm, machine.device)
            before = [p.detach().clone() for p in learning]
            backward(engine)
            engine.step(1e-3)
            engine.close()
            if any(not torch.equal(a, b) for a, b in zip(before, learning, strict=True)):
                wrong.append(f"{name}: weights changed")
    return Found("sets of step 2, and the fusion", wrong="; ".join(wrong))


def _product(za: Tensor, zb: Tensor) -> Tensor:
    return (za * zb).sum()


def lack_of_memory(machine: Machine) -> Found:
    """A step in what little memory is left ends with a message that names a setting; then a smaller one runs.

    On a CPU, which has no such error, the backbone raises it.
    """
    world = (
        replace(World.small(machine, machine.precision), backbone=BackboneConfig(name=f"{__name__}:full_vit"))
        if machine.tiny
        else _large(machine)
    )
    with _little_memory(machine):
        try:
            world.run(world.adapt_job("large", micro_batch=None))
        except ValueError as error:
            told = str(error)
        else:
            return Found(wrong="the step fitted: nothing was shown")
    if "adapt.micro_batch" not in told:
        return Found(wrong=f"the message names no setting: {told[:200]}")
    smaller = world.run(world.adapt_job("small", micro_batch=4))
    return Found(f"{told.partition(' (')[0]}", wrong="" if smaller else "a smaller step did not run afterwards")


def _large(machine: Machine) -> World:
    """A ViT-S of 224 px with 1,024 images a step, which takes some 50 GiB for three sets."""
    images = write_photos(machine.folder / "images", 1024, (240, 240), 16)
    vit = {"name": "vit_small_patch16_224", "image_size": 224}
    name = "grappa_dist.gpu_check.inputs:untrained_vit"
    backbone = BackboneConfig(name=name, kwargs=vit, image_size=224, precision=machine.precision)
    return World(machine, images, backbone, 1024, 1, threads=16)


@contextmanager
def _little_memory(machine: Machine) -> Iterator[None]:
    """Leaves 4 GiB of the GPU's memory; on a CPU the demo's ViT raises the error in its last block."""
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(machine.device)[0]
        held = torch.empty(max(0, free - 4 * 2**30), dtype=torch.uint8, device=machine.device)
        try:
            yield
        finally:
            del held
            torch.cuda.empty_cache()
        return
    _Full.on = True
    try:
        yield
    finally:
        _Full.on = False


class _Full:
    """Whether `full_vit` is out of memory."""

    on = False


def full_vit() -> nn.Module:
    """The demo's ViT, whose first block raises what a GPU raises while `_Full.on`."""
    model: Any = demo_vit()

    def refuse(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if _Full.on:
            raise torch.OutOfMemoryError("CUDA out of memory (said by a test on a CPU)")

    model.blocks[0].register_forward_pre_hook(refuse)
    return model
