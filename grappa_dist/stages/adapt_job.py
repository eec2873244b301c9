"""What the ranks of an adaptor job do: one adaptor set, or several in one model, learn to classify.

`ClassificationObjective` computes the gradients of a step against classifiers. `AdaptObjective` is that of partitions,
the supervised fusion (stages/supervised.py) has one of the true classes.

No step waits for a device: which images, classes and sizes all ranks have follows from the order of the epoch, which
every host computes, and sums stay on the device (training/figures.py).

Shapes: B images of this rank, b of a micro-batch, A images of all ranks, S sets, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grappa_dist.artifacts import CENTROIDS_FILE, Artifact, RowArrays
from grappa_dist.config import AdaptConfig, BackboneConfig
from grappa_dist.console import pluralize
from grappa_dist.data.epoch_order import RowIds
from grappa_dist.data.rng import Purpose, torch_seed
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone, release_cached_model
from grappa_dist.search.in_flight import sent
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.multi_set_jobs import (
    AdaptSet,
    begin_job,
    commit_trained,
    figure_name,
    finish_job,
    job_folder,
    short_name,
)
from grappa_dist.training.batches import TrainingImages, augmented_batches
from grappa_dist.training.classifier import Classifier, ClassifierSettings
from grappa_dist.training.compile import compile_if_faster
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, MOST_UNREAD, Figures, Pace
from grappa_dist.training.loop import Reporting, Schedule, train
from grappa_dist.training.memory import (
    adapt_advice,
    automatic_batch_size,
    even_size,
    micro_batch_size,
    naming_lack_of_memory,
    usable_bytes,
)
from grappa_dist.training.optim import adam
from grappa_dist.training.trackers import trackers_of


def starting_centroids(config: AdaptConfig, labels: Artifact) -> Path | None:
    """The file of the centroids (K, D) that the classifier of a partition starts from; None: it starts at random."""
    return labels.path / CENTROIDS_FILE if config.classifier == "centroids" else None


def classifier_for(
    context: RankContext,
    config: AdaptConfig,
    shape: tuple[int, int],
    *,
    seed: int,
    centroids: Path | None,
    rng: torch.Generator,
) -> Classifier:
    """A classifier of K classes of D channels, `shape`, at its start: the centroids, or random rows from `rng`."""
    of_classes = torch_seed(Purpose.CLASSES, seed, shape[0])
    settings = ClassifierSettings(config.gamma, config.weight_decay, config.sampled_classes, of_classes)
    classifier = Classifier(context.comm, context.device, shape, settings)
    classifier.start(centroids, rng)
    return classifier


@dataclass(frozen=True)
class Classes:
    """The classes of one set: that of each row, and their classifier."""

    labels: RowArrays
    classifier: Classifier


@dataclass(frozen=True)
class _Seen:
    """What may have been the cause if a figure of a step is not finite."""

    rows: RowIds  # (B,)
    not_finite: list[Tensor]  # bool, by micro-batch: which of them have features that are not finite


@dataclass(frozen=True)
class Sums:
    """Sums over this rank's images of a step."""

    images: int
    of_sets: Tensor  # (S, 2) float64: losses, and how many are classified right
    waited_s: float  # for data

    @property
    def figures(self) -> Figures:
        """Sums of figures for the log: losses and hits, averaged over the sets; the wait is multiplied by `images`."""
        loss, correct = self.of_sets.mean(0).unbind()
        return {"images": self.images, "waited_s": self.waited_s * self.images, "loss": loss, "accuracy": correct}


