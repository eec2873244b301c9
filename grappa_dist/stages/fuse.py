"""fuse: N adaptor sets and the attention that weighs them for each image (step 3 of the paper).

A variant is trained by one job over all ranks, on pairs of images, with the loss of Barlow Twins, Eq. (4). The
baselines M+A_1 and M* of the paper's table train their adaptors as well, from random values: the default init of linear
layers for both matrices of a bottleneck (ours; the paper only says "random"). So the features of the first step are not
the backbone's, and no zero leaves the attention without a gradient.

Shapes: B images of this rank, b of a micro-batch, S pixels a side, L layers, N sets, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, RowArrays, Store, wait_until_seen
from grappa_dist.config import BackboneConfig, DataConfig, FuseConfig
from grappa_dist.console import pluralize
from grappa_dist.data.rng import Purpose, torch_seed
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import save_tensors
from grappa_dist.models import Adaptors, Grappa
from grappa_dist.models.precision import products_in
from grappa_dist.models.spec import (
    ADAPTORS_FILE,
    FUSION_FILE,
    build_backbone,
    load_weights,
    release_cached_model,
    save_random_sets,
)
from grappa_dist.stages.embed import Embedding, to_images
from grappa_dist.stages.fuse_pairs import Pairs
from grappa_dist.stages.knn_graph import remove_neighbours
from grappa_dist.stages.run import Run
from grappa_dist.training.barlow_twins_loss import Projector, accumulate, barlow_twins, penalty_of, rows_are_cheaper
from grappa_dist.training.batches import TrainingImages, Turns, describe_idle_ranks, trained_by
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, Figures, Pace
from grappa_dist.training.loop import Reporting, Schedule, train
from grappa_dist.training.memory import fuse_advice, fusion_micro_batch, naming_lack_of_memory
from grappa_dist.training.optim import Lars, adam
from grappa_dist.variants import Variant

BUCKET = 5 * 10**8  # most gradients in one buffer of the engine's all-reduce, which it fills for a single rank too


@dataclass(frozen=True)
class FuseJob:
    """What every rank needs to train one variant."""

    variant: Variant
    adaptors: tuple[Artifact, ...]
    labels: Mapping[int, RowArrays]  # for the statistics of neighbours that share a pseudo-label
    training: TrainingImages
    backbone: BackboneConfig
    bottleneck: int
    fuse: FuseConfig
    embedding: Embedding
    artifact: Artifact
    random_sets: int = 0  # randomly initialised sets, trained too, in place of `adaptors`
    pace: Pace = DEFAULT_PACE
    sharing: int = 1  # most workers of a node, which share its memory


def fusion_of(
    store: Store,
    variant: str,
    backbone: BackboneConfig,
    fuse: FuseConfig,
    data: DataConfig,
    seed: int,
    inputs: Mapping[str, Artifact],
    random_sets: Mapping[str, int] = MappingProxyType({}),
) -> Artifact:
    """The artefact of one variant.

    Args:
        inputs: the adaptor sets, which depend on the images; without any, the features of the images.
        random_sets: number and bottleneck of the randomly initialised sets, if there are any.
    """
    settings = {**trained_by(backbone, data, seed, fuse=fuse.of_variant(variant)), **random_sets}
    return store.artifact(f"fusion/{variant}", settings, inputs)


def describe_unfused(fuse: FuseConfig, num_sets: int) -> str:
    """The note that one adaptor set leaves nothing to fuse; "" if there are several."""
    same = [name for name in fuse.variants if Variant.parse(name).start == "adapted"]
    if num_sets > 1 or not same:
        return ""
    return (
        f"one adaptor set only, so there is nothing to fuse: {', '.join(same)} will score as that set does "
        "(clustering.num_labels with two K or more gives several)"
    )


def fuse(
    run: Run,
    fusions: Mapping[str, Artifact],
    adaptors: Sequence[Artifact],
    labels: Mapping[int, RowArrays],
    images: ImageShards,
    bad: np.ndarray,
    *,
    turns: Turns | None = None,
) -> None:
    """Trains every variant on pairs that does not exist yet, one after the other, each on all workers."""
    config = run.config
    training = TrainingImages.of(config, images, bad, config.fuse.global_batch, turns=turns)
    for name, artifact in fusions.items():
        if artifact.complete:
            continue
        variant = Variant.parse(name)
        random_sets = variant.num_random_sets(len(adaptors))
        job = FuseJob(
            variant=variant,
            adaptors=() if random_sets else tuple(adaptors),
            labels=labels,
            training=training,
            backbone=config.backbone,
            bottleneck=config.adapt.bottleneck,
            fuse=config.fuse,
            embedding=Embedding(config.embed.batch_size, training.decode_threads),
            artifact=artifact,
            random_sets=random_sets,
            pace=Pace.of(config.resources),
            sharing=run.runner.sharing if config.fuse.micro_batch == "auto" else 1,
        )
        ranks, steps = run.runner.num_workers, training.num_steps(config.fuse.epochs)
        with run.console.stage("fuse", f"{name}, {pluralize(steps, 'step')} on {pluralize(ranks, 'rank')}"):
            if idle := describe_idle_ranks(config.data, ranks):
                run.console.log(f"fuse: {idle}")
            run.runner.run_jobs([Job(name, train_fusion, job, ranks)])
            wait_until_seen([artifact])


def train_fusion(context: RankContext, job: FuseJob) -> None:
    """One rank of a fusion job: builds and trains; rank 0 saves Q and K. The projector is discarded."""
    if context.of_rank_0(job.artifact.complete):
        return
    release_cached_model()
    config, folder, name = job.fuse, job.artifact.begin(), job.variant.name
    steps = job.training.num_steps(config.epochs)
    by_adam = job.variant.optimizer == "adam"
    peak = config.adam_learning_rate if by_adam else config.lars_learning_rate
    with naming_lack_of_memory(name, fuse_advice(config.micro_batch)), ExitStack() as stack:
        objective = FuseObjective(context, job, folder)
        stack.callback(objective.close)
        optimizer: torch.optim.Optimizer
        if by_adam:
            optimizer = adam([p for p in objective.module.parameters() if p.requires_grad], peak)
        else:
            optimizer = Lars(lars_groups(objective.module), lr=peak, weight_decay=config.lars_weight_decay)
        schedule = Schedule.falling(steps, config.checkpoint_steps, peak=peak, warmup_steps=config.warmup_steps)
        done = train(
            context,
            objective,
            optimizer,
            schedule,
            folder=folder,
            job=name,
            reporting=Reporting(uses_weights=objective.makes_a_graph),
            pace=job.pace,
        )
        if done and context.comm.rank == 0:
            save_tensors(folder / FUSION_FILE, objective.grappa.attention_tensors())
            if job.random_sets:
                save_random_sets(objective.grappa, folder)
            remove_neighbours(folder / "knn", range(1, config.epochs - 1))
            job.artifact.commit(discard=["checkpoints", "knn/*.partial"], expected=objective.graph_files())


def lars_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in groups for LARS: sets lie side by side in one tensor and have a norm each."""
    adaptors = [m for m in module.modules() if isinstance(m, Adaptors) and m.up_bias.requires_grad]
    weights = [p for a in adaptors for p in (a.down_weight, a.up_weight)]
    biases = [p for a in adaptors for p in (a.down_bias, a.up_bias)]
    of_sets = {id(p) for p in (*weights, *biases)}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in of_sets]
    if not adaptors:
        return [{"params": others}]
    sets = {"params": weights, "sets": adaptors[0].num_sets}
    return [{"params": others}, sets, {"params": biases, "biases": True}]


