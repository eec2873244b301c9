"""How fast this machine decodes, embeds, trains and clusters, with a backbone of the user's choice. Writes nothing.

Comparisons with webdataset and faiss are in benchmarks/, which is not installed: launch/bench.py of a checkout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from grappa_dist.config import Resources, read
from grappa_dist.console import pluralize
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.placement import may_have_gpus
from grappa_dist.distributed.sharded_rows import Rows, join_rows
from grappa_dist.models.spec import build_backbone
from grappa_dist.progress import lost_trials
from grappa_dist.rates import SAMPLES, Rates, machine_name, measure, workers_here
from grappa_dist.retrieval.images import open_images
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.search.rerank import assign

ROWS, CLUSTERS = 20_000, 1_024  # of the assignment that is timed
_RUNS = 3
_MEASURED = ("backbone.", "adapt.", "resources.")  # sections whose settings change what is measured


@dataclass(frozen=True)
class Speed:
    """A speed of the whole machine: all workers that it has by the settings, at once."""

    what: str
    per_s: float
    unit: str


@dataclass(frozen=True)
class Speeds:
    machine: str
    workers: int
    backbone: str
    speeds: tuple[Speed, ...]
    measured_s: float
    notes: tuple[str, ...] = ()  # faster ways whose trial failed here, with the reason

    def text(self) -> str:
        width = max(len(speed.what) for speed in self.speeds)
        lines = [
            f"machine   {self.machine}, as {pluralize(self.workers, 'worker')} at once",
            f"backbone  {self.backbone}",
        ]
        lines += [f"{speed.what:<{width}}  {_rounded(speed.per_s):>9} {speed.unit}/s" for speed in self.speeds]
        return "\n".join([*lines, *self.notes, f"measured in {self.measured_s:.0f} s"])


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bench(backbone: str, images: Sequence[str] = (), overrides: Iterable[str] = (), *, sets: int = 2) -> Speeds:
    """Measures this machine in some fifteen seconds. Weights are random, since speed does not depend on them.

    Args:
        backbone: `timm:<model>` or `<module>:<function>`.
        images: folders, lists or shards of which some are decoded; none: a JPEG of noise.
        overrides: `key=value` of the backbone, adapt and resources.
        sets: adaptor sets of the adapted model.

    Raises:
        ValueError: the backbone, an image folder or a setting is wrong.
    """
    began, overrides = time.monotonic(), list(overrides)
    for setting in overrides:
        if not setting.startswith(_MEASURED) or setting.startswith("backbone.name"):
            raise ValueError(
                f"{setting}: has no part in what is measured; expected a setting of {' or '.join(_MEASURED)}"
            )
    config = read({"name": "bench", "data": {"train": "-"}, "backbone": {"name": backbone}}, overrides)
    files = _some_files(images) if images else []
    built = build_backbone(config.backbone, pretrained=False)
    rates = measure(config, sets, built, files, fuses=True)
    of, workers = pluralize(len(files), "image") if files else "noise", workers_here(config.resources)
    speeds = [*_speeds(rates, workers, of, sets), *_clustering(built.embed_dim, config.resources)]
    side = built.preprocess.image_size
    described = f"{backbone}, {built.embed_dim} channels, {side} x {side} pixels"
    took = time.monotonic() - began
    return Speeds(machine_name(config.resources), workers, described, tuple(speeds), took, tuple(lost_trials()))


def _some_files(images: Sequence[str]) -> list[bytes]:
    found = open_images(images)
    rows = np.unique(np.linspace(0, len(found) - 1, SAMPLES).astype(np.int64)).tolist()
    return [data for data in found.images(rows) if isinstance(data, bytes)]


def _speeds(rates: Rates, workers: int, of: str, sets: int) -> Iterator[Speed]:
    seconds = {
        f"decode for embedding ({of})": rates.decode_s,
        f"decode and augment ({of})": rates.augment_s,
        "embed by the backbone": rates.forward_s,
        f"embed by the adapted model of {pluralize(sets, 'set')}": rates.adapted_s,
        "train an adaptor set": rates.shared_s + rates.set_s,
        f"train the fusion of {pluralize(sets, 'set')}": rates.fused_s,
    }
    for what, image_s in seconds.items():
        yield Speed(what, workers / image_s, "images")
    yield Speed("multiply matrices", workers * rates.flops / 1e9, "GFLOP")


def _clustering(dim: int, where: Resources) -> Iterator[Speed]:
    """One assignment of k-means, by a GPU or all cores of this process."""
    device = torch.device("cuda" if may_have_gpus(where) and torch.cuda.is_available() else "cpu")
    drawn = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(0))
    x = to_grid(F.normalize(drawn, dim=1))
    rows = join_rows(Comm(), Rows([x.numpy()], [np.ones(ROWS, dtype=bool)]), device=device)
    centroids = Centroids.of(x[:CLUSTERS].to(device), rows.generator)
    blocks = list(zip(x.to(device).split(rows.block_rows), rows.squares.to(device).split(rows.block_rows), strict=True))
    fastest = math.inf
    for _ in range(_RUNS):
        began = time.perf_counter()
        for block, squares in blocks:
            assign(block, centroids, squares=squares).labels.cpu()
        fastest = min(fastest, time.perf_counter() - began)
    yield Speed(f"assign rows to {CLUSTERS:,} centroids", ROWS / fastest, "rows")