class ClassificationObjective:
    """Norm-softmax, Eq. (2), of the S sets of a model, each against its own classes, on augmented images."""

    def __init__(
        self,
        context: RankContext,
        config: AdaptConfig,
        training: TrainingImages,
        preprocess: Preprocess,
        *,
        classes: Sequence[Classes],
    ) -> None:
        self._context, self._training, self._preprocess, self._classes = context, training, preprocess, classes
        self._steps, self._area = training.num_steps(config.epochs), config.min_crop_area
        self._batches: Generator[tuple[Tensor, RowIds], None, None] | None = None
        self._order = lru_cache(maxsize=1)(training.order)
        self._noise: Tensor | None = None
        self._seen: dict[int, _Seen] = {}  # by step

    def begin(self, step: int) -> None:
        steps, context = range(step, self._steps), self._context
        self._batches = augmented_batches(
            self._training, self._preprocess, context.comm, steps, area=self._area, device=context.device
        )

    def gradients(self, engine: Engine, step: int, micro_batch: int, after: Callable[[], None] = lambda: None) -> Sums:
        """Computes the gradients of the next images, in micro-batches of at most `micro_batch`; returns their sums.

        Args:
            after: called after a forward pass of some images, to look at the model.
        """
        assert self._batches is not None
        began, comm = time.perf_counter(), self._context.comm
        pixels, rows = next(self._batches)
        waited_s = time.perf_counter() - began
        of_ranks = self._rows_of_ranks(step)
        assert len(rows) == len(of_ranks[comm.rank])
        parts = _parts([len(of_rank) for of_rank in of_ranks], micro_batch)
        of_sets = torch.zeros(len(self._classes), 2, dtype=torch.float64, device=self._context.device)
        sums, not_finite = Sums(len(rows), of_sets, waited_s), list[Tensor]()
        for number, (part, labels) in enumerate(zip(parts, self._begin_step(step, of_ranks, parts), strict=True)):
            z = self._forward(engine, pixels[part], after)
            loss = self._score(z, labels, [len(of_rank[part]) for of_rank in of_ranks], sums.of_sets)
            # The engine averages gradients over ranks, which may hold uneven parts: a loss weighs size / global rows.
            engine.backward(loss * (comm.size / sum(map(len, of_ranks))), last=number == len(parts) - 1)
            not_finite.append(~z.detach().isfinite().all(2).all(0))
        self._seen[step] = _Seen(rows, not_finite)
        self._seen.pop(step - MOST_UNREAD, None)
        return sums

    def _rows_of_ranks(self, step: int) -> list[RowIds]:
        """The rows of a step that every rank has; the ranks need not tell each other."""
        epoch, t = divmod(step, self._training.steps_per_epoch())
        return self._order(epoch).of_ranks(t, self._training.global_batch, self._context.comm.size)

    def _begin_step(self, step: int, of_ranks: Sequence[RowIds], parts: Sequence[slice]) -> Sequence[Tensor]:
        """Begins a step of the classifiers; the labels (S, A) of each micro-batch, on the device by one copy."""
        of_parts = [np.concatenate([of_rank[part] for of_rank in of_ranks]) for part in parts]
        rows = np.concatenate(of_parts)
        labels = torch.from_numpy(np.stack([c.labels.take(rows).astype(np.int64) for c in self._classes]))
        for classes, of_set in zip(self._classes, labels, strict=True):
            classes.classifier.begin(step, of_set)
        return sent(labels, self._context.device).split([len(part) for part in of_parts], dim=1)

    def _forward(self, engine: Engine, pixels: Tensor, after: Callable[[], None]) -> Tensor:
        """Features (S, b, D).

        Without images, those of none of one image of noise: attention may refuse an empty batch, and ZeRO needs a
        backward pass through everything that learns, here with gradients of zero.
        """
        if len(pixels):
            z = engine.forward(to_images(pixels, self._context.device))  # (S, b, D), or (b, D) where S = 1
            after()
            return z.view(len(self._classes), len(pixels), z.shape[-1])
        if self._noise is None:
            side = self._preprocess.image_size
            noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
            self._noise = sent(noise, self._context.device)
        z = engine.forward(self._noise)
        return z.view(len(self._classes), 1, z.shape[-1])[:, :0]

    def _score(self, z: Tensor, labels: Tensor, sizes: Sequence[int], sums: Tensor) -> Tensor:
        """The sum of the sets' losses, (S, b, D) -> a scalar; adds each set's loss and hits to `sums` (S, 2).

        Args:
            labels: (S, A) of a micro-batch.
            sizes: its images on each rank.
        """
        total = z.new_zeros(())
        for index, classes in enumerate(self._classes):
            loss, correct = classes.classifier.score(z[index], labels[index], sizes)
            sums[index] += torch.stack([loss.detach(), correct]).to(sums)
            total = total + loss
        return total

    def suspects(self, step: int) -> list[str]:
        """The images of a step whose features are not finite, or else all of that step, on all ranks."""
        seen = self._seen[step]
        own, bad = torch.from_numpy(seen.rows).to(self._context.device), torch.cat(seen.not_finite)
        of_all = [torch.cat(self._context.comm.gather(rows)) for rows in (own[bad], own)]
        rows = of_all[0] if len(of_all[0]) else of_all[1]
        return [f"{row} ({self._training.images.where(row)})" for row in sorted(rows.tolist())]

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _parts(counts: Sequence[int], micro_batch: int) -> list[slice]:
    """The micro-batches of every rank, of even sizes, where ranks have `counts` images: as many on each, so the last
    ones of some may be empty."""
    size = even_size(max(counts), micro_batch)
    return [slice(start, start + size) for start in range(0, max(counts), size)]


