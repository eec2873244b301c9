"""How fast this machine does what a run does: measured in some seconds, or as an earlier run measured it.

As many threads work at once as there would be workers here, since they share memory and caches. Weights are random:
speed does not depend on them. A part is run on as many images as its share of the time allows, at least on one.

Shapes: b images at a time, S pixels a side, D channels.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from grappa_dist.config import Config, Resources, fingerprint
from grappa_dist.data.decoding import BadImage, open_picture
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.machine import processor
from grappa_dist.distributed.placement import WorkerParts, known_workers, may_have_gpus
from grappa_dist.files import read_json, write_json
from grappa_dist.models import Backbone, Grappa, PackedGrappa
from grappa_dist.models.spec import backbone_settings
from grappa_dist.training.memory import ModelSizes
from grappa_dist.training.optim import Lars

RATES_FILE = "rates.json"  # of a run, in its directory
SAMPLES = 16  # images that are decoded
MOST_IMAGES, GPU_IMAGES = 8, 64  # at a time in a pass
MOST_AT_ONCE = 4  # threads that stand for workers
PART_S = 1.2  # seconds for a part: one of a model's passes, decoding, products
_PRODUCT, _WEIGHTS = 1024, 2**21  # side of a matrix product; weights of an optimizer's step


@dataclass(frozen=True)
class Rates:
    """Seconds on one worker while others work beside it."""

    decode_s: float  # an image, for embedding
    augment_s: float  # an image and a random crop of it
    forward_s: float  # an image by the frozen backbone
    adapted_s: float  # an image by the backbone with all adaptor sets
    shared_s: float  # an image of a training step, whatever the number of sets
    set_s: float  # and for each set
    fused_s: float  # an image of a step of a fusion: forward and backward
    flops: float  # per second, of float32 matrix products
    weight_s: float  # a weight of an optimizer's step
    sizes: ModelSizes  # of the backbone that was measured
    on_gpu: bool  # decoding runs beside the rest there, and takes time from it on a CPU
    of: str  # what was measured: settings and machine, as a fingerprint
    measured_s: float

    def image_s(self, decode_s: float, compute_s: float) -> float:
        """Seconds per image of reading and computing."""
        return max(decode_s, compute_s) if self.on_gpu else decode_s + compute_s


def measured_settings(config: Config, num_sets: int) -> str:
    """What rates depend on: settings of the models, what a worker has, and the machine."""
    where, adapt = config.resources, config.adapt
    model = [backbone_settings(config.backbone), adapt.bottleneck, adapt.activation_checkpointing, num_sets]
    return fingerprint(*model, _threads(where), workers_here(where), machine_name(where))


def stored_rates(root: Path, config: Config, num_sets: int) -> Rates | None:
    """The rates that an earlier run measured on this machine with the same models; None: there are none."""
    try:
        found = read_json(root / RATES_FILE)
        sizes = ModelSizes(**found["sizes"])
        rates = Rates(**{field.name: found[field.name] for field in fields(Rates)} | {"sizes": sizes})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates if rates.of == measured_settings(config, num_sets) else None


def store_rates(root: Path, rates: Rates) -> None:
    write_json(root / RATES_FILE, asdict(rates))


def some_images(images: ImageShards) -> list[bytes]:
    """The files of some images, evenly spread; those that cannot be read are left out."""
    rows = np.unique(np.linspace(0, len(images) - 1, SAMPLES).astype(np.int64)).tolist() if len(images) else []
    return [data for data in images.images(rows) if isinstance(data, bytes)]


def measure(config: Config, num_sets: int, backbone: Backbone, files: Sequence[bytes], *, fuses: bool) -> Rates:
    """Measures this machine, in some ten seconds.

    Args:
        num_sets: adaptor sets of the run.
        backbone: with any weights; it is not changed.
        files: of some of its images, encoded; where there are none, noise of the model's size stands for them.
        fuses: whether a fusion is trained; else its step is not measured but taken for that of a set.
    """
    began = time.monotonic()
    on_gpu = may_have_gpus(config.resources) and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = ModelSizes.of(backbone.to(device), config.adapt.bottleneck)
    with _threads_of_a_worker(config.resources):
        bench = _Bench(device, workers_here(config.resources))
        readers = WorkerParts.here(config.resources).decode_threads if on_gpu else 1  # beside each other in a worker
        reading = _Bench(torch.device("cpu"), bench.at_once * readers)
        decode_s, augment_s = _decoding(reading, backbone.preprocess, files, config.adapt.min_crop_area)
        forward_s = bench.forward(backbone)
        one_s = set_s = bench.step(_sets(backbone, config, 1))
        if config.adapt.sets_per_job != 1 and num_sets > 1:  # on a busy machine the difference may come out negative
            set_s = max(bench.step(_sets(backbone, config, 2)) - one_s, 0.05 * one_s)
        fused = _fused(backbone, config, num_sets)
        adapted_s, fused_s = bench.forward(fused), bench.step(fused) if fuses else one_s
        flops, weight_s = bench.flops(), bench.weight_s()
    return Rates(
        decode_s=decode_s / readers,
        augment_s=augment_s / readers,
        forward_s=forward_s,
        adapted_s=adapted_s,
        shared_s=max(one_s - set_s, 0.0),
        set_s=set_s,
        fused_s=fused_s,
        flops=flops,
        weight_s=weight_s,
        sizes=sizes,
        on_gpu=on_gpu,
        of=measured_settings(config, num_sets),
        measured_s=time.monotonic() - began,
    )


@dataclass(frozen=True)
class _Bench:
    device: torch.device
    at_once: int

    def seconds(self, work: Callable[[int], object], most: int, part_s: float = PART_S) -> float:
        """Seconds per image of `work(b)`, by as many threads as there would be workers.

        Args:
            most: images at a time, at most.
        """
        once_s = self._together(work, 1)  # warms up, too, and may take twice as long for that
        if once_s > 3 * part_s:
            return once_s
        if once_s > part_s / 2:
            return min(once_s, self._together(work, 1))
        count = int(min(most, max(1, part_s / 2 / once_s)))
        return min(self._together(work, count) for _ in range(2)) / count

    def _together(self, work: Callable[[int], object], count: int) -> float:
        began = time.perf_counter()
        if self.at_once == 1:
            work(count)
        else:
            with ThreadPoolExecutor(self.at_once) as pool:
                list(pool.map(lambda _: work(count), range(self.at_once)))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return max(time.perf_counter() - began, 1e-6)

    @property
    def most(self) -> int:
        return GPU_IMAGES if self.device.type == "cuda" else MOST_IMAGES

    def _random(self, *shape: int) -> Tensor:
        """Numbers in [0, 1). Of zeros and ones a GPU computes faster than of images: fewer of its bits switch."""
        return torch.rand(shape, generator=torch.Generator(self.device).manual_seed(0), device=self.device)

    def forward(self, model: Backbone | Grappa) -> float:
        """Seconds of an image without a graph."""
        model, images = model.to(self.device), self._random(self.most, 3, _side(model), _side(model))

        def work(count: int) -> None:
            with torch.inference_mode():
                model(images[:count])

        return self.seconds(work, self.most)

    def step(self, model: Grappa | PackedGrappa) -> float:
        """Seconds of an image, forward and backward."""
        model, images = model.to(self.device), self._random(self.most, 3, _side(model), _side(model))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def work(count: int) -> None:
            z: Tensor = model(images[:count])
            torch.autograd.grad(z.square().mean(), trained, allow_unused=True)

        return self.seconds(work, self.most)

    def flops(self) -> float:
        x, w = self._random(2, _PRODUCT, _PRODUCT)
        return 2 * _PRODUCT**3 / self.seconds(lambda count: [x @ w for _ in range(count)], 4, PART_S / 4)

    def weight_s(self) -> float:
        """Seconds per weight of an optimizer's step, by LARS, which the fusions have."""

        def work(count: int) -> None:
            weights = nn.Parameter(torch.ones(_WEIGHTS // 1024, 1024, device=self.device))
            weights.grad = torch.ones_like(weights)
            optimizer = Lars([{"params": [weights]}], lr=0.1, weight_decay=1e-3)
            for _ in range(count):
                optimizer.step()

        return self.seconds(work, 4, PART_S / 4) / _WEIGHTS


def _decoding(bench: _Bench, preprocess: Preprocess, files: Sequence[bytes], area: float) -> tuple[float, float]:
    """Seconds of an image for embedding and of a random crop, by threads beside each other."""
    images = [data for data in files if _decodes(data)] or [_noise(preprocess.image_size)]

    def test(count: int) -> None:
        for number in range(count):
            preprocess.test(open_picture(images[number % len(images)]))

    def augment(count: int) -> None:
        draws = np.random.default_rng(0)
        for number in range(count):
            preprocess.augment(open_picture(images[number % len(images)]), draws, area)

    return bench.seconds(test, 4 * SAMPLES, PART_S / 2), bench.seconds(augment, 4 * SAMPLES, PART_S / 2)


def _decodes(data: bytes) -> bool:
    try:
        open_picture(data).pixels(8)
    except BadImage:
        return False
    return True


def _noise(side: int) -> bytes:
    """A JPEG of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def _side(model: Backbone | Grappa | PackedGrappa) -> int:
    backbone = model if isinstance(model, Backbone) else model.backbone
    return backbone.preprocess.image_size


def _sets(backbone: Backbone, config: Config, count: int) -> PackedGrappa:
    """A model that trains so many sets."""
    model = PackedGrappa(
        copy.deepcopy(backbone), count, config.adapt.bottleneck, recompute=config.adapt.activation_checkpointing
    )
    for index in range(count):
        model.initialise(index, torch.Generator().manual_seed(index))
        for parameter in model.parameters_of(index):
            parameter.requires_grad_(True)
    return model


def _fused(backbone: Backbone, config: Config, num_sets: int) -> Grappa:
    """A model whose attention is trained."""
    model = Grappa(copy.deepcopy(backbone), num_sets, config.adapt.bottleneck, attention=True)
    for layer in model.layers:
        layer.adaptors.randomise(torch.Generator().manual_seed(0))
        if layer.attention is not None:
            layer.attention.initialise(torch.Generator().manual_seed(0))
    model.trainable_attention()
    return model


@contextmanager
def _threads_of_a_worker(where: Resources) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_threads(where))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(where: Resources) -> int:
    return WorkerParts.here(where).threads(where)


def workers_here(where: Resources) -> int:
    """Threads that stand for the workers of this machine; a GPU has one."""
    if may_have_gpus(where) and torch.cuda.is_available():
        return 1
    here = max(1, len(os.sched_getaffinity(0)) // WorkerParts.here(where).cpus)
    return min(known_workers(where) or here, here, MOST_AT_ONCE)


def machine_name(where: Resources) -> str:
    """What computes here."""
    if may_have_gpus(where) and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return processor() or "CPU"
