"""What the ranks of an adaptor job do: one adaptor set, or several in one model, learn to classify.

`ClassificationObjective` computes the gradients of a step against classifiers. `AdaptObjective` is that of partitions,
the supervised fusion (stages/supervised.py) has one of the true classes.

Shapes: B images of this rank, b of a micro-batch, S sets, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grappa_dist.artifacts import CENTROIDS_FILE, Artifact, RowArrays
from grappa_dist.config import AdaptConfig, BackboneConfig
from grappa_dist.console import pluralize
from grappa_dist.data.decoding import Pixels
from grappa_dist.data.epoch_order import RowIds
from grappa_dist.data.rng import Purpose, torch_seed
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone, release_cached_model
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
class Sums:
    """Sums over this rank's images of a step."""

    images: int
    of_sets: Tensor  # (S, 2) float64: losses, and how many are classified right
    waited_s: float  # for data

    @property
    def figures(self) -> dict[str, float]:
        """Sums of figures for the log: losses and hits, averaged over the sets; the wait is multiplied by `images`."""
        loss, correct = self.of_sets.mean(0).tolist()
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
        self._batches: Generator[tuple[Pixels, RowIds], None, None] | None = None
        self._rows: RowIds = np.empty(0, dtype=np.int64)  # of the last step
        self._not_finite: list[Tensor] = []  # bool, by micro-batch: which of them have features that are not finite

    def begin(self, step: int) -> None:
        steps = range(step, self._steps)
        self._batches = augmented_batches(self._training, self._preprocess, self._context.comm, steps, self._area)

    def gradients(self, engine: Engine, step: int, micro_batch: int, after: Callable[[], None] = lambda: None) -> Sums:
        """Computes the gradients of the next images, in micro-batches of at most `micro_batch`; returns their sums.

        Args:
            after: called after a forward pass of some images, to look at the model.
        """
        assert self._batches is not None
        began, device = time.perf_counter(), self._context.device
        pixels, self._rows = next(self._batches)
        waited_s = time.perf_counter() - began
        sums = Sums(len(self._rows), torch.zeros(len(self._classes), 2, dtype=torch.float64, device=device), waited_s)
        self._not_finite = []
        of_all, parts = self._parts(len(self._rows), micro_batch)
        labels = [torch.from_numpy(c.labels.take(self._rows).astype(np.int64)).to(device) for c in self._classes]
        for classes, of_set in zip(self._classes, labels, strict=True):
            classes.classifier.begin(step, of_set)
        for number, part in enumerate(parts):
            images = to_images(pixels[part], device)
            z = engine.forward(images)  # (S, b, D), or (b, D) where S = 1
            if len(images):
                after()
            z = z.view(len(self._classes), len(images), z.shape[-1])
            loss = self._score(z, [of_set[part] for of_set in labels], sums.of_sets)
            # The engine averages gradients over ranks, which may hold uneven parts: a loss weighs size / global rows.
            engine.backward(loss * (self._context.comm.size / of_all), last=number == len(parts) - 1)
            self._not_finite.append(~z.detach().isfinite().all(2).all(0))
        return sums

    def _parts(self, count: int, micro_batch: int) -> tuple[int, list[slice]]:
        """The number of images on all ranks, and this rank's micro-batches, of even sizes: as many as on any other
        rank, so the last ones may be empty."""
        counts = [int(n) for n in self._context.comm.gather(torch.tensor([count], device=self._context.device))]
        size = even_size(max(counts), micro_batch)
        return sum(counts), [slice(start, start + size) for start in range(0, max(counts), size)]

    def _score(self, z: Tensor, labels: Sequence[Tensor], sums: Tensor) -> Tensor:
        """The sum of the sets' losses, (S, b, D) -> a scalar; adds each set's loss and hits to `sums`."""
        total = z.new_zeros(())
        for index, classes in enumerate(self._classes):
            loss, correct = classes.classifier.score(z[index], labels[index])
            sums[index] += torch.stack([loss.detach(), correct]).to(sums)
            total = total + loss
        return total

    def suspects(self) -> list[str]:
        """The images of the last step whose features are not finite, or else all of that step, on all ranks."""
        own = torch.from_numpy(self._rows).to(self._context.device)
        bad = torch.cat(self._not_finite)
        of_all = [torch.cat(self._context.comm.gather(rows)) for rows in (own[bad], own)]
        rows = of_all[0] if len(of_all[0]) else of_all[1]
        return [f"{row} ({self._training.images.where(row)})" for row in sorted(rows.tolist())]

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


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
                lambda: trackers_of(job.trackers, root, short_name(job.sets)),
                decisions=objective.decisions,
            ),
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

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        sums = self.gradients(engine, step, self._micro_batch)
        # The gradient of each set is clipped separately, as in a job of this set only.
        return self._figures(sums, engine.clip(self._learning, self._job.adapt.clip_norm))

    def _figures(self, sums: Sums, norms: list[float]) -> dict[str, float]:
        """This rank's sums of figures: means over the sets and, where there are several, also those of each set."""
        count, sets = sums.images, self._job.sets
        figures = sums.figures | {"gradient_norm": count * sum(norms) / len(norms)}
        for one, (loss, correct), norm in zip(sets, sums.of_sets.tolist(), norms, strict=True) if len(sets) > 1 else ():
            own = {"loss": loss, "accuracy": correct, "gradient_norm": norm * count}
            figures |= {figure_name(name, one): value for name, value in own.items()}
        return figures
