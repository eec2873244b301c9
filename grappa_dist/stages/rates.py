"""How fast one worker decodes and trains, measured on a few images, and what that takes of its memory, so that `auto`
can say how many sets share a job.

Only where things run follows from these figures, never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grappa_dist.data.loader import read_batches
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.placement import Rates
from grappa_dist.distributed.trial import least_seconds
from grappa_dist.distributed.worker import let_go
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone, forget_built, preprocess_of
from grappa_dist.ops.precision import forward_precision
from grappa_dist.ops.room import Room
from grappa_dist.stages.adapt_job import AdaptJob
from grappa_dist.stages.embed import to_images
from grappa_dist.training.batches import augmented, torch_seed
from grappa_dist.training.memory import room, tried, usable_bytes

CPU_IMAGES, GPU_IMAGES, REPEATS = 8, 128, 3


@dataclass(frozen=True)
class Measured:
    rates: Rates
    room: Room  # of one adaptor set
    channels: int  # D

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU trains: beside one, and only there, decoding takes nothing of the time."""
        return self.rates.overlap


def measure_rates(device: torch.device, job: AdaptJob) -> Measured:
    """Seconds and bytes an image of this worker, on the images of the first step; a task of one worker."""
    forget_built()
    usable = usable_bytes(device, job.sharing)  # before anything is there
    gpu, asked = device.type == "cuda", job.adapt.micro_batch
    most = min(GPU_IMAGES if gpu else CPU_IMAGES, asked if isinstance(asked, int) else job.training.global_batch)
    model = _model(job, 2, device)
    rows = job.training.order(0).batch_share(0, job.training.global_batch, 0, 1)
    rows = rows[: tried(model, room(model, usable).images(min(most, len(rows))))]
    preprocess = preprocess_of(model.backbone.pixels)
    decode_s = _seconds(lambda: _decode(job, preprocess, rows.tolist())) / len(rows)
    images = to_images(augmented(job.training, preprocess, rows, epoch=0, area=job.adapt.min_crop_area), device)
    two_s = _train_s(model, images) / len(rows)
    del model
    let_go()  # its memory is the next one's
    model = _model(job, 1, device)
    one_s = _train_s(model, images) / len(rows)
    set_s = max(two_s - one_s, 0.05 * one_s)  # timings of a busy machine may come out the wrong way round
    rates = Rates(decode_s, max(one_s - set_s, 0.0), set_s, overlap=gpu)
    return Measured(rates, room(model, usable), model.embed_dim)


def _decode(job: AdaptJob, preprocess: Preprocess, rows: list[int]) -> None:
    """All rows, by as many threads as a job has."""
    training, threads = job.training, job.training.decode_threads
    parts = [rows[start::threads] for start in range(threads)]

    def read(part: list[int]) -> int:
        return len(augmented(training, preprocess, part, epoch=0, area=job.adapt.min_crop_area))

    for _ in read_batches(parts, read, threads=threads):
        pass


def _model(job: AdaptJob, num_sets: int, device: torch.device) -> PackedGrappa:
    model = PackedGrappa(
        build_backbone(job.backbone), num_sets, job.adapt.bottleneck, recompute=job.adapt.activation_checkpointing
    ).to(device)
    for index in range(num_sets):
        model.initialise(index, torch.Generator(device).manual_seed(torch_seed("rates", index)))
        for parameter in model.parameters_of(index):
            parameter.requires_grad_(True)
    return model


def _train_s(model: PackedGrappa, images: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""

    def step() -> None:
        with forward_precision(images.device):
            z = model(images)
        z.float().square().mean().backward()

    return _seconds(step)


def _seconds(work: Callable[[], None]) -> float:
    """The least of a few times, after one that warms up."""
    work()
    return least_seconds(work, REPEATS)
