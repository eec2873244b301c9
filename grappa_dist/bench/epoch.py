"""What an epoch of fusion costs per image beside its graph: CPU seconds to embed an image, and of the step of a pair.

A step goes forward twice where a rank's pairs come in several micro-batches, and once where they are one.

The model is the fused ViT-S/16 at 224 pixels, of random weights. Decoding, projector and loss are left out of the step,
so the graph's share of an epoch comes out too large rather than too small.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness import turns
from grappa_dist.models import Grappa
from grappa_dist.models.backbone import create_backbone

SETS, BOTTLENECK, MICRO_BATCH = 8, 64, 16
EMBED, STEP, WHOLE = "embed", "step", "whole"
AT = 10**6  # images that shares are told for


@dataclass(frozen=True)
class EpochCost:
    """CPU seconds, the least of the runs."""

    embed: float  # of an image
    step: float  # of a pair: both images forward, and forward and backward again
    whole: float  # of a pair whose rank has one micro-batch: both images forward and backward

    def shares(self, pairs_per_cpu_s: float, num: int = AT, *, accumulates: bool = True) -> tuple[float, float]:
        """Of an epoch of `num` images: search, and embedding and search together; by arithmetic."""
        search = num / 2 / pairs_per_cpu_s  # per image
        whole = (self.step if accumulates else self.whole) + self.embed + search
        return search / whole, (self.embed + search) / whole


def measure_epoch(repeats: int) -> EpochCost:
    backbone = create_backbone("timm:vit_small_patch16_224", {}, {}, pretrained=False)
    model = Grappa(backbone, SETS, BOTTLENECK, attention=True)
    model.trainable_attention()
    images = torch.rand(MICRO_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def embed() -> None:
        with torch.inference_mode():
            model(images)

    def whole() -> None:
        model(images).square().sum().backward()

    def step() -> None:
        with torch.no_grad():
            model(images)
        whole()

    work: dict[str, Callable[[], None]] = {EMBED: embed, STEP: step, WHOLE: whole}
    best = dict.fromkeys(work, float("inf"))
    for order in turns(list(work), repeats + 1):  # the first is a warm-up, and never the fastest
        for name in order:
            before = time.process_time()
            work[name]()
            best[name] = min(best[name], time.process_time() - before)
    pairs = MICRO_BATCH / 2
    return EpochCost(best[EMBED] / MICRO_BATCH, best[STEP] / pairs, best[WHOLE] / pairs)