class FusionModule(nn.Module):
    """What the engine trains: the fused ViT and the projector. Called with images, it gives features."""

    def __init__(self, grappa: Grappa, projector: Projector) -> None:
        super().__init__()
        self.grappa, self.projector = grappa, projector

    def forward(self, images: Tensor) -> Tensor:
        return self.grappa(images)


class FuseObjective:
    """Barlow Twins on the global batch of pairs, Eq. (4), exact for any micro-batch and any number of ranks."""

    def __init__(self, context: RankContext, job: FuseJob, folder: Path) -> None:
        self._context, self._job = context, job
        backbone = build_backbone(job.backbone)
        preprocess = backbone.preprocess
        num_sets = job.random_sets or len(job.adaptors)
        self.grappa = Grappa(backbone, num_sets, job.bottleneck, attention=job.random_sets != 1)
        if job.random_sets:
            randomise_adaptors(self.grappa, job.training.seed)
        else:
            self.grappa.load_adaptors([load_weights(a.path / ADAPTORS_FILE) for a in job.adaptors])
        self.grappa.trainable_attention(and_adaptors=job.random_sets > 0)
        projector = Projector(backbone.embed_dim, job.fuse.projector)
        rng = torch.Generator().manual_seed(torch_seed(Purpose.FUSION, job.training.seed))
        for layer in self.grappa.layers:
            if layer.attention is not None:
                layer.attention.initialise(rng)
        projector.initialise(rng)
        self.module = FusionModule(self.grappa, projector).to(context.device)
        self._penalty = penalty_of(
            context.comm, job.fuse.global_batch, job.fuse.projector[-1], lambda: self._pairs.of_ranks
        )
        self._pairs = Pairs(
            context,
            job.training,
            self.grappa,
            preprocess,
            settings=job.fuse,
            neighbours=job.variant.pairs == "neighbours",
            embedding=job.embedding,
            labels=job.labels,
            folder=folder / "knn",
        )
        self._attention = AttentionStatistics(self.grappa)
        self._micro_batch = self._micro_batch_size(folder)

    def graph_files(self) -> list[str]:
        """The files of the graphs that are kept, of which other machines may have written some."""
        return self._pairs.kept_files() if self._job.variant.pairs == "neighbours" else []

    def _micro_batch_size(self, folder: Path) -> int:
        context, job = self._context, self._job
        return fusion_micro_batch(
            context,
            job.fuse.micro_batch,
            self.grappa,
            folder,
            most=2 * job.training.rank_share(context.comm.size),
            weights=sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            sharing=job.sharing,
        )

    def begin(self, step: int) -> None:
        self._pairs.begin(step)

    def makes_a_graph(self, step: int) -> bool:
        """Whether a step begins with the k-NN graph of its epoch, by the current model."""
        return self._job.variant.pairs == "neighbours" and step % self._job.training.steps_per_epoch() == 0

    def backward(self, engine: Engine, step: int) -> Figures:
        images = to_images(self._pairs.at(step), self._context.device)  # (2B, 3, S, S): first views, then second ones
        loss = accumulate(
            engine,
            self.module,
            images,
            self._loss,
            micro_batch=self._micro_batch,
            after=self._attention.add,
        )
        count = len(images) / 2
        (norm,) = engine.clip([[p for p in self.module.parameters() if p.requires_grad]], None)
        decay = 0.0 if self._job.variant.optimizer == "adam" else self._job.fuse.lars_weight_decay
        of_pairs = {"loss": loss.double() * count, "gradient_norm": norm * count}
        return {
            "images": count,
            "waited_s": self._pairs.waited_s * count,
            **of_pairs,
            **self._attention.take(2, decay, count),
        }

    def close(self) -> None:
        self._pairs.close()

    def _loss(self, za: Tensor, zb: Tensor) -> Tensor:
        allsum, project = self._context.comm.allsum, self.module.projector
        with products_in(self._job.backbone.computes_in, self._context.device):
            ga, gb = project(za, allsum).float(), project(zb, allsum).float()
        return self._job.fuse.loss_scale * barlow_twins(ga, gb, self._job.fuse.beta, allsum, penalty=self._penalty)


