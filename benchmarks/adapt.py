"""Training of adaptor sets: the classifier, several sets in one job, the last block, and a step's use of the machine.

softmax: see benchmarks/softmax.py.

packing: several adaptor sets in one job against as many jobs one after the other. Both sides read the same images with
the same threads and do the same steps, decoding included, in one process, in turns. Starting up is not timed, although
a multi-set job does it once.

last-block: a step of the model with the last block for the class token alone against the whole block. Forward, backward
and Adam of the adaptors on one batch in memory, without decoding and classifier, which are the same on both sides.

step: a step of a multi-set job as a share of the machine's arithmetic limit. Forward, backward and Adam through the
engine, in the precision of training, on random images in memory, without decoding and classifier. Operations are those
of the matrix products that the step needs, counted on the model: the first block forward once for all sets, the others
forward and backward to their inputs, weights' gradients for adaptors alone. Recomputation to save memory, and all that
is no matrix product, takes time and adds no operations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import softmax
from benchmarks.data import PHOTO_PX, drawn_shards
from benchmarks.harness import (
    MIB,
    Log,
    Timing,
    add_run,
    aligned,
    aligned_header,
    arithmetic_limit,
    check_device,
    check_positive,
    machine,
    run_workers,
    single_process_group,
    timed,
    turns,
    wait_for,
)
from grappa_dist.artifacts import RowArrays, Store
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import Backbone, PackedGrappa, create_backbone
from grappa_dist.models.packed import activation_bytes
from grappa_dist.models.precision import Precision
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective
from grappa_dist.stages.multi_set_jobs import AdaptSet
from grappa_dist.training.batches import TrainingImages
from grappa_dist.training.compile import compile_if_faster
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.optim import adam

PACKED, ALONE = "packed in one job", "one job after the other"
CLASS_TOKEN, WHOLE = "class token alone", "whole"
BOTTLENECK = 64
_FIRST_K = 64  # labels of the first set; each further one has one more
_RATE = 1e-3


@dataclass(frozen=True)
class AdaptSettings:
    """Options of `bench.py adapt` except for the section softmax."""

    sets: int
    backbone: str
    image_size: int
    images: int
    threads: int
    steps: int
    repeats: int
    device: str = "cpu"
    compiled: bool = False  # of the section step alone: compile layers where that pays
    precision: Precision | None = None  # None: bf16 on a GPU, fp32 on a CPU

    @property
    def computes_in(self) -> Precision:
        return self.precision or ("bf16" if self.device == "cuda" else "fp32")

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "sets", "image_size", "images", "threads", "steps", "repeats")
        check_device(self.device)

    def describe(self) -> str:
        where = f"at {self.image_size} px, {self.images} images a step on {self.device} in {self.computes_in}"
        return f"{self.sets} sets of {self.backbone} {where}"


# Several sets in one job


def measure_packing(settings: AdaptSettings, log: Log) -> dict[str, Timing]:
    """Seconds of a step of all sets, by side."""
    settings.check()
    log(f"{settings.sets} adaptor sets of {settings.backbone}")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Timing] = run_workers(_measure_packing, 1, settings, Path(folder))[0]
    return found


def untrained(name: str, image_size: int) -> nn.Module:
    """A timm model with random weights, which do not change the time of a step; `backbone.name` of the jobs."""
    return _random_backbone(name, image_size).model


def _random_backbone(name: str, image_size: int) -> Backbone:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return create_backbone(f"timm:{name}", {}, {"image_size": image_size}, pretrained=False)


def _measure_packing(comm: Comm, settings: AdaptSettings, folder: Path) -> dict[str, Timing]:
    torch.set_num_threads(settings.threads)
    found: dict[str, Timing] = {}
    with single_process_group(torch.device(settings.device)):
        packed = _job(settings, folder)
        jobs = {PACKED: [packed], ALONE: [_single_set(packed, index) for index in range(settings.sets)]}
        sides = {name: [_steps(job, settings) for job in of_side] for name, of_side in jobs.items()}
        for order in turns(list(sides), settings.repeats):
            for name in order:
                _, timing = timed(lambda name=name: [step() for step in sides[name]])  # type: ignore[misc]
                per_step = Timing((timing.seconds / settings.steps,), (timing.cpu / settings.steps,))
                add_run(found, name, per_step)
    return found


def _single_set(packed: AdaptJob, index: int) -> AdaptJob:
    return AdaptJob(packed.sets[index : index + 1], packed.training, packed.backbone, packed.adapt)


def _job(settings: AdaptSettings, folder: Path) -> AdaptJob:
    epochs = settings.repeats * settings.steps + 1  # of a step each; one warms up
    images, _ = drawn_shards(folder, settings.images, PHOTO_PX, 0)
    store, sets = Store(folder), []
    for index in range(settings.sets):
        k = _FIRST_K + index
        artifact = store.artifact(f"adaptors/k={k}", {}, {})
        sets.append(AdaptSet(k, _labels(folder, images, k), artifact))
    data = DataConfig(train=(str(folder),), streams=8)
    training = TrainingImages(images, np.empty(0, dtype=np.int64), data, settings.images, 0, settings.threads)
    backbone = BackboneConfig(
        name="benchmarks.adapt:untrained",
        kwargs={"name": settings.backbone, "image_size": settings.image_size},
        image_size=settings.image_size,
        precision=settings.computes_in,
    )
    adapt = AdaptConfig(epochs=epochs, global_batch=settings.images, classifier="random")
    return AdaptJob(tuple(sets), training, backbone, adapt)


def _labels(folder: Path, images: ImageShards, num_labels: int) -> RowArrays:
    paths = []
    for shard in range(len(images.shards)):
        paths.append(folder / f"labels-{num_labels}-{shard}.npy")
        np.save(paths[-1], (np.array(images.shard_rows(shard)) % num_labels).astype(np.int32))
    return RowArrays.of(paths, images.starts)


def _steps(job: AdaptJob, settings: AdaptSettings) -> Callable[[], None]:
    """A function that does the next steps of a job, after one step that loads what it needs."""
    comm, device = Comm(), torch.device(settings.device)
    objective = AdaptObjective(RankContext(comm, device, lambda status: None, lambda: False), job)
    learning = [p for p in objective.module.parameters() if p.requires_grad]
    engine = Engine(objective.module, adam(learning, _RATE), comm, device)
    at = 0

    def steps(count: int = settings.steps) -> None:
        """Opens and closes its stream of images, so that no image is read ahead while the other side is timed."""
        nonlocal at
        objective.begin(at)
        for _ in range(count):
            objective.backward(engine, at)
            engine.step(_RATE)
            for classifier in objective.classifiers:
                classifier.step(_RATE)
            at += 1
        wait_for(device)
        objective.close()

    steps(1)
    return steps


def packing_json(settings: AdaptSettings, found: dict[str, Timing]) -> dict[str, Any]:
    packed, alone = found[PACKED], found[ALONE]
    return {
        "settings": vars(settings),
        "sides": [{"name": n, "seconds": t.seconds, "runs_s": t.runs, "cpu_seconds": t.cpu} for n, t in found.items()],
        "ratio": alone.fastest / packed.fastest,
        "cpu_ratio": alone.fastest_cpu / packed.fastest_cpu,
    }


def packing_text(settings: AdaptSettings, found: dict[str, Timing]) -> str:
    ratios = packing_json(settings, found)
    lines: list[Sequence[str]] = [["packing", "s a step of all sets", "CPU s"]]
    lines += [[name, f"{t.fastest:.2f}", f"{t.fastest_cpu:.2f}"] for name, t in found.items()]
    notes = [
        f"{settings.describe()}; the least of {settings.repeats} runs of {settings.steps} steps",
        f"packed: {ratios['ratio']:.2f}x one after the other ({ratios['cpu_ratio']:.2f}x by CPU)",
    ]
    return "\n".join([aligned(lines), *notes])


# The last block


@dataclass(frozen=True)
class LastBlockSide:
    """One side of the section last-block."""

    timing: Timing  # of a step
    activation_bytes: int  # kept between forward and backward, of an image and all sets
    difference: float  # of its gradients to those of the whole block, as a share of the largest, in the first step


def measure_last_block(settings: AdaptSettings, log: Log) -> dict[str, LastBlockSide]:
    """A step of both sides. Raises a ValueError where the last block of that backbone stays whole."""
    log(f"the last block of {settings.backbone}")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _measure_last_block(settings)
    finally:
        torch.set_num_threads(before)


def _measure_last_block(settings: AdaptSettings) -> dict[str, LastBlockSide]:
    device = torch.device(settings.device)
    sides = (CLASS_TOKEN, WHOLE)  # of the same weights
    models = {name: learning_model(settings, class_token_only=name == CLASS_TOKEN).to(device) for name in sides}
    if models[CLASS_TOKEN].whole_because:
        raise ValueError(f"--backbone {settings.backbone}: {models[CLASS_TOKEN].whole_because}")
    images = random_images(settings)
    steps = {name: _step(model, images) for name, model in models.items()}
    gradients = {name: step() for name, step in steps.items()}  # this also warms up
    timings: dict[str, Timing] = {}
    for order in turns(list(steps), settings.repeats):
        for name in order:
            for _ in range(settings.steps):
                _, timing = timed(steps[name])
                add_run(timings, name, timing)
    largest = gradients[WHOLE].abs().max()
    return {
        name: LastBlockSide(
            timings[name],
            activation_bytes(model, settings.image_size),
            float((gradients[name] - gradients[WHOLE]).abs().max() / largest),
        )
        for name, model in models.items()
    }


def _step(model: PackedGrappa, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that does a step and returns its gradients."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = adam(learning, _RATE)
    # a linear loss: the squares of a norm's output sum up to the same whatever the adaptors do
    weights = torch.linspace(-1, 1, model.embed_dim, device=images.device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        (model(images) * weights).mean().backward()
        optimizer.step()
        wait_for(images.device)
        return torch.cat([p.grad.flatten() for p in learning if p.grad is not None])

    return step


def last_block_json(settings: AdaptSettings, found: dict[str, LastBlockSide]) -> dict[str, Any]:
    short, whole = found[CLASS_TOKEN], found[WHOLE]
    return {
        "settings": vars(settings),
        "sides": [
            {
                "name": n,
                "runs_s": s.timing.runs,
                "cpu_runs_s": s.timing.cpu_runs,
                "activation_bytes": s.activation_bytes,
            }
            for n, s in found.items()
        ],
        "ratio": whole.timing.fastest / short.timing.fastest,
        "cpu_ratio": whole.timing.fastest_cpu / short.timing.fastest_cpu,
        "activation_ratio": whole.activation_bytes / short.activation_bytes,
        "gradient_difference": short.difference,
    }


def last_block_text(settings: AdaptSettings, found: dict[str, LastBlockSide]) -> str:
    ratios = last_block_json(settings, found)
    lines: list[Sequence[str]] = [["last block", "s a step", "CPU s", "MiB kept of an image"]]
    lines += [
        [n, f"{s.timing.fastest:.3f}", f"{s.timing.fastest_cpu:.3f}", f"{s.activation_bytes / MIB:.1f}"]
        for n, s in found.items()
    ]
    notes = [
        f"{settings.describe()}; the least of {settings.repeats} x {settings.steps} steps",
        f"whole: {ratios['ratio']:.3f}x the class token alone ({ratios['cpu_ratio']:.3f}x by CPU), "
        f"{ratios['activation_ratio']:.3f}x its activations; gradients differ by {ratios['gradient_difference']:.1e}",
    ]
    return "\n".join([aligned(lines), *notes])


# A step and the arithmetic limit


@dataclass(frozen=True)
class StepFindings:
    """Results of the section step."""

    timing: Timing  # of a step
    operations: float  # of a step
    limit: float  # operations per second in one large product
    dtype: str  # of the products
    compiled: str  # whether layers were compiled, or why not

    @property
    def reached(self) -> float:
        """Operations per second in the fastest step."""
        return self.operations / self.timing.fastest


def measure_step(settings: AdaptSettings, log: Log) -> StepFindings:
    settings.check()
    log(f"a step of {settings.sets} adaptor sets of {settings.backbone} on {settings.device}")
    found: StepFindings = run_workers(_measure_step, 1, settings)[0]
    return found


def _measure_step(comm: Comm, settings: AdaptSettings) -> StepFindings:
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    with single_process_group(device) as comm:
        model = learning_model(settings).to(device)
        compiled = compile_if_faster(model, settings.images) if settings.compiled else "not compiled"
        learning = [p for p in model.parameters() if p.requires_grad]
        engine = Engine(model, adam(learning, _RATE), comm, device)
        images, weights = random_images(settings), torch.linspace(-1, 1, model.embed_dim, device=device)
        types = types_of_products(model)

        def step() -> None:
            engine.backward((engine.forward(images) * weights).mean())
            engine.step(_RATE)
            wait_for(device)

        step()  # loads what it needs
        (dtype,) = types
        limit = arithmetic_limit(device, dtype)
        runs = [timed(step)[1] for _ in range(settings.steps * settings.repeats)]
        limit = max(limit, arithmetic_limit(device, dtype))  # other work on the machine may slow down either
        engine.close()
    timing = Timing(tuple(r.seconds for r in runs), tuple(r.cpu for r in runs))
    return StepFindings(timing, step_operations(settings), limit, str(dtype).removeprefix("torch."), compiled)


def types_of_products(model: nn.Module) -> set[torch.dtype]:
    """A set that collects, in later forward passes, the output types of the first convolution or linear layer.

    A whole block does not show it: the sum of its input and output has the wider type of both.
    """
    first, types = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), set[torch.dtype]()
    first.register_forward_hook(lambda layer, inputs, output: types.add(output.dtype))
    return types


def random_images(settings: AdaptSettings) -> torch.Tensor:
    shape = (settings.images, 3, settings.image_size, settings.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(settings.device)


def learning_model(settings: AdaptSettings, *, class_token_only: bool = True) -> PackedGrappa:
    """Adaptors that are no identity in a randomly initialised backbone; a function of the arguments."""
    backbone = _random_backbone(settings.backbone, settings.image_size).compute_in(settings.computes_in)
    model = PackedGrappa(backbone, settings.sets, BOTTLENECK, class_token_only=class_token_only)
    generator = torch.Generator().manual_seed(0)
    for index in range(settings.sets):
        model.initialise(index, generator)
        for parameter in model.parameters_of(index):
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(True)
    return model


def step_operations(settings: AdaptSettings, *, class_token_only: bool = True) -> float:
    """Operations of all matrix products of a step, a multiplication and an addition being two."""
    model = learning_model(settings, class_token_only=class_token_only).to("meta")  # counts without computing
    shape = (settings.images, 3, settings.image_size, settings.image_size)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta")).mean().backward()
    return float(counter.get_total_flops())


def step_json(settings: AdaptSettings, found: StepFindings) -> dict[str, Any]:
    return {
        "settings": vars(settings),
        "runs_s": found.timing.runs,
        "cpu_runs_s": found.timing.cpu_runs,
        "images_per_s": settings.images / found.timing.fastest,
        "operations": found.operations,
        "flops": found.reached,
        "limit_flops": found.limit,
        "of_limit": found.reached / found.limit,
        "dtype": found.dtype,
        "compiled": found.compiled,
    }


def step_text(settings: AdaptSettings, found: StepFindings) -> str:
    fastest = found.timing.fastest
    titles = ["step", "s", "images/s", "GFLOP", "TFLOP/s", "of the limit"]
    figures = [f"{fastest:.4f}", f"{settings.images / fastest:.1f}", f"{found.operations / 1e9:.1f}"]
    figures += [f"{found.reached / 1e12:.3f}", f"{found.reached / found.limit:.1%}"]
    lines: list[Sequence[str]] = [titles, [found.dtype, *figures]]
    notes = [
        f"{settings.describe()}, no decoding, no classifier; the least of {len(found.timing.runs)} steps",
        f"the limit: {found.limit / 1e12:.3f} TFLOP/s in one large product in {found.dtype}; layers {found.compiled}",
    ]
    return "\n".join([aligned(lines), *notes])


# The command

SECTIONS = ("softmax", "packing", "last-block", "step")
SHORT = "against materialised logits"
DESCRIPTION = """\
softmax: the classifier of step 2, its gradients and Adam, against one that materialises the logits: ours in chunks of
classes, in chunks and sharded over ranks, and with sampled classes. Prints seconds of a step, its memory beside
weights, gradient and state of Adam, and the peak of a rank. packing: several adaptor sets in one job against as many
jobs one after the other, decoding included. last-block: a step of the model with the last block for the class token
alone against the whole block. step: a step of the model, its images/s and its share of the arithmetic limit of this
machine, measured in the same run. The last three run on a GPU with --device cuda."""
EXAMPLE = """example, a minute:
  python launch/bench.py adapt --classes 100000 --repeats 1 --json adapt.json