@dataclass(frozen=True)
class AdaptJob:
    """What every rank of a job needs to train one adaptor set, or several on the same images."""

    sets: tuple[AdaptSet, ...]
    training: TrainingImages
    backbone: BackboneConfig
    adapt: AdaptConfig
    trackers: tuple[str, ...] = ()
    sharing: int = 1  # most workers of a node, which share its memory
    compiled: bool = False  # whether layers are compiled where that is faster
    pace: Pace = DEFAULT_PACE

    @property
    def name(self) -> str:
        return "+".join(one.name for one in self.sets)


def train_adaptors(context: RankContext, job: AdaptJob) -> None:
    """One rank of one job: builds, trains, and rank 0 saves."""
    config, comm, steps = job.adapt, context.comm, job.training.num_steps(job.adapt.epochs)
    if _is_done(context, job):
        return
    release_cached_model()
    root = job.sets[0].artifact.root
    with naming_lack_of_memory(job.name, adapt_advice(config)), ExitStack() as stack:
        objective = AdaptObjective(context, job)
        stack.callback(objective.close)
        learning = [p for p in objective.module.parameters() if p.requires_grad]
        done = train(
            context,
            objective,
            adam(learning, config.learning_rate, config.weight_decay),
            Schedule.falling(
                steps, config.checkpoint_steps, peak=config.learning_rate, warmup_steps=config.warmup_steps
            ),
            folder=job_folder(job.sets),
            job=job.name,
            sharded=objective.sharded,
            zero_stage=config.zero_stage,
            reporting=Reporting(
                objective.suspects,
                trackers=lambda: trackers_of(job.trackers, root, short_name(job.sets)),
                decisions=objective.decisions,
            ),
            pace=job.pace,
        )
        if done and comm.rank == 0:
            finish_job(job.sets, [objective.model.adaptor_tensors(i) for i in range(len(job.sets))])


def _is_done(context: RankContext, job: AdaptJob) -> bool:
    """Whether all sets are complete, as rank 0 sees: other nodes may see files late. If not, makes the folder."""
    done = False
    if context.comm.rank == 0:
        commit_trained(job.sets)
        done = all(one.artifact.complete for one in job.sets)
        if not done:
            begin_job(job.sets)
    return context.of_rank_0(done)