def randomise_adaptors(model: Grappa, seed: int) -> None:
    """Initialises all sets; set i is a function of seed and i, so the one set of M+A_1 is the first of M*."""
    first, sets = model.layers[0].adaptors, []
    for index in range(first.num_sets):
        rng = torch.Generator().manual_seed(torch_seed(Purpose.RANDOM_ADAPTORS, seed, index))
        tensors: dict[str, Tensor] = {}
        for number in range(len(model.layers)):
            adaptors = Adaptors(1, first.dim, first.bottleneck)
            adaptors.randomise(rng)
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in adaptors.tensors(0).items()}
        sets.append(tensors)
    model.load_adaptors(sets)


class AttentionStatistics:
    """Sums over the images of a step: entropies of the attention by layer, mean weights by set.

    A model without attention has no such figures.
    """

    def __init__(self, model: Grappa) -> None:
        self._model, self._sets = model, model.layers[0].adaptors.num_sets
        self._begin()

    def _begin(self) -> None:
        device = self._model.layers[0].adaptors.up_bias.device
        self._entropy = torch.zeros(len(self._model.layers), dtype=torch.float64, device=device)
        self._shares = torch.zeros(self._sets, dtype=torch.float64, device=device)

    def add(self) -> None:
        """Adds the images of the last forward pass: entropies as fractions of log N, weights as means over layers."""
        alpha = self._model.last_attention().double()  # (b, L, N)
        self._shares += alpha.mean(1).sum(0)
        if self._sets > 1:
            entropy = -(alpha * alpha.clamp_min(1e-30).log()).sum(-1) / math.log(self._sets)
            self._entropy += entropy.sum(0)

    def take(self, views: int, decay: float, count: float) -> Figures:
        """The figures of a step of `count` images, each seen in this many views, on the device; the sums start anew.

        Args:
            decay: of the weights of Q and K.
        """
        if all(layer.attention is None for layer in self._model.layers):
            return {}
        ratios = decay_ratios(self._model, decay) if count else torch.zeros_like(self._entropy)  # NaNs would spread
        of_kinds = {
            "entropy": self._entropy / views,
            "attention": self._shares / views,
            "decay_to_gradient": ratios * count,
        }
        self._begin()
        return {f"{kind}.{i}": one for kind, figures in of_kinds.items() for i, one in enumerate(figures.unbind())}


