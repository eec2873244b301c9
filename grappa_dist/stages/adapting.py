"""What the ranks of an adaptor job do: one set of adaptors, or several packed in one model, learn to classify.

Shapes: B images of this rank, b of a micro-batch, S adaptor sets, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.config import AdaptConfig, BackboneConfig
from grappa_dist.dist.classifier import Classifier, ClassifierSettings
from grappa_dist.dist.engine import Engine
from grappa_dist.dist.trackers import trackers_of
from grappa_dist.dist.train import Schedule, Watch, train
from grappa_dist.dist.workers import RankContext
from grappa_dist.models import PackedGrappa
from grappa_dist.ops.room import even_size
from grappa_dist.ops.schedules import cosine
from grappa_dist.stages.compiling import compile_if_it_wins
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.fitting import fitted, usable_bytes
from grappa_dist.stages.modelling import build_backbone, preprocess_of
from grappa_dist.stages.packs import AdaptSet, begin, commit_trained, figure, finish, pack_folder, short_name
from grappa_dist.stages.training import Pixels, Rows, TrainingImages, augmented_batches, torch_seed


@dataclass(frozen=True)
class AdaptJob:
    """What every rank of a job is told, which trains one adaptor set or several on the same images."""

    sets: tuple[AdaptSet, ...]
    training: TrainingImages
    backbone: BackboneConfig
    adapt: AdaptConfig
    trackers: tuple[str, ...] = ()
    sharing: int = 1  # workers of a node, at the most: of its memory each may take its part
    compiled: bool = False  # if that pays

    @property
    def name(self) -> str:
        return "+".join(one.name for one in self.sets)

    @property
    def num_steps(self) -> int:
        return self.adapt.epochs * self.training.steps_per_epoch()


def train_adaptors(context: RankContext, job: AdaptJob) -> None:
    """One rank of one job: builds, trains, and rank 0 saves."""
    config, comm = job.adapt, context.comm
    if _is_done(context, job):
        return
    root = job.sets[0].artifact.root
    with ExitStack() as stack:
        objective = AdaptObjective(context, job)
        stack.callback(objective.close)
        done = train(
            context,
            objective,
            _optimizer(objective, config),
            _schedule(job),
            folder=pack_folder(job.sets),
            job=job.name,
            beside=objective.beside,
            zero_stage=config.zero_stage,
            watch=Watch(
                objective.suspects,
                lambda: trackers_of(job.trackers, root, short_name(job.sets)),
                settled=objective.settled,
            ),
        )
        if done and comm.rank == 0:
            finish(job.sets, [objective.model.adaptor_tensors(i) for i in range(len(job.sets))])


def _is_done(context: RankContext, job: AdaptJob) -> bool:
    """Whether all sets are complete, as rank 0 finds: other nodes may see files late. If not, the folder is there."""
    done = False
    if context.comm.rank == 0:
        commit_trained(job.sets)
        done = all(one.artifact.complete for one in job.sets)
        if not done:
            begin(job.sets)
    return context.of_rank_0(done)


def _optimizer(objective: AdaptObjective, config: AdaptConfig) -> torch.optim.Optimizer:
    learning = [p for p in objective.module.parameters() if p.requires_grad]
    fused = learning[0].device.type == "cuda" or None
    # Weight decay is L2 added to the gradient: the paper's Adam, not AdamW
    return torch.optim.Adam(learning, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def _schedule(job: AdaptJob) -> Schedule:
    config, steps = job.adapt, job.num_steps
    warmup = min(config.warmup_steps, steps - 1)
    return Schedule(steps, config.checkpoint_steps, lambda step: config.learning_rate * cosine(step, steps, warmup))


class AdaptObjective:
    """Norm-softmax classification of a partition, Eq. (2), or of several side by side: the sum of their losses, in
    which no set's part touches what another learns."""

    def __init__(self, context: RankContext, job: AdaptJob) -> None:
        self._context, self._job, config = context, job, job.adapt
        backbone = build_backbone(job.backbone)
        self._preprocess = preprocess_of(backbone.pixels)
        self.model = PackedGrappa(backbone, len(job.sets), config.bottleneck, recompute=config.activation_checkpointing)
        self.classifiers = []
        for index, one in enumerate(job.sets):  # as if it were alone: a set's start is its own
            draws = torch.Generator().manual_seed(torch_seed("adaptors", job.training.seed, one.num_labels))
            self.model.initialise(index, draws)
            of_classes = torch_seed("classes", job.training.seed, one.num_labels)
            settings = ClassifierSettings(config.gamma, config.weight_decay, config.sampled_classes, of_classes)
            shape = (one.num_labels, self.model.embed_dim)
            classifier = Classifier(context.comm, context.device, shape, settings)
            classifier.start(one.centroids, draws)
            self.classifiers.append(classifier)
        self.module = self.model.to(context.device)
        self._learning = [self.model.parameters_of(index) for index in range(len(job.sets))]
        for parameter in (p for of_set in self._learning for p in of_set):
            parameter.requires_grad_(True)
        self.settled = {"last_block": self.model.whole_because or "class token alone"}  # for the job's log
        self._micro_batch = self._images_at_a_time()
        if job.compiled:
            images = self._micro_batch or -(-config.global_batch // context.comm.size)
            self.settled["compile"] = compile_if_it_wins(self.model, images)
        self._batches: Generator[tuple[Pixels, Rows], None, None] | None = None
        self._rows: Rows = np.empty(0, dtype=np.int64)  # of the last step
        self._at_fault: list[Tensor] = []  # which of them have features that are not finite

    def _images_at_a_time(self) -> int | None:
        """As asked for, or as many as fit beside the classifiers; None: all of a rank's share."""
        asked, job, context = self._job.adapt.micro_batch, self._job, self._context
        if asked != "auto":
            return asked
        usable = usable_bytes(context.device, job.sharing)
        if context.device.type == "cpu":  # which gives a tensor its memory when it is first written to
            usable -= sum(t.nbytes for c in self.classifiers for t in c.shard().tensors.values())
        found = fitted(context, self.model, pack_folder(job.sets), job.adapt.global_batch, usable)
        self.settled |= {"micro_batch": str(found.images), "micro_batch_because": found.why}
        context.report({"phase": f"at most {found.images} images at a time ({found.why})"})
        return found.images

    @property
    def beside(self) -> dict[str, Classifier]:
        """The classifiers by names of their sets, so that a checkpoint tells them apart."""
        return {f"classifier-{s.num_labels}": c for s, c in zip(self._job.sets, self.classifiers, strict=True)}

    def begin(self, step: int) -> None:
        job = self._job
        steps, area = range(step, job.num_steps), job.adapt.min_crop_area
        self._batches = augmented_batches(job.training, self._preprocess, self._context.comm, steps, area)

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        assert self._batches is not None
        began = time.perf_counter()
        pixels, self._rows = next(self._batches)
        waited_s = time.perf_counter() - began
        count, sets = len(self._rows), self._job.sets
        sums = torch.zeros(len(sets), 2, dtype=torch.float64, device=self._context.device)  # loss, accuracy
        self._at_fault = []
        images, parts = self._parts(count)
        labels = [self._labels(one) for one in sets]
        for classifier, of_set in zip(self.classifiers, labels, strict=True):
            classifier.begin(step, of_set)
        for number, part in enumerate(parts):
            z = engine.forward(to_images(pixels[part], self._context.device))  # (S, b, D)
            losses = self._score(z, [of_set[part] for of_set in labels], sums)
            # The engine averages gradients over ranks, whose shares are uneven: a loss weighs size / global rows.
            engine.backward(losses * (self._context.comm.size / images), last=number == len(parts) - 1)
            self._at_fault.append(~z.detach().isfinite().all(2).all(0))
        return self._figures(sums, waited_s, self._clip(engine))

    def _labels(self, one: AdaptSet) -> Tensor:
        return torch.from_numpy(one.labels.take(self._rows).astype(np.int64)).to(self._context.device)

    def _figures(self, sums: Tensor, waited_s: float, norms: list[float]) -> dict[str, float]:
        """This rank's sums: means over the sets and, where there are several, also each set's by itself."""
        count, sets = len(self._rows), self._job.sets
        figures = {"images": float(count), "waited_s": waited_s * count}
        figures |= {name: float(sums[:, i].mean()) for i, name in enumerate(("loss", "accuracy"))}
        figures |= {"gradient_norm": count * sum(norms) / len(norms)} if norms else {}
        for index, one in enumerate(sets if len(sets) > 1 else ()):
            figures |= {figure(name, one): float(sums[index, i]) for i, name in enumerate(("loss", "accuracy"))}
            figures |= {figure("gradient_norm", one): count * norms[index]} if norms else {}
        return figures

    def _parts(self, count: int) -> tuple[int, list[slice]]:
        """The images of all ranks, and this rank's micro-batches, of even sizes: as many as on any other rank, the last
        ones may be empty."""
        counts = [int(n) for n in self._context.comm.gather(torch.tensor([count], device=self._context.device))]
        size = even_size(max(counts), self._micro_batch or max(counts))
        return sum(counts), [slice(start, start + size) for start in range(0, max(counts), size)]

    def _score(self, z: Tensor, labels: list[Tensor], sums: Tensor) -> Tensor:
        """The sum of the sets' losses, (S, b, D) -> a scalar; adds each set's loss and hits to `sums`."""
        total = z.new_zeros(())
        for index, classifier in enumerate(self.classifiers):
            loss, correct = classifier.score(z[index], labels[index])
            sums[index] += torch.stack([loss.detach(), correct]).to(sums)
            total = total + loss
        return total

    def _clip(self, engine: Engine) -> list[float]:
        """Scales each set's gradient by itself, so that a set does not feel its neighbours; norms before, by set."""
        most = self._job.adapt.clip_norm
        return engine.clip(self._learning, most) if most else []

    def suspects(self) -> list[str]:
        """Of all ranks: the images of the last step whose features are not finite, or else all of that step."""
        own = torch.from_numpy(self._rows).to(self._context.device)
        bad = torch.cat(self._at_fault)
        of_all = [torch.cat(self._context.comm.gather(rows)) for rows in (own[bad], own)]
        rows = of_all[0] if len(of_all[0]) else of_all[1]
        return [f"{row} ({self._job.training.images.where(row)})" for row in sorted(rows.tolist())]

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
