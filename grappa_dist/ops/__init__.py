"""Pure mathematics on tensors: no files, no ranks, no globals."""

from grappa_dist.ops.losses import barlow_twins
from grappa_dist.ops.metrics import retrieval_scores
from grappa_dist.ops.softmax import norm_softmax

__all__ = ["barlow_twins", "norm_softmax", "retrieval_scores"]