def decay_ratios(model: Grappa, decay: float) -> Tensor:
    """|weight decay| over |gradient| of Q and K by layer, (L,) float64; above one, decay outweighs the gradient.

    NaN where there is no gradient: the loss does not depend on the attention of that layer.
    """
    layers = [list(layer.attention.parameters()) if layer.attention is not None else [] for layer in model.layers]
    norms = _norms([[p.detach() for p in of_layer] for of_layer in layers])
    gradients = _norms([[p.grad for p in of_layer if p.grad is not None] for of_layer in layers])
    return torch.where(gradients == 0, math.nan, decay * norms / gradients)


def _norms(of_layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norm of each layer's tensors together, (L,) float64, on their device."""
    squares = [torch.stack([t.square().sum() for t in tensors]).double().sum() for tensors in of_layers if tensors]
    found = iter(torch.stack(squares).sqrt().unbind() if squares else ())
    return torch.stack([next(found) if tensors else torch.zeros((), dtype=torch.float64) for tensors in of_layers])


def least_bytes(fuse: FuseConfig, ranks: int | None) -> int:
    """Memory that every rank of a fusion job needs for the projector and the correlation matrix, with any backbone.

    Args:
        ranks: None if it is not known yet.
    """
    width = fuse.projector[-1]
    by_rows = rows_are_cheaper(fuse.global_batch, width, ranks or 2)
    weights = sum(before * after for before, after in pairwise(fuse.projector))
    return projector_bytes(weights) + 4 * (width**2 // ((ranks or width) if by_rows else 1))


def projector_bytes(weights: int) -> int:
    """Of a projector with this many weights, in float32: weights, gradients, copies to be summed, and momentum."""
    return 4 * (3 * weights + min(weights, BUCKET))
