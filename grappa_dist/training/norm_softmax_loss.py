"""Norm-softmax, Eq. (2): cross entropy of scaled cosines, a chunk of classes at a time; B x K logits never exist.

The loss and the gradient of the images follow from three sums over classes, held in `Scores`: the largest logit, the
sum of exponentials, and the sum of class rows weighted by these. Scores of disjoint classes add up (Milakov and
Gimelshein, 2018), whichever chunk or rank they come from. The gradient of the classes needs the finished sum, so it is
a second pass, which computes the cosines again.

Training runs these functions in training/classifier.py, which spreads the classes over ranks; `norm_softmax` runs the
same functions with all classes in one tensor. The package exports it, so this module has another name.

Shapes: B images of one rank, D channels, K classes, C classes of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 8 * 2**20, 256 * 2**20  # of a chunk's rows and logits: a cache; work for a GPU
_EPS = 1e-12  # as F.normalize


def norm_softmax(
    z: Tensor, weight: Tensor, labels: Tensor, gamma: float, *, allsum: Callable[[Tensor], Tensor] = lambda t: t
) -> Tensor:
    """Eq. (2): mean cross entropy of gamma * cos(z, weight) over the global batch, a scalar.

    On one rank it has the bits of `Classifier.score`, through which training computes Eq. (2).

    Args:
        z: (B, D); ranks may hold uneven or empty parts of the global batch.
        weight: (K, D), one row a class; its length does not matter, nor does that of a row of z.
        labels: (B,), integers in [0, K).
        allsum: adds over ranks and lets gradients through (distributed/collectives.py).

    Raises:
        ValueError: the shapes do not fit, or a label is outside [0, K).
    """
    total = norm_softmax_sum(z, weight, labels, gamma)
    return allsum(total) / allsum(total.new_full((), len(z)))


def norm_softmax_sum(z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """As `norm_softmax`, summed over this rank's rows of z (B, D): a scalar, 0 where there are none."""
    _check(z, weight, labels)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):  # a bf16 cosine times gamma = 16 is a logit off by up to 0.06
        total: Tensor = _NormSoftmax.apply(z.to(dtype), weight.to(dtype), labels.long(), gamma)  # type: ignore[no-untyped-call]
        return total


class _NormSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
        scores = score_classes(F.normalize(z, dim=1), weight.__getitem__, len(weight), labels, gamma)
        ctx.gamma = gamma
        ctx.save_for_backward(z, weight, labels, scores.log_total, image_gradient(scores.unit_gradient(gamma), z))
        return scores.losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        z, weight, labels, log_total, z_gradient = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[1]:
            unit_z, gradient = F.normalize(z, dim=1), torch.empty_like(weight)
            for part in chunks(len(weight), unit_z):
                of_part = class_gradient(unit_z, weight[part], labels - part.start, log_total, ctx.gamma)
                torch.mul(of_part, upstream, out=gradient[part])
        return upstream * z_gradient, gradient, None, None


def _check(z: Tensor, weight: Tensor, labels: Tensor) -> None:
    if z.ndim != 2 or weight.ndim != 2 or z.shape[1] != weight.shape[1]:
        raise ValueError(f"norm_softmax: z {tuple(z.shape)} and weight {tuple(weight.shape)} must be (B, D) and (K, D)")
    if labels.shape != z.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"norm_softmax: labels must be {len(z)} integers, one a row of z, got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        return
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(labels)).tolist())  # one wait for the device
    if low < 0 or high >= len(weight):  # cross_entropy would skip a label of -100 in silence
        raise ValueError(f"norm_softmax: labels must lie in [0, {len(weight)}), found {low} to {high}")


@dataclass(frozen=True)
class Scores:
    """Sums over some classes for each of B images."""

    top: Tensor  # (B,) largest logit; -inf where there is no class
    total: Tensor  # (B,) sum of exp(logit - top)
    pull: Tensor  # (B, D) sum of exp(logit - top) times the class's unit row
    target: Tensor  # (B,) logit of the image's own class; 0 where that is not among them
    own: Tensor  # (B, D) unit row of the image's own class; 0 where that is not among them

    def below(self, top: Tensor) -> Scores:
        """The same relative to a larger `top` (B,)."""
        scale = torch.where(self.top == top, 1.0, (self.top - top).exp())  # -inf minus -inf is no number
        return Scores(top, self.total * scale, self.pull * scale[:, None], self.target, self.own)

    @property
    def log_total(self) -> Tensor:
        """(B,) log of the sum of all exponentials."""
        return self.top + self.total.log()

    @property
    def losses(self) -> Tensor:
        """(B,) cross entropy of each image, if these are the scores of all classes."""
        return self.log_total - self.target

    def unit_gradient(self, gamma: float) -> Tensor:
        """(B, D) gradient of `losses` for the unit rows of the images.

        `total` must be that of all classes. Where `pull` and `own` are those of a part of the classes, this is their
        part of the gradient, and parts add up.
        """
        return gamma * (self.pull / self.total[:, None] - self.own)


