"""Embedding images with a frozen ViT against a plain timm + DataLoader loop, and against the forward pass alone.

Every side reads the same shards with as many threads (ours) or processes (the DataLoader), in the same batches. On a
CPU the plain loop computes in float32 whatever is asked of ours; on a GPU, as ours does. The weights are random, which
does not change the time.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.adapt import types_of_products
from benchmarks.data import PHOTO_PX, image_of, images_to_measure
from benchmarks.harness import (
    Log,
    Timing,
    aligned,
    aligned_header,
    arithmetic_limit,
    check_device,
    check_least,
    in_turns,
    machine,
    wait_for,
)
from grappa_dist.data.shards import ImageShards
from grappa_dist.models import Backbone, create_backbone
from grappa_dist.models.precision import Precision, products_in
from grappa_dist.stages.embed import Embedding, embed_rows

OURS, BASELINE, ALONE = "ours", "timm + webdataset + DataLoader", "forward alone, no reading"


@dataclass(frozen=True)
class EmbedSettings:
    """Options of `bench.py embed`."""

    shards: tuple[str, ...] | None
    rows: int
    backbone: str
    batch: int
    threads: int
    repeats: int
    device: str
    seed: int
    precision: Precision | None = None  # None: bf16 on a GPU, fp32 on a CPU

    @property
    def computes_in(self) -> Precision:
        return self.precision or ("bf16" if self.device == "cuda" else "fp32")

    def check(self) -> None:
        check_least(self, rows=1, batch=1, threads=1, repeats=1, seed=0)
        check_device(self.device)


@dataclass(frozen=True)
class EmbedFindings:
    """Results of `bench.py embed`."""

    source: str
    rows: int
    timings: dict[str, Timing]
    agreement: float  # the least cosine of a row of ours with the baseline's
    of_limit: float  # share of the arithmetic limit that ours reaches
    dtype: str  # of that limit

    def per_s(self, side: str) -> float:
        return self.rows / self.timings[side].seconds

    def ratio(self, baseline: str) -> float:
        return self.per_s(OURS) / self.per_s(baseline)

    def cpu_ratio(self, baseline: str) -> float:
        return self.timings[baseline].cpu / self.timings[OURS].cpu


def measure_embed(settings: EmbedSettings, log: Log) -> EmbedFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        log("images")
        images, source = images_to_measure(Path(folder), settings.shards, settings.rows, PHOTO_PX, settings.seed)
        return _measured(images, source, settings, log)


def _measured(images: ImageShards, source: str, settings: EmbedSettings, log: Log) -> EmbedFindings:
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    given = create_backbone(f"timm:{settings.backbone}", {}, {}, pretrained=False).to(device)
    model = copy.deepcopy(given).compute_in(settings.computes_in)
    size = model.preprocess.image_size
    batch = torch.rand(min(settings.batch, len(images)), 3, size, size, device=device)
    types = types_of_products(model)
    _forward(model, batch)  # loads what it needs
    (dtype,) = types
    limit = arithmetic_limit(device, dtype)
    sides: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: _ours(model, images, settings),
        BASELINE: lambda: _baseline(given, images, settings),
        ALONE: lambda: _alone(model, batch, len(images)),
    }
    features, timings = in_turns(sides, settings.repeats, log)
    agreement = float((features[OURS] * features[BASELINE]).sum(1).min())
    reached = len(images) * _operations(model, size) / timings[OURS].seconds
    return EmbedFindings(source, len(images), timings, agreement, reached / limit, str(dtype).removeprefix("torch."))


@torch.inference_mode()
def _forward(model: Backbone, images: Tensor) -> Tensor:
    return F.normalize(model(images), dim=1)


def _ours(model: Backbone, images: ImageShards, settings: EmbedSettings) -> Tensor:
    how = Embedding(settings.batch, settings.threads)
    device, rows = torch.device(settings.device), np.arange(len(images))
    return torch.from_numpy(np.concatenate([z for _, z, _ in embed_rows(model, images, rows, device=device, how=how)]))


def _baseline(model: Backbone, images: ImageShards, settings: EmbedSettings) -> Tensor:
    """The usual loop: tars by webdataset, timm's own transform on Pillow images, worker processes."""
    import webdataset
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    vit: Any = model.model
    transform = create_transform(**resolve_model_data_config(vit))
    paths = [shard.path for shard in images.shards]
    dataset = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).map(
        lambda sample: (f"{sample['__url__']} {sample['__key__']}", transform(_decoded(sample)))
    )
    workers = min(settings.threads, len(paths))
    loader = torch.utils.data.DataLoader(dataset, batch_size=settings.batch, num_workers=workers)
    device, found = torch.device(settings.device), dict[str, Tensor]()
    precision: Precision = settings.computes_in if settings.device == "cuda" else "fp32"
    for keys, batch in loader:
        with torch.inference_mode(), products_in(precision, device):
            z = vit.forward_head(vit.forward_features(batch.to(device)), pre_logits=True)
        found.update(zip(keys, F.normalize(z.float(), dim=1).cpu(), strict=True))
    return torch.stack([found[f"{paths[images.locate(row)[0]]} {images.key(row)}"] for row in range(len(images))])


