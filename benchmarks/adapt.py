"""Several adaptor sets packed in one job against as many jobs one after the other: steps with decoding included.

Both sides read the same images with the same threads and do the same steps, in one process, in turns. Starting up is
outside of the clock, although a packed job does it once.

`bench.py adapt`: the classifier and packed sets against plain ones.

A training step of adaptor sets with the last block for the class token alone against the whole block.

Forward, backward and Adam of the adaptors on one batch in memory: no decoding, no classifier, which are the same on
both sides. Both take turns in one process.

A training step of packed adaptor sets as a share of what the machine's arithmetic allows.

Forward, backward and Adam through the engine, in the precision of training, on made-up images that are there already:
no decoding, no classifier. Operations are those of the matrix products that the step needs, counted on the model: the
first block forward once for all sets, the others forward and backward to their inputs, weights' gradients for adaptors
alone. What is computed again to save memory, and all that is no matrix product, takes time and counts for nothing.
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
from benchmarks.data import drawn_shards
from benchmarks.harness import (
    Timing,
    add_run,
    aligned,
    aligned_header,
    arithmetic_limit,
    check_device,
    check_positive,
    group_of_one,
    machine,
    run_workers,
    timed,
    turns,
    wait_for,
)
from grappa_dist.artifacts import RowArrays, Store
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.make_shards.building import Tell
from grappa_dist.models import PackedGrappa, create_backbone
from grappa_dist.models.backbone import forward_precision
from grappa_dist.models.packed import activation_bytes
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective
from grappa_dist.stages.adapt_packs import AdaptSet
from grappa_dist.training.batches import TrainingImages
from grappa_dist.training.compile import compile_if_it_wins
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.optim import adam

PACKED, ALONE = "packed in one job", "one job after the other"
PHOTO_PX, FIRST_K = (500, 375), 64


@dataclass(frozen=True)
class PackingSettings:
    """What to measure."""

    sets: int
    backbone: str
    image_size: int
    images: int
    threads: int
    steps: int
    repeats: int
    device: str = "cpu"
    compiled: bool = False  # of the step alone: layers, if that pays

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "sets", "image_size", "images", "threads", "steps", "repeats")
        check_device(self.device)

    @property
    def in_words(self) -> str:
        where = f"at {self.image_size} px, {self.images} images a step on {self.device}"
        return f"{self.sets} sets of {self.backbone} {where}"


def measure_packing(settings: PackingSettings, tell: Tell) -> dict[str, Timing]:
    """Seconds of a step of all sets, either way."""
    settings.check()
    tell(f"{settings.sets} adaptor sets of {settings.backbone}")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Timing] = run_workers(_measured_packing, 1, settings, Path(folder))[0]
    return found


def untrained(name: str, image_size: int) -> torch.nn.Module:
    """A timm model without weights: steps take as long with any."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return create_backbone(f"timm:{name}", {}, {"image_size": image_size}, pretrained=False).model


def _measured_packing(comm: Comm, settings: PackingSettings, folder: Path) -> dict[str, Timing]:
    torch.set_num_threads(settings.threads)
    found: dict[str, Timing] = {}
    with group_of_one(torch.device(settings.device)):
        whole = _job(settings, folder)
        jobs = {PACKED: [whole], ALONE: [_of_one(whole, index) for index in range(settings.sets)]}
        sides = {name: [_steps(job, settings) for job in of_side] for name, of_side in jobs.items()}
        for order in turns(list(sides), settings.repeats):
            for name in order:
                _, timing = timed(lambda name=name: [step() for step in sides[name]])  # type: ignore[misc]
                per_step = Timing((timing.seconds / settings.steps,), (timing.cpu / settings.steps,))
                add_run(found, name, per_step)
    return found


def _of_one(whole: AdaptJob, index: int) -> AdaptJob:
    return AdaptJob(whole.sets[index : index + 1], whole.training, whole.backbone, whole.adapt)


def _job(settings: PackingSettings, folder: Path) -> AdaptJob:
    rounds = settings.repeats * settings.steps + 1  # one that warms up
    images, _ = drawn_shards(folder, settings.images, PHOTO_PX, 0)
    store, sets = Store(folder), []
    for index in range(settings.sets):
        k = FIRST_K + index
        artifact = store.artifact(f"adaptors/k={k}", {}, {})
        sets.append(AdaptSet(k, _labels(folder, images, k), artifact))
    data = DataConfig(train=(str(folder),), streams=8)
    training = TrainingImages(images, np.empty(0, dtype=np.int64), data, settings.images, 0, settings.threads)
    backbone = BackboneConfig(
        name="benchmarks.adapt:untrained",
        kwargs={"name": settings.backbone, "image_size": settings.image_size},
        image_size=settings.image_size,
    )
    adapt = AdaptConfig(epochs=rounds, global_batch=settings.images, classifier="random")
    return AdaptJob(tuple(sets), training, backbone, adapt)


