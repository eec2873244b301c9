"""How many images a rank trains on at a time: as asked for, or, with `micro_batch=auto`, as its memory holds.

A memory budget says how many images, and how many adaptor sets, a worker's memory holds: arithmetic on byte counts. The
automatic batch size follows from it and, on a GPU, from a trial. Free memory differs from run to run, and the batch
size changes the last bits of a sum, so the size is kept with the checkpoints: a job that resumes on as many ranks uses
it again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch

from grappa_dist import lack_of_memory
from grappa_dist.bucket import refreshed, send
from grappa_dist.config import AdaptConfig
from grappa_dist.console import pluralize
from grappa_dist.distributed.preflight import free_memory
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import read_json, write_json
from grappa_dist.models import Backbone, Grappa, PackedGrappa
from grappa_dist.models.packed import activation_bytes

# Of free memory. On a CPU decoded images wait in it too, and there is no error when it is full.
GPU_SHARE, CPU_SHARE = 0.8, 0.5
LAYERS_AT_WORK = 6  # a layer going forward or backward takes as much as this many keep: 4.5 to 6 were seen
FILE = "checkpoints/micro_batch.json"
ONE_SET = (
    "lower adapt.sets_per_job (where it is auto, two sets are tried: give 1), or set "
    "adapt.activation_checkpointing=true"
)
Trained = PackedGrappa | Grappa


@dataclass(frozen=True)
class MemoryBudget:
    """What training may take of one worker's memory, and what an image takes of it."""

    usable_bytes: int
    image_bytes: int  # the peak, of all adaptor sets of the model

    def images(self, most: int) -> int:
        """How many images at a time, from 1 to `most`."""
        return max(1, min(most, self.usable_bytes // self.image_bytes)) if self.image_bytes else most

    def sets(self, set_bytes: Sequence[int], images: Callable[[int], int]) -> int:
        """How many sets a job may train, at least 1, in any choice of sets: the largest are counted first.

        Args:
            set_bytes: what each set takes at any batch size: its classifier's part of a rank.
            images: the batch size of a job of a number of sets.
        """
        largest = accumulate(sorted(set_bytes, reverse=True))  # what the first set takes, the first two, ...
        taken = (own + num * images(num) * self.image_bytes for num, own in enumerate(largest, start=1))
        return max((num for num, size in enumerate(taken, start=1) if size <= self.usable_bytes), default=1)


def memory_budget(model: Trained, usable: int) -> MemoryBudget:
    """The budget of `usable` bytes for images of this model."""
    recompute = isinstance(model, PackedGrappa) and model.layers[0].recompute
    return MemoryBudget(usable, image_bytes(model, recompute=recompute))


def usable_bytes(device: torch.device, sharing: int) -> int:
    """How much of this worker's memory training may take.

    Args:
        sharing: the workers of this node, which share its memory. A GPU belongs to one worker.
    """
    if device.type != "cuda":
        return int(CPU_SHARE * free_memory() / sharing)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
    return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept))


def image_bytes(model: Trained, *, recompute: bool) -> int:
    """What an image takes: what is kept between forward and backward, and a layer in the middle of its work.

    Counted by calling the model; on the meta device nothing is computed.
    """
    kept = _kept_bytes(model, recompute=False)
    of_layer = kept // max(len(model.layers) - 1, 1)
    return (_kept_bytes(model, recompute=True) if recompute else kept) + LAYERS_AT_WORK * of_layer


def _kept_bytes(model: Trained, *, recompute: bool) -> int:
    layers = list(model.layers) if isinstance(model, PackedGrappa) else []  # a fusion recomputes nothing
    asked = [layer.recompute for layer in layers]
    try:
        for layer in layers:
            layer.recompute = recompute
        return activation_bytes(model, model.backbone.preprocess.image_size)
    finally:
        for layer, before in zip(layers, asked, strict=True):
            layer.recompute = before