def _alone(model: Backbone, batch: Tensor, rows: int) -> Tensor:
    for start in range(0, rows, len(batch)):
        z = _forward(model, batch[: rows - start])
    wait_for(batch.device)
    return z


def _operations(model: Backbone, size: int) -> float:
    """Operations of one image's matrix products, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, size, size, device=model.mean.device))
    return float(counter.get_total_flops())


def _decoded(sample: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image_of(sample))).convert("RGB")


def as_text(header: dict[str, str], settings: EmbedSettings, found: EmbedFindings) -> str:
    about = f"{settings.backbone}, batches of {settings.batch}, on {settings.device}; ours in {settings.computes_in}"
    lines: list[Sequence[str]] = [["", "images/s", "ours/baseline", "by CPU", "CPU s"]]
    for name, timing in found.timings.items():
        ratios = ["-", "-"] if name == OURS else [f"{found.ratio(name):.2f}", f"{found.cpu_ratio(name):.2f}"]
        lines.append([name, f"{found.per_s(name):.1f}", *ratios, f"{timing.cpu:.2f}"])
    notes = f"ours reaches {found.of_limit:.1%} of one large product in {found.dtype} here; features of both sides "
    notes += f"have a cosine of {found.agreement:.6f} at least"
    blocks = [aligned_header({**header, "images": found.source, "model": about}), f"{aligned(lines)}\n{notes}"]
    return "\n\n".join(blocks)


def as_json(header: dict[str, str], settings: EmbedSettings, found: EmbedFindings) -> dict[str, Any]:
    baselines = [name for name in found.timings if name != OURS]
    return {
        "machine": header,
        "settings": vars(settings),
        "images": found.source,
        "runs_s": {name: timing.runs for name, timing in found.timings.items()},
        "cpu_runs_s": {name: timing.cpu_runs for name, timing in found.timings.items()},
        "ratio": {name: found.ratio(name) for name in baselines},
        "cpu_ratio": {name: found.cpu_ratio(name) for name in baselines},
        "of_limit": found.of_limit,
        "dtype": found.dtype,
        "least_cosine": found.agreement,
    }


SHORT = "against a timm + DataLoader loop"
DESCRIPTION = """\
Embedding images with a frozen ViT of timm, reading and decoding included: ours against a plain loop of timm, webdataset
and DataLoader, and against the forward pass alone, on images that are in memory. Prints images/s and ratios (ours /
baseline: above 1, ours is faster), the share of the machine's arithmetic limit, and the similarity of the features."""
EXAMPLE = """example, half a minute:
  python launch/bench.py embed --rows 128 --backbone vit_tiny_patch16_224"""


def arguments(add: Callable[..., Any]) -> None:
    add("--shards", nargs="+", metavar="DIR_OR_TAR", help="real images, all of which decode; default: drawn ones")
    add("--rows", type=int, default=512, metavar="N", help="drawn images; default: %(default)s")
    add("--backbone", default="vit_small_patch16_224", metavar="NAME", help="of timm; default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of a side; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--precision", choices=("fp32", "bf16"), help="of ours; default: bf16 on a GPU, fp32 on a CPU")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    options["shards"] = tuple(options["shards"]) if options["shards"] else None
    settings = EmbedSettings(**options)
    header = machine(settings.threads, "pillow", "simplejpeg", "webdataset", "timm")
    found = measure_embed(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
