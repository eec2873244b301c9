"""supervise: two rows that see the labels of the training images, to compare a method without labels with.

The supervised set (Table 3 of the paper) is step 2 on the true classes in place of a partition. The supervised fusion
(Table 5) is attention over the N sets of the partitions, trained to tell the true classes apart: the recipe is that of
step 2 as well, as the paper names none; Q and K learn where an adaptor set would. No pairs, no projector.

Shapes: N sets, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from grappa_dist.artifacts import Artifact, RowArrays, Store, numbered, wait_until_seen
from grappa_dist.config import SUPERVISED, SUPERVISED_SET, AdaptConfig, BackboneConfig, Config
from grappa_dist.console import counted
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import replacing
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, build_backbone, forget_built, preprocess_of
from grappa_dist.ops.adam import adam
from grappa_dist.stages.adapt import train_sets
from grappa_dist.stages.adapt_packs import AdaptSet
from grappa_dist.stages.classifying import Classes, Classifying, classifier_for, starting_centroids
from grappa_dist.stages.label_files import label_rows
from grappa_dist.stages.run import Run
from grappa_dist.stages.true_labels import class_counts, without_class
from grappa_dist.stages.watching import AttentionWatch
from grappa_dist.training.batches import TrainingImages, idle_in_words, torch_seed, trained_by
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.loop import Schedule, Watch, train
from grappa_dist.training.memory import fuse_advice, naming_lack_of_memory


@dataclass(frozen=True)
class SupervisedJob:
    """What every rank of the supervised fusion is told."""

    adaptors: tuple[Artifact, ...]
    labels: RowArrays  # -1: none
    num_classes: int
    centroids: Path | None  # (K, D), where the classifier starts; None: at random
    training: TrainingImages  # those with a label
    backbone: BackboneConfig
    adapt: AdaptConfig
    micro_batch: int  # images at a time per rank: that of the other fusions, which have as many sets
    artifact: Artifact


def supervised_fusion_of(store: Store, config: Config, labels: Artifact, sets: Sequence[Artifact]) -> Artifact:
    """The artefact of the supervised fusion: no setting of `fuse` enters it."""
    settings = trained_by(config.backbone, config.data, config.seed, adapt=config.adapt.of_result())
    return store.artifact(f"fusion/{SUPERVISED}", settings, {"labels": labels, **numbered("adaptors", sets)})


def adapt_supervised(run: Run, adaptors: Artifact, labels: Artifact, images: ImageShards) -> None:
    """Trains the supervised set, by a job like those of the partitions."""
    if not adaptors.complete:
        classes = class_counts(labels)["classes"]
        start = starting_centroids(run.config.adapt, labels)
        one = AdaptSet(classes, label_rows(labels, images), adaptors, start, SUPERVISED_SET)
        train_sets(run, [one], images, without_class(labels, images))


def fuse_supervised(
    run: Run, fusion: Artifact, adaptors: Sequence[Artifact], labels: Artifact, images: ImageShards
) -> None:
    """Trains the supervised fusion, by one job on all workers."""
    if fusion.complete:
        return
    config, classes = run.config, class_counts(labels)["classes"]
    training = TrainingImages.of(config, images, without_class(labels, images), config.adapt.global_batch)
    job = SupervisedJob(
        adaptors=tuple(adaptors),
        labels=label_rows(labels, images),
        num_classes=classes,
        centroids=starting_centroids(config.adapt, labels),
        training=training,
        backbone=config.backbone,
        adapt=config.adapt,
        micro_batch=config.fuse.micro_batch,
        artifact=fusion,
    )
    ranks, steps = run.runner.num_workers, training.num_steps(config.adapt.epochs)
    with run.console.stage("fuse", f"{SUPERVISED}, {classes} classes, {steps} steps on {counted(ranks, 'rank')}"):
        if idle := idle_in_words(config.data, ranks):
            run.console.say(f"fuse: {idle}")
        run.runner.run_jobs([Job(SUPERVISED, train_supervised_fusion, job, ranks)])
        wait_until_seen([fusion])


def train_supervised_fusion(context: RankContext, job: SupervisedJob) -> None:
    """One rank: builds, trains, and rank 0 saves Q and K; the classifier is thrown away."""
    if context.of_rank_0(job.artifact.complete):
        return
    forget_built()
    config, folder, peak = job.adapt, job.artifact.begin(), job.adapt.learning_rate
    steps = job.training.num_steps(config.epochs)
    with naming_lack_of_memory(SUPERVISED, fuse_advice(job.micro_batch)), ExitStack() as stack:
        objective = SupervisedObjective(context, job)
        stack.callback(objective.close)
        optimizer = adam(objective.learning, peak, config.weight_decay)
        done = train(
            context,
            objective,
            optimizer,
            Schedule.falling(steps, config.checkpoint_steps, peak=peak, warmup_steps=config.warmup_steps),
            folder=folder,
            job=SUPERVISED,
            beside={"classifier": objective.classifier},
            watch=Watch(objective.suspects),
        )
        if done and context.comm.rank == 0:
            with replacing(folder / FUSION_FILE) as temporary:
                save_file(objective.module.attention_tensors(), temporary)
            job.artifact.commit(discard=["checkpoints"])


class SupervisedObjective(Classifying):
    """Norm-softmax, Eq. (2), of fused features against the true classes, of which Q and K learn."""

    def __init__(self, context: RankContext, job: SupervisedJob) -> None:
        self._job, config, seed = job, job.adapt, job.training.seed
        backbone = build_backbone(job.backbone)
        self.module = Grappa(backbone, len(job.adaptors), config.bottleneck, attention=True)
        self.module.load_adaptors([load_file(a.path / ADAPTORS_FILE) for a in job.adaptors])
        self.module.trainable_attention()
        draws = torch.Generator().manual_seed(torch_seed("fusion", seed))  # the start of all fusions
        for layer in self.module.layers:
            assert layer.attention is not None
            layer.attention.initialise(draws)
        self.module.to(context.device)
        self.learning = [p for p in self.module.parameters() if p.requires_grad]
        shape = (job.num_classes, backbone.embed_dim)
        self.classifier = classifier_for(context, config, shape, seed=seed, centroids=job.centroids, draws=draws)
        classes = [Classes(job.labels, self.classifier)]
        super().__init__(context, config, job.training, preprocess_of(backbone.pixels), classes=classes)
        self._watch = AttentionWatch(self.module)

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        sums = self.gradients(engine, step, self._job.micro_batch, self._watch.add)
        (norm,) = engine.clip([self.learning], self._job.adapt.clip_norm)
        attention = self._watch.take(1, self._job.adapt.weight_decay, sums.images)
        return sums.figures | {"gradient_norm": norm * sums.images} | attention