class AdaptObjective(ClassificationObjective):
    """Norm-softmax classification, Eq. (2), of one partition or of several side by side: the sum of their losses. No
    set's loss has a gradient for another set."""

    def __init__(self, context: RankContext, job: AdaptJob) -> None:
        self._job, config = job, job.adapt
        backbone = build_backbone(job.backbone)
        self.model = PackedGrappa(backbone, len(job.sets), config.bottleneck, recompute=config.activation_checkpointing)
        self.classifiers = [self._initialise(context, index) for index in range(len(job.sets))]
        classes = [Classes(one.labels, c) for one, c in zip(job.sets, self.classifiers, strict=True)]
        super().__init__(context, config, job.training, backbone.preprocess, classes=classes)
        self.module = self.model.to(context.device)
        self._learning = [self.model.parameters_of(index) for index in range(len(job.sets))]
        for parameter in (p for of_set in self._learning for p in of_set):
            parameter.requires_grad_(True)
        self.decisions = {"last_block": self.model.whole_because or "class token alone"}  # for the job's log
        self._most_images = job.training.rank_share(context.comm.size)  # images of a step, at the most
        self._micro_batch = self._micro_batch_size()
        if job.compiled:
            at_a_time = even_size(self._most_images, self._micro_batch)
            self.decisions["compile"] = compile_if_faster(self.model, at_a_time)

    def _initialise(self, context: RankContext, index: int) -> Classifier:
        """Initialises a set as if it were alone: its adaptors and then, by further draws, its classifier."""
        one, seed = self._job.sets[index], self._job.training.seed
        rng = torch.Generator().manual_seed(torch_seed(Purpose.ADAPTORS, seed, one.num_labels))
        self.model.initialise(index, rng)
        shape = (one.num_labels, self.model.embed_dim)
        return classifier_for(context, self._job.adapt, shape, seed=seed, centroids=one.centroids, rng=rng)

    def _micro_batch_size(self) -> int:
        """As asked for, or as large as fits into memory with the classifiers."""
        asked, job, context = self._job.adapt.micro_batch, self._job, self._context
        on_gpu = context.device.type == "cuda"
        if asked != "auto":
            return micro_batch_size(asked, self._most_images, len(job.sets), on_gpu=on_gpu)
        usable = usable_bytes(context.device, job.sharing)
        if not on_gpu:  # a CPU gives a tensor its memory when it is first written to
            usable -= sum(t.nbytes for c in self.classifiers for t in c.shard().tensors.values())
        found = automatic_batch_size(context, self.model, job_folder(job.sets), self._most_images, usable)
        self.decisions |= {"micro_batch": str(found.images), "micro_batch_because": found.why}
        context.report({"phase": f"at most {pluralize(found.images, 'image')} at a time ({found.why})"})
        return found.images

    @property
    def sharded(self) -> dict[str, Classifier]:
        """The classifiers, by the names that checkpoints have for them."""
        return {f"classifier-{s.num_labels}": c for s, c in zip(self._job.sets, self.classifiers, strict=True)}

    def backward(self, engine: Engine, step: int) -> Figures:
        sums = self.gradients(engine, step, self._micro_batch)
        # The gradient of each set is clipped separately, as in a job of this set only.
        return self._figures(sums, engine.clip(self._learning, self._job.adapt.clip_norm))

    def _figures(self, sums: Sums, norms: Tensor) -> Figures:
        """This rank's sums of figures: means over the sets and, where there are several, also those of each set."""
        count, sets = sums.images, self._job.sets
        mean = norms.cumsum(0)[-1] * count / len(norms)  # `sum` adds up in another order
        figures = {**sums.figures, "gradient_norm": mean}
        each = zip(sets, sums.of_sets.unbind(), (norms * count).unbind(), strict=True)
        for one, of_set, norm in each if len(sets) > 1 else ():
            own = {"loss": of_set[0], "accuracy": of_set[1], "gradient_norm": norm}
            figures |= {figure_name(name, one): value for name, value in own.items()}
        return figures