@dataclass(frozen=True)
class ModelSizes:
    """What there is to say of a backbone, and of a step with one adaptor set in it, without building them again."""

    channels: int  # D
    image_size: int  # pixels a side
    resize: str
    interpolation: str
    weights: int  # numbers of the backbone
    layers: int
    kept_image_bytes: int  # of an image in a step, as `image_bytes` counts them
    recomputed_image_bytes: int  # the same with adapt.activation_checkpointing
    whole_because: str  # why the last block computes all tokens; "" where it computes the class token alone

    @classmethod
    def of(cls, backbone: Backbone, bottleneck: int) -> ModelSizes:
        """Of a backbone on any device, which is not changed; it is called with one and two images."""
        with torch.device(backbone.mean.device):
            model = PackedGrappa(copy.deepcopy(backbone), 1, bottleneck)  # wraps the blocks in place
        given = backbone.preprocess
        return cls(
            channels=backbone.embed_dim,
            image_size=given.image_size,
            resize=given.resize,
            interpolation=given.interpolation,
            weights=sum(parameter.numel() for parameter in backbone.parameters()),
            layers=len(model.layers),
            kept_image_bytes=image_bytes(model, recompute=False),
            recomputed_image_bytes=image_bytes(model, recompute=True),
            whole_because=model.whole_because,
        )

    def image_bytes(self, *, recompute: bool) -> int:
        """What an image takes of memory in a step of one set."""
        return self.recomputed_image_bytes if recompute else self.kept_image_bytes