def _labels(folder: Path, images: ImageShards, num_labels: int) -> RowArrays:
    paths = []
    for shard in range(len(images.shards)):
        paths.append(folder / f"labels-{num_labels}-{shard}.npy")
        np.save(paths[-1], (np.array(images.shard_rows(shard)) % num_labels).astype(np.int32))
    return RowArrays.of(paths, images.starts)


def _steps(job: AdaptJob, settings: PackingSettings) -> Callable[[], None]:
    """What does the next steps of a job; one is done before, which loads what it needs."""
    comm, device = Comm(), torch.device(settings.device)
    objective = AdaptObjective(RankContext(comm, device, lambda status: None, lambda: False), job)
    learning = [p for p in objective.module.parameters() if p.requires_grad]
    engine = Engine(objective.module, adam(learning, 1e-3), comm, device)
    at = 0

    def steps(count: int = settings.steps) -> None:
        """Opens its stream of images and closes it, so that nothing is read ahead on the other side's time."""
        nonlocal at
        objective.begin(at)
        for _ in range(count):
            objective.backward(engine, at)
            engine.step(1e-3)
            for classifier in objective.classifiers:
                classifier.step(1e-3)
            at += 1
        wait_for(device)
        objective.close()

    steps(1)
    return steps


def packing_json(settings: PackingSettings, found: dict[str, Timing]) -> dict[str, Any]:
    packed, alone = found[PACKED], found[ALONE]
    return {
        "settings": vars(settings),
        "sides": [{"name": n, "seconds": t.seconds, "runs_s": t.runs, "cpu_seconds": t.cpu} for n, t in found.items()],
        "ratio": min(alone.runs) / min(packed.runs),
        "cpu_ratio": min(alone.cpu_runs) / min(packed.cpu_runs),
    }


def packing_text(settings: PackingSettings, found: dict[str, Timing]) -> str:
    ratios = packing_json(settings, found)
    lines: list[Sequence[str]] = [["packing", "s a step of all sets", "CPU s"]]
    lines += [[name, f"{min(t.runs):.2f}", f"{min(t.cpu_runs):.2f}"] for name, t in found.items()]
    notes = [
        f"{settings.in_words}; the least of {settings.repeats} runs of {settings.steps} steps",
        f"packed: {ratios['ratio']:.2f}x one after the other ({ratios['cpu_ratio']:.2f}x by CPU)",
    ]
    return "\n".join([aligned(lines), *notes])


BOTTLENECK = 64
_RATE = 1e-3


@dataclass(frozen=True)
class StepFindings:
    timing: Timing  # of a step
    operations: float  # of a step
    limit: float  # operations per second in one large product
    dtype: str  # of products
    compiled: str  # whether layers were compiled, and why not

    @property
    def reached(self) -> float:
        """Operations per second in the fastest step."""
        return self.operations / min(self.timing.runs)


def measure_step(settings: PackingSettings, tell: Tell) -> StepFindings:
    settings.check()
    tell(f"a step of {settings.sets} adaptor sets of {settings.backbone} on {settings.device}")
    found: StepFindings = run_workers(_measured_step, 1, settings)[0]
    return found


def _measured_step(comm: Comm, settings: PackingSettings) -> StepFindings:
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    with group_of_one(device) as comm:
        model = learning_model(settings).to(device)
        told = compile_if_it_wins(model, settings.images) if settings.compiled else "not compiled"
        learning = [p for p in model.parameters() if p.requires_grad]
        engine = Engine(model, adam(learning, _RATE), comm, device)
        images, weights = made_up_images(settings), torch.linspace(-1, 1, model.embed_dim, device=device)
        types = types_of_products(model)

        def step() -> None:
            engine.backward((engine.forward(images) * weights).mean())
            engine.step(_RATE)
            wait_for(device)

        step()  # loads what it needs
        (dtype,) = types
        limit = arithmetic_limit(device, dtype)
        runs = [timed(step)[1] for _ in range(settings.steps * settings.repeats)]
        limit = max(limit, arithmetic_limit(device, dtype))  # other work may slow down either
        engine.close()
    timing = Timing(tuple(r.seconds for r in runs), tuple(r.cpu for r in runs))
    return StepFindings(timing, step_operations(settings), limit, str(dtype).removeprefix("torch."), told)


