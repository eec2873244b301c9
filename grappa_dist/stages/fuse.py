"""fuse: N adaptor sets -> the attention that weighs them (step 3 of the paper), by one job over all ranks.

Shapes: B images of this rank, S pixels a side, L layers, N sets, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact, RowArrays, Store, replacing
from grappa_dist.config import BackboneConfig, DataConfig, FuseConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.dist.accumulate import accumulate
from grappa_dist.dist.correlation import penalty_of
from grappa_dist.dist.engine import Engine
from grappa_dist.dist.jobs import Job
from grappa_dist.dist.train import Schedule, Watch, train
from grappa_dist.dist.workers import RankContext
from grappa_dist.models import Grappa, Projector
from grappa_dist.ops.correlation import rows_are_cheaper
from grappa_dist.ops.lars import Lars
from grappa_dist.ops.losses import barlow_twins
from grappa_dist.ops.schedules import cosine
from grappa_dist.stages.embed import Embedding, to_images
from grappa_dist.stages.modelling import ADAPTORS_FILE, FUSION_FILE, backbone_settings, build_backbone, preprocess_of
from grappa_dist.stages.pairs import Pairs
from grappa_dist.stages.run import Run
from grappa_dist.stages.training import TrainingImages, data_settings, torch_seed


@dataclass(frozen=True)
class FuseJob:
    """What every rank of a fusion job is told."""

    variant: str  # transforms, neighbours; "-adam": the second recipe
    adaptors: tuple[Artifact, ...]
    labels: Mapping[int, RowArrays]  # to tell how often neighbours share a pseudo-label
    training: TrainingImages
    backbone: BackboneConfig
    bottleneck: int
    fuse: FuseConfig
    embedding: Embedding
    artifact: Artifact


def fusion_of(
    store: Store,
    variant: str,
    backbone: BackboneConfig,
    fuse: FuseConfig,
    data: DataConfig,
    seed: int,
    sets: Sequence[Artifact],
) -> Artifact:
    """The artefact of one variant."""
    settings = {
        "backbone": backbone_settings(backbone),
        "fuse": fuse.of_variant(variant),
        "data": data_settings(data),
        "seed": seed,
    }
    return store.artifact(f"fusion/{variant}", settings, {f"adaptors {i}": a for i, a in enumerate(sets)})


def least_bytes(fuse: FuseConfig, ranks: int | None) -> int:
    """Memory that every rank of a fusion job needs, whatever the backbone: projector, its gradient and momentum, C.

    Args:
        ranks: None where it is not known yet.
    """
    weights = sum(before * after for before, after in pairwise(fuse.projector))
    width = fuse.projector[-1]
    by_rows = rows_are_cheaper(fuse.global_batch, width, ranks or 2)
    return 4 * (3 * weights + width**2 // ((ranks or width) if by_rows else 1))


def fuse(
    run: Run,
    fusions: Mapping[str, Artifact],
    adaptors: Sequence[Artifact],
    labels: Mapping[int, RowArrays],
    images: ImageShards,
    bad: np.ndarray,
) -> None:
    """Trains every variant that does not exist yet, one after the other, each on all workers."""
    config = run.config
    threads = config.resources.decode_threads
    training = TrainingImages(images, bad, config.data, config.fuse.global_batch, config.seed, threads)
    for variant, artifact in fusions.items():
        if artifact.complete:
            continue
        job = FuseJob(
            variant,
            tuple(adaptors),
            labels,
            training,
            config.backbone,
            config.adapt.bottleneck,
            config.fuse,
            Embedding(config.embed.batch_size, threads),
            artifact,
        )
        steps = config.fuse.epochs * training.steps_per_epoch()
        with run.console.stage("fuse", f"{variant}, {steps} steps on {run.runner.num_workers} ranks"):
            run.runner.run_jobs([Job(variant, train_fusion, job, run.runner.num_workers)])


def train_fusion(context: RankContext, job: FuseJob) -> None:
    """One rank of a fusion job: builds, trains, and rank 0 saves Q and K; the projector is thrown away."""
    if job.artifact.complete:
        return
    config, folder = job.fuse, job.artifact.begin()
    steps = config.epochs * job.training.steps_per_epoch()
    adam = job.variant.endswith("-adam")
    peak = config.adam_learning_rate if adam else config.lars_learning_rate
    with ExitStack() as stack:
        objective = FuseObjective(context, job, folder)
        stack.callback(objective.close)
        parameters = [p for p in objective.module.parameters() if p.requires_grad]
        optimizer = (
            torch.optim.Adam(parameters, lr=peak)
            if adam
            else Lars(parameters, lr=peak, weight_decay=config.lars_weight_decay)
        )
        warmup = min(config.warmup_steps, steps - 1)
        schedule = Schedule(steps, config.checkpoint_steps, lambda step: peak * cosine(step, steps, warmup))
        watch = Watch(before_checkpoint=objective.save)
        done = train(context, objective, optimizer, schedule, folder=folder, job=job.variant, watch=watch)
        if done and context.comm.rank == 0:
            with replacing(folder / FUSION_FILE) as temporary:
                save_file(objective.grappa.attention_tensors(), temporary)
            job.artifact.commit(discard=["checkpoints", "knn/*.partial", "knn/features-*"])


class FusionModule(nn.Module):
    """What the engine holds: the fused ViT and the projector. Called with images, it gives features."""

    def __init__(self, grappa: Grappa, projector: Projector) -> None:
        super().__init__()
        self.grappa, self.projector = grappa, projector

    def forward(self, images: Tensor) -> Tensor:
        return self.grappa(images)


class FuseObjective:
    """Barlow Twins on the global batch of pairs, Eq. (4), exact whatever the micro batch and the number of ranks."""

    def __init__(self, context: RankContext, job: FuseJob, folder: Path) -> None:
        self._context, self._job = context, job
        backbone = build_backbone(job.backbone)
        preprocess = preprocess_of(backbone.pixels)
        self.grappa = Grappa(backbone, len(job.adaptors), job.bottleneck, attention=True)
        self.grappa.load_adaptors([load_file(a.path / ADAPTORS_FILE) for a in job.adaptors])
        self.grappa.trainable_attention()
        projector = Projector(backbone.embed_dim, job.fuse.projector)
        draws = torch.Generator().manual_seed(torch_seed("fusion", job.training.seed))
        for layer in self.grappa.layers:
            if layer.attention is not None:
                layer.attention.initialise(draws)
        projector.initialise(draws)
        self.module = FusionModule(self.grappa, projector).to(context.device)
        self._penalty = penalty_of(context.comm, job.fuse.global_batch, job.fuse.projector[-1])
        self._pairs = Pairs(
            context,
            job.training,
            self.grappa,
            preprocess,
            settings=job.fuse,
            neighbours=job.variant.startswith("neighbours"),
            embedding=job.embedding,
            labels=job.labels,
            folder=folder / "knn",
        )
        self._entropy = torch.zeros(len(self.grappa.layers), dtype=torch.float64)
        self._shares = torch.zeros(len(job.adaptors), dtype=torch.float64)

    def begin(self, step: int) -> None:
        self._pairs.begin(step)

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        images = to_images(
            self._pairs.at(step), self._context.device
        )  # (2B, 3, S, S): all first views, then all second
        loss = accumulate(
            engine,
            self.module,
            images,
            lambda za, zb: self._loss(za, zb),
            micro_batch=self._job.fuse.micro_batch,
            after=self._watch,
        )
        count = len(images) / 2
        figures = {"images": count, "loss": loss * count}
        figures |= {f"entropy.{i}": float(e) / 2 for i, e in enumerate(self._entropy)}
        figures |= {f"attention.{i}": float(share) / 2 for i, share in enumerate(self._shares)}
        ratios = self._decay_ratios() if count else [0.0] * len(self.grappa.layers)  # a NaN of no images would spread
        figures |= {f"decay_to_gradient.{i}": ratio * count for i, ratio in enumerate(ratios)}
        self._entropy.zero_()
        self._shares.zero_()
        return figures

    def save(self, step: int) -> None:
        self._pairs.save(step)

    def close(self) -> None:
        self._pairs.close()

    def _loss(self, za: Tensor, zb: Tensor) -> Tensor:
        self._pairs.keep(za)
        allsum, project = self._context.comm.allsum, self.module.projector
        ga, gb = project(za, allsum), project(zb, allsum)
        return self._job.fuse.loss_scale * barlow_twins(ga, gb, self._job.fuse.beta, allsum, penalty=self._penalty)

    def _watch(self) -> None:
        """Adds entropies, as shares of log N, and mean weights over layers, of the images just seen."""
        alpha = self.grappa.last_attention().double()  # (b, L, N)
        self._shares += alpha.mean(1).sum(0).cpu()
        sets = alpha.shape[-1]
        if sets > 1:
            entropy = -(alpha * alpha.clamp_min(1e-30).log()).sum(-1) / np.log(sets)
            self._entropy += entropy.sum(0).cpu()

    def _decay_ratios(self) -> list[float]:
        """|weight decay| over |gradient| of Q and K by layer: above one, decay alone moves the attention.

        NaN where there is no gradient: the loss does not depend on that layer's attention, which tells of no balance.
        """
        decay = 0.0 if self._job.variant.endswith("-adam") else self._job.fuse.lars_weight_decay
        ratios = []
        for layer in self.grappa.layers:
            parameters = list(layer.attention.parameters()) if layer.attention is not None else []
            norm = sum(float(p.detach().square().sum()) for p in parameters) ** 0.5
            gradient = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5
            ratios.append(decay * norm / gradient if gradient else math.nan)
        return ratios