A million classes of 384 channels take some 11 GB with materialised logits. On a GPU:
  python launch/bench.py adapt --sections step --device cuda --image-size 224 --images 512 --steps 10"""


def arguments(add: Callable[..., Any]) -> None:
    add("--classes", type=int, default=1_000_000, metavar="K", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    add("--sampled", type=float, default=0.1, metavar="SHARE", help="of the classes; default: %(default)s")
    add("--ranks", type=int, default=2, metavar="N", help="to shard the classes over; 1: leave out; default: 2")
    add("--threads", type=int, default=2, metavar="N", help="of a side, all ranks together; default: %(default)s")
    add("--steps", type=int, default=2, metavar="N", help="timed in a run; default: %(default)s")
    add("--repeats", type=int, default=2, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    add("--sets", type=int, default=8, metavar="N", help="adaptor sets; not of softmax; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="TIMM", help="not of softmax; default: %(default)s")
    add("--image-size", type=int, default=96, metavar="PX", help="not of softmax; default: %(default)s")
    add("--images", type=int, default=32, metavar="N", help="of a step; not of softmax; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="not of softmax; default: %(default)s")
    add("--precision", choices=("fp32", "bf16"), help="not of softmax; default: bf16 on a GPU, fp32 on a CPU")
    add("--compiled", action="store_true", help="of step, on a GPU: compile layers as with resources.compile=auto")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    sections, of_model = (
        options.pop("sections"),
        ("sets", "backbone", "image_size", "images", "device", "compiled", "precision"),
    )
    shared = {name: options[name] for name in ("threads", "steps", "repeats")}
    settings = AdaptSettings(**shared, **{name: options.pop(name) for name in of_model})
    of_softmax = softmax.SoftmaxSettings(**options)
    of_softmax.check()
    settings.check()
    header = machine(settings.threads, "deepspeed")
    texts, numbers = [aligned_header(header)], dict[str, Any](machine=header)
    measurements: dict[str, tuple[Any, Callable[..., Any], Callable[..., str], Callable[..., Any]]] = {
        "softmax": (of_softmax, softmax.measure_softmax, softmax.as_text, softmax.as_json),
        "packing": (settings, measure_packing, packing_text, packing_json),
        "last-block": (settings, measure_last_block, last_block_text, last_block_json),
        "step": (settings, measure_step, step_text, step_json),
    }
    for name, (of_section, measure, as_text, as_json) in measurements.items():
        if name in sections:
            found = measure(of_section, log)
            texts.append(as_text(of_section, found))
            numbers[name.replace("-", "_")] = as_json(of_section, found)
    return "\n\n".join(texts), numbers