def types_of_products(model: nn.Module) -> set[torch.dtype]:
    """Fills up with the types that the model's first convolution or linear layer computes in.

    No layer as a whole tells: the sum of its input and output has the wider type of both.
    """
    first, types = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), set[torch.dtype]()
    first.register_forward_hook(lambda layer, given, made: types.add(made.dtype))
    return types


def made_up_images(settings: PackingSettings) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    shape = (settings.images, 3, settings.image_size, settings.image_size)
    return torch.rand(shape, generator=draws).to(settings.device)


def learning_model(settings: PackingSettings, *, class_token_only: bool = True) -> PackedGrappa:
    """Adaptors that do something, in a backbone without pretrained weights; the same for the same settings."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        pixels = {"image_size": settings.image_size}
        backbone = create_backbone(f"timm:{settings.backbone}", {}, pixels, pretrained=False)
    model = PackedGrappa(backbone, settings.sets, BOTTLENECK, class_token_only=class_token_only)
    draws = torch.Generator().manual_seed(0)
    for index in range(settings.sets):
        model.initialise(index, draws)
        for parameter in model.parameters_of(index):
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=draws)
            parameter.requires_grad_(True)
    return model


def step_operations(settings: PackingSettings, *, class_token_only: bool = True) -> float:
    """Of all matrix products, a multiplication and an addition being two; counted where nothing is computed."""
    model = learning_model(settings, class_token_only=class_token_only).to("meta")
    shape = (settings.images, 3, settings.image_size, settings.image_size)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta")).mean().backward()
    return float(counter.get_total_flops())


def step_json(settings: PackingSettings, found: StepFindings) -> dict[str, Any]:
    return {
        "settings": vars(settings),
        "runs_s": found.timing.runs,
        "cpu_runs_s": found.timing.cpu_runs,
        "images_per_s": settings.images / min(found.timing.runs),
        "operations": found.operations,
        "flops": found.reached,
        "limit_flops": found.limit,
        "of_limit": found.reached / found.limit,
        "dtype": found.dtype,
        "compiled": found.compiled,
    }


def step_text(settings: PackingSettings, found: StepFindings) -> str:
    fastest = min(found.timing.runs)
    titles = ["step", "s", "images/s", "GFLOP", "TFLOP/s", "of the limit"]
    figures = [f"{fastest:.4f}", f"{settings.images / fastest:.1f}", f"{found.operations / 1e9:.1f}"]
    figures += [f"{found.reached / 1e12:.3f}", f"{found.reached / found.limit:.1%}"]
    lines: list[Sequence[str]] = [titles, [found.dtype, *figures]]
    notes = [
        f"{settings.in_words}, no decoding, no classifier; the least of {len(found.timing.runs)} steps",
        f"the limit: {found.limit / 1e12:.3f} TFLOP/s in one large product in {found.dtype}; layers {found.compiled}",
    ]
    return "\n".join([aligned(lines), *notes])


CLASS_TOKEN, WHOLE = "class token alone", "whole"


@dataclass(frozen=True)
class Side:
    timing: Timing  # of a step
    activation_bytes: int  # kept between forward and backward, of an image and all sets
    difference: float  # of its gradients from those of the whole block, as a share of the largest, in the first step


def measure_last_block(settings: PackingSettings, tell: Tell) -> dict[str, Side]:
    """Raises a ValueError where the last block of that backbone stays whole."""
    tell(f"the last block of {settings.backbone}")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _measured_last_block(settings)
    finally:
        torch.set_num_threads(before)


def _measured_last_block(settings: PackingSettings) -> dict[str, Side]:
    device = torch.device(settings.device)
    sides = (CLASS_TOKEN, WHOLE)  # of the same weights
    models = {name: learning_model(settings, class_token_only=name == CLASS_TOKEN).to(device) for name in sides}
    if models[CLASS_TOKEN].whole_because:
        raise ValueError(f"--backbone {settings.backbone}: {models[CLASS_TOKEN].whole_because}")
    images = made_up_images(settings)
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
        name: Side(
            timings[name],
            activation_bytes(model, settings.image_size),
            float((gradients[name] - gradients[WHOLE]).abs().max() / largest),
        )
        for name, model in models.items()
    }


def _step(model: PackedGrappa, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step that gives the gradients it went by."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = adam(learning, 1e-3)
    # a norm's output has the same squares whatever the adaptors do
    weights = torch.linspace(-1, 1, model.embed_dim, device=images.device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with forward_precision(images.device):
            z = model(images)
        (z.float() * weights).mean().backward()
        optimizer.step()
        wait_for(images.device)
        return torch.cat([p.grad.flatten() for p in learning if p.grad is not None])

    return step


def last_block_json(settings: PackingSettings, found: dict[str, Side]) -> dict[str, Any]:
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
        "ratio": min(whole.timing.runs) / min(short.timing.runs),
        "cpu_ratio": min(whole.timing.cpu_runs) / min(short.timing.cpu_runs),
        "activation_ratio": whole.activation_bytes / short.activation_bytes,
        "gradient_difference": short.difference,
    }


def last_block_text(settings: PackingSettings, found: dict[str, Side]) -> str:
    ratios = last_block_json(settings, found)
    lines: list[Sequence[str]] = [["last block", "s a step", "CPU s", "MiB kept of an image"]]
    lines += [
        [n, f"{min(s.timing.runs):.3f}", f"{min(s.timing.cpu_runs):.3f}", f"{s.activation_bytes / 2**20:.1f}"]
        for n, s in found.items()
    ]
    notes = [
        f"{settings.in_words}; the least of {settings.repeats} x {settings.steps} steps",
        f"whole: {ratios['ratio']:.3f}x the class token alone ({ratios['cpu_ratio']:.3f}x by CPU), "
        f"{ratios['activation_ratio']:.3f}x its activations; gradients differ by {ratios['gradient_difference']:.1e}",
    ]
    return "\n".join([aligned(lines), *notes])


SECTIONS = ("softmax", "packing", "last-block", "step")
SHORT = "against materialised logits"
DESCRIPTION = """\
softmax: the classifier of step 2, its gradients and Adam, against one that materialises the logits: ours in
chunks of classes, in chunks and spread over ranks, and with sampled classes. Prints seconds of a step, the memory
that it takes beside weights, gradient and state of Adam, and all that a rank holds. packing: several adaptor sets in
one job against as many jobs one after the other, decoding included. last-block: a step of the model with the last block
for the class token alone against the whole block. step: a step of the model, its images/s and its share of the
arithmetic limit of this machine, measured in the same run. The last three run on a GPU with --device cuda, in
bfloat16."""
EXAMPLE = """example, a minute:
  python launch/bench.py adapt --classes 100000 --repeats 1 --json adapt.json

