"""Images/s: the models alone on images in memory, and with reading and decoding by some threads.

Operations are those of the matrix products and convolutions that torch runs, counted by its FlopCounterMode on two
images less one; a multiplication and an addition are two. Backward products of activations count, recomputation none.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grappa_dist.config import BackboneConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.gpu_check.checks import BF16, FP32, TERA, Figure, Found, Machine, NotHere
from grappa_dist.gpu_check.inputs import only_rank, write_photos
from grappa_dist.gpu_check.jobs import Watcher, World
from grappa_dist.gpu_check.limits import fastest_s, wait_for
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone
from grappa_dist.stages.embed import Embedding, embed_rows
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import Pace
from grappa_dist.training.optim import adam

MEASURED_S, TINY_S = 5.0, 0.3  # of a rate
WARM_BATCHES = 2  # that load what is needed, and fill the queue
PHOTO_PX = (400, 300)
FORWARD, STEP = "forward alone", "step alone"  # limits, in images/s


def _backbone(machine: Machine) -> BackboneConfig:
    if machine.tiny:
        return BackboneConfig(name="grappa_dist.demo.backbone:create", precision=machine.precision)
    vit = {"name": "vit_small_patch16_224", "image_size": 224}
    name = "grappa_dist.gpu_check.inputs:untrained_vit"
    return BackboneConfig(name=name, kwargs=vit, image_size=224, precision=machine.precision)


def _images(machine: Machine) -> ImageShards:
    rows, distinct = machine.sized((4096, 256), (24, 8))
    machine.log(f"drawing {distinct} images")
    return write_photos(machine.folder / "images", rows, PHOTO_PX, distinct)


def _limit(machine: Machine) -> str:
    return BF16 if machine.device.type == "cuda" else FP32


def _counted(machine: Machine, model: nn.Module, *, backward: bool) -> float:
    """Operations of one image."""

    def operations(images: int) -> float:
        size = model.preprocess.image_size if hasattr(model, "preprocess") else model.backbone.preprocess.image_size  # type: ignore[union-attr]
        batch = torch.zeros(images, 3, size, size, device=machine.device)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            z = model(batch)
            if backward:
                z.sum().backward()
        model.zero_grad()
        return float(counter.get_total_flops())

    return operations(2) - operations(1)


def forward_rate(machine: Machine) -> Found:
    """Features of a batch in memory, in the precision of a run."""
    model, batch = build_backbone(_backbone(machine), pretrained=False).to(machine.device), machine.sized(512, 8)
    size = model.preprocess.image_size
    images = torch.rand(batch, 3, size, size, device=machine.device)

    @torch.inference_mode()
    def work() -> None:
        for _ in range(machine.sized(8, 1)):
            model(images)

    speed = machine.sized(8, 1) * batch / fastest_s(work, machine.device, 3)
    with torch.inference_mode():
        flops = speed * _counted(machine, model, backward=False)
    share = machine.share(flops, _limit(machine))
    figures = (Figure("", speed, "images/s"), Figure("", flops / TERA, "TFLOP/s", share, _limit(machine)))
    return Found(f"batches of {batch}, {size} px", figures, limits={FORWARD: speed})


def step_rate(machine: Machine) -> Found:
    """Forward, backward and Adam of several sets through the engine, without classifiers."""
    sets, batch, steps = machine.sized((8, 128, 4), (2, 4, 1))
    model = PackedGrappa(build_backbone(_backbone(machine), pretrained=False), sets, 64)
    for index in range(sets):
        model.initialise(index, torch.Generator().manual_seed(index))
        for parameter in model.parameters_of(index):
            parameter.requires_grad_(True)
    model, size = model.to(machine.device), model.backbone.preprocess.image_size
    operations = _counted(machine, model, backward=True)
    images = torch.rand(batch, 3, size, size, device=machine.device)
    with only_rank(machine.device) as context:
        learning = [p for p in model.parameters() if p.requires_grad]
        engine = Engine(model, adam(learning, 1e-3), context.comm, machine.device)

        def work() -> None:
            for _ in range(steps):
                engine.backward(engine.forward(images).mean())
                engine.step(1e-3)

        speed = steps * batch / fastest_s(work, machine.device, 3)
        engine.close()
    flops = speed * operations
    share = machine.share(flops, _limit(machine))
    figures = (Figure("", speed, "images/s"), Figure("", flops / TERA, "TFLOP/s", share, _limit(machine)))
    return Found(f"{sets} sets, batches of {batch}, {size} px", figures, limits={STEP: speed})


def _need_cores(machine: Machine, threads: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores and not machine.tiny:
        raise NotHere(f"there are {cores} cores")


def embed_rate(machine: Machine, threads: int) -> Found:
    """Rows of shards, read, decoded, resized and embedded as the stage embed does, for some seconds."""
    _need_cores(machine, threads)
    model, images = build_backbone(_backbone(machine), pretrained=False).to(machine.device), _images(machine)
    batch = machine.sized(128, 8)
    rows = np.tile(np.arange(len(images)), machine.sized(64, 8))
    done, times = [0], list[float]()
    generator = embed_rows(model, images, rows, device=machine.device, how=Embedding(batch, threads))
    for _, unit, _ in generator:
        done.append(done[-1] + len(unit))
        times.append(time.monotonic())
        if len(times) > WARM_BATCHES and times[-1] - times[WARM_BATCHES - 1] > machine.sized(MEASURED_S, TINY_S):
            break
    generator.close()  # type: ignore[attr-defined]
    wait_for(machine.device)
    return _rate(machine, done[-1] - done[WARM_BATCHES], times[-1] - times[WARM_BATCHES - 1], FORWARD)


def adapt_rate(machine: Machine, threads: int) -> Found:
    """Steps of an adaptor job of several sets, as the stage adapt runs it, for some seconds."""
    _need_cores(machine, threads)
    sets, batch = machine.sized((8, 128), (2, 8))
    images = _images(machine)
    world = World(machine, images, _backbone(machine), batch, 1000, threads)
    watcher = Watcher(stop_after_s=machine.sized(MEASURED_S, TINY_S))
    job = world.adapt_job("rate", tuple(range(50, 50 + sets)), checkpoint_steps=10**6, bottleneck=64)
    world.run(replace(job, pace=Pace(log_s=1.0)), watcher)  # else each step waits for its figures
    (first, began), (last, ended) = watcher.steps[0], watcher.steps[-1]
    return _rate(machine, (last - first) * batch, ended - began, STEP)


def _rate(machine: Machine, images: int, seconds: float, limit: str) -> Found:
    speed = images / seconds
    return Found(f"{images:,} images of {PHOTO_PX[0]} x {PHOTO_PX[1]} px", (_figure(machine, speed, limit),))


def _figure(machine: Machine, speed: float, limit: str) -> Figure:
    return Figure("", speed, "images/s", machine.share(speed, limit), limit)