def score_classes(
    unit_z: Tensor, rows: Callable[[slice], Tensor], num_rows: int, labels: Tensor, gamma: float
) -> Scores:
    """The scores of unit rows (B, D) against `num_rows` classes, of which `rows` gives a chunk (C, D).

    `labels` (B,) are the places of the images' classes among the rows; one outside [0, num_rows) is another class.
    """
    scores = no_scores(unit_z)
    for part in chunks(num_rows, unit_z):
        scores = add_scores(scores, unit_z, rows(part), labels - part.start, gamma)
    return scores


def chunks(num_classes: int, unit_z: Tensor) -> Iterator[slice]:
    """Consecutive classes, as many at a time as keep their rows and logits in fast memory of the device of z (B, D)."""
    chunk_bytes = _CPU_CHUNK_BYTES if unit_z.device.type == "cpu" else _GPU_CHUNK_BYTES
    step = max(64, chunk_bytes // (4 * sum(unit_z.shape)))
    return (slice(start, min(start + step, num_classes)) for start in range(0, num_classes, step))


def no_scores(unit_z: Tensor) -> Scores:
    """The scores of unit rows (B, D) against no class at all."""
    zeros = unit_z.new_zeros(len(unit_z))
    return Scores(torch.full_like(zeros, -torch.inf), zeros, torch.zeros_like(unit_z), zeros, torch.zeros_like(unit_z))


def add_scores(scores: Scores, unit_z: Tensor, rows: Tensor, labels: Tensor, gamma: float) -> Scores:
    """`scores` and those of further classes.

    Args:
        unit_z: (B, D).
        rows: (C, D), one a class, of any length.
        labels: (B,), the place of an image's class among these rows; anything outside [0, C) for another class.
    """
    inverse = _inverse_norms(rows)  # (C,)
    logits = (unit_z @ rows.T).mul_(gamma * inverse)  # (B, C)
    among, places = _among(labels, rows)
    target = torch.where(among, logits.gather(1, places[:, None])[:, 0], scores.target)
    own = torch.where(among[:, None], rows[places] * inverse[places, None], scores.own)
    top = torch.maximum(scores.top, logits.amax(1))
    before = scores.below(top)
    weights = logits.sub_(top[:, None]).exp_()
    total = before.total + weights.sum(1)
    return Scores(top, total, before.pull.addmm_(weights.mul_(inverse), rows), target, own)


def image_gradient(unit_gradient: Tensor, z: Tensor) -> Tensor:
    """Gradient for z (B, D) from that for its unit rows."""
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(_EPS)
    unit = z / norms
    return (unit_gradient - (unit_gradient * unit).sum(1, keepdim=True) * unit) / norms


def class_gradient(unit_z: Tensor, rows: Tensor, labels: Tensor, log_total: Tensor, gamma: float) -> Tensor:
    """Gradient (C, D) of the summed cross entropy for the rows of some classes; arguments as of `add_scores`."""
    inverse = _inverse_norms(rows)
    cosines = (unit_z @ rows.T).mul_(inverse)  # (B, C)
    errors = (gamma * cosines).sub_(log_total[:, None]).exp_()  # probabilities, and less 1 for the own class
    among, places = _among(labels, rows)
    errors.scatter_(1, places[:, None], errors.gather(1, places[:, None]) - among[:, None].to(errors))
    errors.mul_(gamma * inverse)
    along = (errors * cosines).sum(0).mul_(inverse)  # (C,): what would only lengthen a row is left out
    return torch.mm(errors.T, unit_z).addcmul_(rows, along[:, None], value=-1)


def _among(labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whether labels (B,) are of classes among `rows`, and their places there, 0 for others; no wait for a device, as
    an index of those that are would take."""
    among = (labels >= 0) & (labels < len(rows))
    return among, labels * among


def _inverse_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).clamp_min_(_EPS).reciprocal_()