A million classes of 384 channels take some 11 GB with materialised logits. On a GPU:
  python launch/bench.py adapt --sections step --device cuda --image-size 224 --images 512 --steps 10"""


def arguments(add: Callable[..., Any]) -> None:
    add("--classes", type=int, default=1_000_000, metavar="K", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    add("--sampled", type=float, default=0.1, metavar="SHARE", help="of the classes; default: %(default)s")
    add("--ranks", type=int, default=2, metavar="N", help="that share the classes; 1: leave out; default: 2")
    add("--threads", type=int, default=2, metavar="N", help="of a side, all ranks together; default: %(default)s")
    add("--steps", type=int, default=2, metavar="N", help="timed ones of a run; default: %(default)s")
    add("--repeats", type=int, default=2, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    add("--sets", type=int, default=8, metavar="N", help="adaptor sets, but of softmax; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="TIMM", help="but of softmax; default: %(default)s")
    add("--image-size", type=int, default=96, metavar="PX", help="but of softmax: side; default: %(default)s")
    add("--images", type=int, default=32, metavar="N", help="but of softmax: of a step; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="but of softmax; default: %(default)s")
    add("--compiled", action="store_true", help="of step, on a GPU: layers, as resources.compile=auto would")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    sections, of_packing = asked.pop("sections"), ("sets", "backbone", "image_size", "images", "device", "compiled")
    shared = {name: asked[name] for name in ("threads", "steps", "repeats")}
    packs = PackingSettings(**shared, **{name: asked.pop(name) for name in of_packing})
    classes = softmax.SoftmaxSettings(**asked)
    classes.check()
    packs.check()
    header = machine(classes.threads, "deepspeed")
    texts, numbers = [aligned_header(header)], dict[str, Any](machine=header)
    of_packs: dict[str, tuple[Callable[..., Any], ...]] = {
        "packing": (measure_packing, packing_text, packing_json),
        "last-block": (measure_last_block, last_block_text, last_block_json),
        "step": (measure_step, step_text, step_json),
    }
    if "softmax" in sections:
        sides = softmax.measure_softmax(classes, tell)
        texts.append(softmax.as_text(classes, sides))
        numbers["softmax"] = softmax.as_json(classes, sides)
    for name, (measure, as_text, as_json) in of_packs.items():
        if name in sections:
            found = measure(packs, tell)
            texts.append(as_text(packs, found))
            numbers[name.replace("-", "_")] = as_json(packs, found)
    return "\n\n".join(texts), numbers
