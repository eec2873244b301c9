"""What training against classifiers has in common, of partitions as of true classes: the gradients of a step.

Shapes: B images of this rank, b of a micro-batch, S sets, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays
from grappa_dist.config import AdaptConfig
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.worker import RankContext
from grappa_dist.ops.room import even_size
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.label_files import CENTROIDS_FILE
from grappa_dist.training.batches import Pixels, Rows, TrainingImages, augmented_batches, torch_seed
from grappa_dist.training.classifier import Classifier, ClassifierSettings
from grappa_dist.training.deepspeed_engine import Engine


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
    draws: torch.Generator,
) -> Classifier:
    """The classifier of K classes of D channels, `shape`, where it starts: at the centroids, or where `draws` say."""
    of_classes = torch_seed("classes", seed, shape[0])
    settings = ClassifierSettings(config.gamma, config.weight_decay, config.sampled_classes, of_classes)
    classifier = Classifier(context.comm, context.device, shape, settings)
    classifier.start(centroids, draws)
    return classifier


@dataclass(frozen=True)
class Classes:
    """Of one set: the class of each row, and what tells the classes apart."""

    labels: RowArrays
    classifier: Classifier


@dataclass(frozen=True)
class Sums:
    """What this rank's images of a step add up to."""

    images: int
    of_sets: Tensor  # (S, 2) float64: losses, and how many are classified right
    waited_s: float  # for data

    @property
    def figures(self) -> dict[str, float]:
        """What the log is told of them: losses and hits in the mean of the sets, and the wait times images."""
        loss, correct = self.of_sets.mean(0).tolist()
        return {"images": self.images, "waited_s": self.waited_s * self.images, "loss": loss, "accuracy": correct}


class Classifying:
    """Norm-softmax, Eq. (2), of the S sets of a model, each against classes of its own, on augmented images."""

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
        self._batches: Generator[tuple[Pixels, Rows], None, None] | None = None
        self._rows: Rows = np.empty(0, dtype=np.int64)  # of the last step
        self._at_fault: list[Tensor] = []  # which of them have features that are not finite

    def begin(self, step: int) -> None:
        steps = range(step, self._steps)
        self._batches = augmented_batches(self._training, self._preprocess, self._context.comm, steps, self._area)

    def gradients(self, engine: Engine, step: int, micro_batch: int, seen: Callable[[], None] = lambda: None) -> Sums:
        """Those of the next images, in micro-batches of so many at most.

        Args:
            seen: called after a forward pass of some images, to look at the model.
        """
        assert self._batches is not None
        began, device = time.perf_counter(), self._context.device
        pixels, self._rows = next(self._batches)
        waited_s = time.perf_counter() - began
        sums = Sums(len(self._rows), torch.zeros(len(self._classes), 2, dtype=torch.float64, device=device), waited_s)
        self._at_fault = []
        of_all, parts = self._parts(len(self._rows), micro_batch)
        labels = [torch.from_numpy(c.labels.take(self._rows).astype(np.int64)).to(device) for c in self._classes]
        for classes, of_set in zip(self._classes, labels, strict=True):
            classes.classifier.begin(step, of_set)
        for number, part in enumerate(parts):
            images = to_images(pixels[part], device)
            z = engine.forward(images)  # (S, b, D), or (b, D) where S = 1
            if len(images):
                seen()
            z = z.view(len(self._classes), len(images), z.shape[-1])
            loss = self._score(z, [of_set[part] for of_set in labels], sums.of_sets)
            # The engine averages gradients over ranks, whose shares are uneven: a loss weighs size / global rows.
            engine.backward(loss * (self._context.comm.size / of_all), last=number == len(parts) - 1)
            self._at_fault.append(~z.detach().isfinite().all(2).all(0))
        return sums

    def _parts(self, count: int, micro_batch: int) -> tuple[int, list[slice]]:
        """The images of all ranks, and this rank's micro-batches, of even sizes: as many as on any other rank, the last
        ones may be empty."""
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
        """Of all ranks: the images of the last step whose features are not finite, or else all of that step."""
        own = torch.from_numpy(self._rows).to(self._context.device)
        bad = torch.cat(self._at_fault)
        of_all = [torch.cat(self._context.comm.gather(rows)) for rows in (own[bad], own)]
        rows = of_all[0] if len(of_all[0]) else of_all[1]
        return [f"{row} ({self._training.images.where(row)})" for row in sorted(rows.tolist())]

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
