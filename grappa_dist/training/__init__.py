"""Losses, optimizers and the loop of a training job."""

from grappa_dist.training.barlow_twins_loss import barlow_twins
from grappa_dist.training.norm_softmax_loss import norm_softmax

__all__ = ["barlow_twins", "norm_softmax"]
