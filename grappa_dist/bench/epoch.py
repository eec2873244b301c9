"""What an epoch of fusion costs per image beside its graph: CPU seconds to embed an image, and of the step of a pair.

The model is the fused ViT-S/16 at 224 pixels, of random weights. Decoding, projector and loss are left out of the step,
so the graph's share of an epoch comes out too large rather than too small.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grappa_dist.bench.timing import turns
from grappa_dist.models import Grappa
from grappa_dist.models.backbone import create_backbone

SETS, BOTTLENECK, MICRO_BATCH = 8, 64, 16
EMBED, STEP = "embed", "step"
AT = 10**6  # images that shares are told for


@dataclass(frozen=True)
class EpochCost:
    """CPU seconds, the least of the runs."""

    embed: float  # of an image
    step: float  # of a pair: both images forward, and forward and backward again

    def shares(self, pairs_per_cpu_s: float, num: int = AT) -> tuple[float, float]:
        """Of an epoch of `num` images: search, and embedding and search together; by arithmetic."""
        search = num / 2 / pairs_per_cpu_s  # per image
        whole = self.step + self.embed + search
        return search / whole, (self.embed + search) / whole


def measure_epoch(repeats: int) -> EpochCost:
    backbone = create_backbone("timm:vit_small_patch16_224", {}, {}, pretrained=False)
    model = Grappa(backbone, SETS, BOTTLENECK, attention=True)
    model.trainable_attention()
    images = torch.rand(MICRO_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def embed() -> None:
        with torch.inference_mode():
            model(images)

    def step() -> None:
        with torch.no_grad():
            model(images)
        model(images).square().sum().backward()

    work: dict[str, Callable[[], None]] = {EMBED: embed, STEP: step}
    best = {EMBED: float("inf"), STEP: float("inf")}
    for order in turns(list(work), repeats + 1):  # the first is a warm-up, and never the fastest
        for name in order:
            before = time.process_time()
            work[name]()
            best[name] = min(best[name], time.process_time() - before)
    return EpochCost(best[EMBED] / MICRO_BATCH, best[STEP] / (MICRO_BATCH / 2))
