"""Where the loss of training against classifiers is finite, so is all that its classes learn from it."""

from __future__ import annotations

import pytest
import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.classifier import Classifier, ClassifierSettings
from tests.processes import run_ranks

CPU = torch.device("cpu")
SCALES = (0.0, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e19, 1e30, 3e38)


def after_steps(comm: Comm, of_images: float, of_classes: float) -> tuple[bool, bool]:
    """Whether the losses of some steps, and the classes behind them, are finite."""
    classifier = Classifier(comm, CPU, (7, 5), ClassifierSettings(gamma=16.0, weight_decay=1e-3))
    classifier.start(None, torch.Generator().manual_seed(0))
    classifier.state.rows.mul_(of_classes)
    labels, draws = torch.tensor([0, 3, 3, 6]), torch.Generator().manual_seed(1)
    losses = []
    for step in range(3):
        z = torch.rand(4, 5, generator=draws) * of_images
        classifier.begin(step, labels)
        losses.append(classifier.score(z, labels, [4])[0])
        classifier.step(1e-3)
    return all(loss.isfinite() for loss in losses), bool(classifier.state.rows.isfinite().all())


@pytest.mark.parametrize("of_classes", SCALES)
@pytest.mark.parametrize("of_images", SCALES)
def test_classes_stay_finite_where_losses_are(of_images: float, of_classes: float) -> None:
    losses, classes = after_steps(Comm(), of_images, of_classes)
    assert losses
    assert classes


def spoiled(comm: Comm) -> list[float]:
    """The losses where one row of the last rank is no number."""
    found = []
    for value in (torch.nan, torch.inf):
        classifier = Classifier(comm, CPU, (7, 5), ClassifierSettings(gamma=16.0, weight_decay=0.0))
        classifier.start(None, torch.Generator().manual_seed(0))
        if comm.rank == comm.size - 1:
            classifier.state.rows[-1, 0] = value
        labels = torch.tensor([0, 3]).repeat(comm.size)
        classifier.begin(0, labels)
        found.append(float(classifier.score(torch.ones(2, 5), labels, [2] * comm.size)[0]))
    return found


def test_a_class_that_is_not_finite_spoils_the_loss_of_every_rank() -> None:
    for losses in run_ranks(spoiled, 2):
        assert not any(torch.isfinite(torch.tensor(losses)))
