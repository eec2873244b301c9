"""Pure mathematics on tensors: no files, no ranks, no globals."""

from grappa_dist.metrics import retrieval_scores
from grappa_dist.training.barlow_twins import barlow_twins
from grappa_dist.training.norm_softmax import norm_softmax

__all__ = ["barlow_twins", "norm_softmax", "retrieval_scores"]
