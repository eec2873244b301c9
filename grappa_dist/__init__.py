"""grappa_dist: one retrieval model for many tasks, adapted from a frozen ViT with unlabelled images alone.

The public API, which tests/test_public_api.py holds:

grappa_dist.fit(images, out)
    A run from Python, as `grappa-dist run` makes it: its model, scores, report and verdict.
grappa_dist.load_model(run_or_model_dir)
    The adapted model of a run or of an exported directory: RGB images (B, 3, S, S) -> unit embeddings (B, D).
grappa_dist.evaluate(model, images)
    R-Precision, MAP@R and Recall@1 of a model on labelled images, beside its backbone, and how sure the difference is.
grappa_dist.metrics.retrieval_scores(z, labels)
    R-Precision, MAP@R and Recall@1 of features (n, D) with labels (n,), leave-one-out.
grappa_dist.training.norm_softmax(z, weight, labels, gamma)
    Eq. (2), the loss of an adaptor set.
grappa_dist.training.barlow_twins(za, zb, beta, allsum)
    Eq. (4), the loss of the fusion, on a global batch; `allsum` adds over ranks.
grappa_dist.models.Grappa(backbone, num_sets, bottleneck, attention)
    A frozen ViT with adaptor sets and, with `attention`, their fusion by Eq. (3).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "fit", "load_model"]
_HOMES = {
    "evaluate": "grappa_dist.retrieval.evaluation",
    "fit": "grappa_dist.fitted",
    "load_model": "grappa_dist.export",
}

if TYPE_CHECKING:
    from grappa_dist.export import load_model
    from grappa_dist.fitted import fit
    from grappa_dist.retrieval.evaluation import evaluate


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # torch loads when a model does, not before
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