def even_size(count: int, most: int) -> int:
    """The size of the fewest parts of at most `most` of `count` items, as alike as can be; the last may be smaller."""
    parts = -(-count // most)
    return -(-count // parts) if parts else most


def micro_batch_size(asked: int | None, most: int, num_sets: int, *, on_gpu: bool) -> int:
    """As asked for, at most `most`, the images that a rank may have of a batch. None: `most` on a GPU; on a CPU the
    part of it with which all sets together have as many activations as one set has with `most`.

    Larger tensors do not fit a CPU's caches and are allocated anew each time: 8 sets were a third slower.
    """
    if asked is not None:
        return min(asked, most)
    return most if on_gpu else -(-most // num_sets)


@dataclass(frozen=True)
class AutomaticBatch:
    """How many images at a time, the same on all ranks, and why."""

    images: int
    why: str


def automatic_batch_size(context: RankContext, model: Trained, folder: Path, most: int, usable: int) -> AutomaticBatch:
    """The size of the fewest equal parts of `most` images that fit `usable` bytes; all ranks call it, and before there
    is an engine.

    Args:
        folder: of the job, where the size is kept.
        most: images of a rank in a step.

    Raises:
        ValueError: not one image fits a GPU.
    """
    comm, before = context.comm, _kept_size(folder, context.comm.size) if context.comm.rank == 0 else 0
    before = int(comm.broadcast(torch.tensor([before], device=context.device), 0))
    budget = memory_budget(model, usable)
    expected, why = before, f"as when the job began on {comm.size} ranks"
    if not before:
        expected = even_size(most, budget.images(most))
        why = f"{usable / 2**30:.2f} GiB may be used, an image takes {budget.image_bytes / 2**20:.1f} MiB"
    images = images_that_fit(model, expected)
    why += f"; {expected} were too many" if images < expected else ""
    of_all = [int(n) for n in comm.gather(torch.tensor([images], device=context.device))]
    if comm.rank == 0:
        write_json(folder / FILE, {"images": min(of_all), "ranks": comm.size})
        send(folder / FILE)
    return AutomaticBatch(
        min(of_all), why if min(of_all) == images else f"another rank has memory for {min(of_all)} only"
    )


def fusion_micro_batch(
    context: RankContext,
    asked: int | Literal["auto"],
    model: Grappa,
    folder: Path,
    *,
    most: int,
    weights: int,
    sharing: int,
) -> int:
    """Images at a time of a fusion: as asked for, or as many as fit into memory; all ranks call it.

    Args:
        most: as of `automatic_batch_size`.
        weights: numbers that are trained, whose gradients, sums and momentum take memory too.
        sharing: as of `usable_bytes`.
    """
    if asked != "auto":
        return asked
    usable = usable_bytes(context.device, sharing) - 4 * 3 * weights
    found = automatic_batch_size(context, model, folder, most, usable)
    context.report({"phase": f"at most {pluralize(found.images, 'image')} at a time ({found.why})"})
    return found.images


def _kept_size(folder: Path, ranks: int) -> int:
    """The size that the job began with on as many ranks; 0: none."""
    path = refreshed(folder / FILE)
    try:
        kept = read_json(path) if path.exists() else {"ranks": 0}
        return int(kept["images"]) if kept["ranks"] == ranks else 0
    except (ValueError, LookupError, TypeError):  # damaged: it is measured anew
        return 0


def images_that_fit(model: Trained, images: int) -> int:
    """`images`, or as many as pass a trial on a GPU; on a CPU there is no trial.

    Raises:
        ValueError: not one image fits a GPU.
    """
    if model.backbone.mean.device.type != "cuda":
        return images
    advice = ONE_SET if isinstance(model, PackedGrappa) else fuse_advice(1)
    return largest_that_runs(images, lambda count: _train_pass(model, count), advice)


def largest_that_runs(images: int, run: Callable[[int], None], advice: str = ONE_SET) -> int:
    """`images`, halved until `run` has enough memory.

    Args:
        advice: what to do where that is one image.

    Raises:
        ValueError: not one image fits.
    """
    while True:
        try:
            run(images)
            return images
        except torch.OutOfMemoryError as error:
            if images == 1:
                raise ValueError(
                    f"not one image fits the GPU's memory; {advice} ({str(error).splitlines()[0]})"
                ) from None
        images = -(-images // 2)  # here, where nothing holds what the failed run had


def _train_pass(model: Trained, images: int) -> None:
    """Forward and backward, as the engine does it; leaves no gradients."""
    size, device = model.backbone.preprocess.image_size, model.backbone.mean.device
    torch.cuda.empty_cache()
    try:
        z = model(torch.zeros(images, 3, size, size, device=device))
        if z.requires_grad:  # the attention over a single set has no gradient
            z.sum().backward()
    finally:
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def naming_lack_of_memory(job: str, advice: str) -> Iterator[None]:
    """Ends a job for good when a rank runs out of a GPU's memory: another attempt would run out of it as well.

    Raises:
        ValueError: in place of torch's error, after which the job would be started again; with `advice` on which
            settings to change.
    """
    with lack_of_memory.naming_lack_of_memory(f"{job}: a step", advice):
        yield


def adapt_advice(adapt: AdaptConfig) -> str:
    """Settings under which a step of adapt takes less memory than under `adapt`."""
    ways = [] if adapt.micro_batch == "auto" else ["adapt.micro_batch=auto"]
    ways += [] if adapt.activation_checkpointing else ["adapt.activation_checkpointing=true"]
    ways += ["a lower adapt.sets_per_job"] if adapt.sets_per_job != 1 else []
    ways += ["a higher resources.adapt_ranks"]
    asked = "null, all of a rank's share at once" if adapt.micro_batch is None else adapt.micro_batch
    return f"adapt.micro_batch is {asked}; try {' or '.join(ways)}"


def fuse_advice(micro_batch: int | Literal["auto"]) -> str:
    """As `adapt_advice`, for steps of a fusion."""
    if micro_batch == "auto":
        return "fuse.micro_batch is auto; try a number, or a smaller fuse.projector"
    return f"lower fuse.micro_batch={micro_batch}" if micro_batch > 1 else "fuse fewer sets, or use a smaller backbone"
