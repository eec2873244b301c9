"""A training step of packed adaptor sets as a share of what the machine's arithmetic allows.

Forward, backward and Adam through the engine, in the precision of training, on made-up images that are there already:
no decoding, no classifier. Operations are those of the matrix products that the step needs, counted on the model: the
first block forward once for all sets, the others forward and backward to their inputs, weights' gradients for adaptors
alone. What is computed again to save memory, and all that is no matrix product, takes time and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.adapt import PackingSettings
from benchmarks.harness import Timing, timed
from grappa_dist.bench.limit import arithmetic_limit, wait_for
from grappa_dist.bench.processes import group_of_one, run_workers
from grappa_dist.bench.table import aligned
from grappa_dist.data.progress import Tell
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import PackedGrappa, create_backbone
from grappa_dist.ops.adam import adam
from grappa_dist.training.compile import compile_if_it_wins
from grappa_dist.training.deepspeed_engine import Engine

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
