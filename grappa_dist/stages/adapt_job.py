"""What the ranks of an adaptor job do: one set of adaptors, or several packed in one model, learn to classify.

Shapes: S adaptor sets, D channels.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from grappa_dist.config import AdaptConfig, BackboneConfig
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import PackedGrappa
from grappa_dist.models.spec import build_backbone, forget_built, preprocess_of
from grappa_dist.ops.adam import adam
from grappa_dist.ops.room import even_size
from grappa_dist.stages.adapt_packs import AdaptSet, begin, commit_trained, figure, finish, pack_folder, short_name
from grappa_dist.stages.classifying import Classes, Classifying, Sums, classifier_for
from grappa_dist.training.batches import TrainingImages, torch_seed
from grappa_dist.training.classifier import Classifier
from grappa_dist.training.compile import compile_if_it_wins
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.loop import Schedule, Watch, train
from grappa_dist.training.memory import adapt_advice, fitted, images_at_a_time, naming_lack_of_memory, usable_bytes
from grappa_dist.training.trackers import trackers_of


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


def train_adaptors(context: RankContext, job: AdaptJob) -> None:
    """One rank of one job: builds, trains, and rank 0 saves."""
    config, comm, steps = job.adapt, context.comm, job.training.num_steps(job.adapt.epochs)
    if _is_done(context, job):
        return
    forget_built()
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


class AdaptObjective(Classifying):
    """Norm-softmax classification of a partition, Eq. (2), or of several side by side: the sum of their losses, in
    which no set's part touches what another learns."""

    def __init__(self, context: RankContext, job: AdaptJob) -> None:
        self._job, config = job, job.adapt
        backbone = build_backbone(job.backbone)
        self.model = PackedGrappa(backbone, len(job.sets), config.bottleneck, recompute=config.activation_checkpointing)
        self.classifiers = [self._started(context, index) for index in range(len(job.sets))]
        classes = [Classes(one.labels, c) for one, c in zip(job.sets, self.classifiers, strict=True)]
        super().__init__(context, config, job.training, preprocess_of(backbone.pixels), classes=classes)
        self.module = self.model.to(context.device)
        self._learning = [self.model.parameters_of(index) for index in range(len(job.sets))]
        for parameter in (p for of_set in self._learning for p in of_set):
            parameter.requires_grad_(True)
        self.settled = {"last_block": self.model.whole_because or "class token alone"}  # for the job's log
        self._most_images = job.training.rank_share(context.comm.size)  # images of a step, at the most
        self._micro_batch = self._images_at_a_time()
        if job.compiled:
            at_a_time = even_size(self._most_images, self._micro_batch)
            self.settled["compile"] = compile_if_it_wins(self.model, at_a_time)

    def _started(self, context: RankContext, index: int) -> Classifier:
        """Starts a set as if it were alone, its adaptors and then, by further draws, its classifier."""
        one, seed = self._job.sets[index], self._job.training.seed
        draws = torch.Generator().manual_seed(torch_seed("adaptors", seed, one.num_labels))
        self.model.initialise(index, draws)
        shape = (one.num_labels, self.model.embed_dim)
        return classifier_for(context, self._job.adapt, shape, seed=seed, centroids=one.centroids, draws=draws)

    def _images_at_a_time(self) -> int:
        """As asked for, or as many as fit beside the classifiers."""
        asked, job, context = self._job.adapt.micro_batch, self._job, self._context
        on_gpu = context.device.type == "cuda"
        if asked != "auto":
            return images_at_a_time(asked, self._most_images, len(job.sets), on_gpu=on_gpu)
        usable = usable_bytes(context.device, job.sharing)
        if not on_gpu:  # which gives a tensor its memory when it is first written to
            usable -= sum(t.nbytes for c in self.classifiers for t in c.shard().tensors.values())
        found = fitted(context, self.model, pack_folder(job.sets), self._most_images, usable)
        self.settled |= {"micro_batch": str(found.images), "micro_batch_because": found.why}
        context.report({"phase": f"at most {found.images} images at a time ({found.why})"})
        return found.images

    @property
    def beside(self) -> dict[str, Classifier]:
        """The classifiers by names of their sets, so that a checkpoint tells them apart."""
        return {f"classifier-{s.num_labels}": c for s, c in zip(self._job.sets, self.classifiers, strict=True)}

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        sums = self.gradients(engine, step, self._micro_batch)
        # Each set by itself, so that a set does not feel its neighbours.
        return self._figures(sums, engine.clip(self._learning, self._job.adapt.clip_norm))

    def _figures(self, sums: Sums, norms: list[float]) -> dict[str, float]:
        """This rank's sums: means over the sets and, where there are several, also each set's by itself."""
        count, sets = sums.images, self._job.sets
        figures = sums.figures | {"gradient_norm": count * sum(norms) / len(norms)}
        for one, (loss, correct), norm in zip(sets, sums.of_sets.tolist(), norms, strict=True) if len(sets) > 1 else ():
            own = {"loss": loss, "accuracy": correct, "gradient_norm": norm * count}
            figures |= {figure(name, one): value for name, value in own.items()}
        return figures
