"""Test images embedded by several models of one backbone: in one pass, against a pass for each model.

Both sides are what the workers of a run do, from shards to finished artefacts. The models are the frozen backbone, N
adaptor sets, their average, and fusions of them; all weights are random, which does not change the time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.data import PHOTO_PX, images_to_measure
from benchmarks.harness import Log, Timing, aligned, aligned_header, check_device, check_least, in_turns, machine
from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import BackboneConfig, EmbedConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import save_tensors
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, ModelSpec, build_backbone, release_cached_model
from grappa_dist.stages.embed import ROWS_FILE, Embedding, EmbedTask, embed_shards, features_of
from grappa_dist.variants import BACKBONE

TOGETHER, SINGLY = "one pass", "a pass for each model"


@dataclass(frozen=True)
class PassesSettings:
    """Options of `bench.py passes`."""

    shards: tuple[str, ...] | None
    rows: int
    backbone: str
    image_size: int
    sets: int
    fusions: int
    bottleneck: int
    batch: int
    threads: int
    repeats: int
    device: str
    seed: int

    def check(self) -> None:
        check_least(self, rows=1, image_size=1, sets=1, fusions=0, bottleneck=1, batch=1, threads=1, repeats=1, seed=0)
        check_device(self.device)


@dataclass(frozen=True)
class PassesFindings:
    """Results of `bench.py passes`."""

    source: str
    models: int
    timings: dict[str, Timing]
    same_bytes: bool  # of the features of all models

    @property
    def ratio(self) -> float:
        """How many times as long single passes take."""
        return self.timings[SINGLY].seconds / self.timings[TOGETHER].seconds

    @property
    def cpu_ratio(self) -> float:
        return self.timings[SINGLY].cpu / self.timings[TOGETHER].cpu


def untrained(name: str, image_size: int, seed: int) -> nn.Module:
    """A ViT of timm with random weights; `backbone.name` of what is measured."""
    declare_torchvision_ops()
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
    return model


def measure_passes(settings: PassesSettings, log: Log) -> PassesFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        log("images and models")
        images, source = images_to_measure(Path(folder), settings.shards, settings.rows, PHOTO_PX, settings.seed)
        models = _models(Store(Path(folder) / "models"), settings)
        sides: dict[str, Callable[[], list[bytes]]] = {
            TOGETHER: lambda: _embedded(images, [models], settings),
            SINGLY: lambda: _embedded(images, [[model] for model in models], settings),
        }
        sides[SINGLY]()  # loads what it needs
        found, timings = in_turns(sides, settings.repeats, log)
    return PassesFindings(source, len(models), timings, found[TOGETHER] == found[SINGLY])


def _models(store: Store, settings: PassesSettings) -> list[ModelSpec]:
    kwargs = {"name": settings.backbone, "image_size": settings.image_size, "seed": settings.seed}
    backbone = BackboneConfig(name="benchmarks.passes:untrained", kwargs=kwargs, image_size=settings.image_size)
    draws = torch.Generator().manual_seed(settings.seed)
    single = Grappa(build_backbone(backbone), 1, settings.bottleneck, attention=True)
    sets, fusions = list[Artifact](), list[Artifact | None]([None])  # the average
    for number in range(settings.sets):
        for layer in single.layers:
            layer.adaptors.randomise(draws)
        sets.append(_saved(store, f"adaptors/k={number}", ADAPTORS_FILE, single.adaptor_tensors()))
    for number in range(settings.fusions):
        for layer in single.layers:
            assert layer.attention is not None
            layer.attention.initialise(draws)
        fusions.append(_saved(store, f"fusion/{number}", FUSION_FILE, single.attention_tensors()))
    alone = [ModelSpec(f"k={i}", backbone, settings.bottleneck, (one,)) for i, one in enumerate(sets)]
    fused = [ModelSpec(f"fusion {i}", backbone, settings.bottleneck, (*sets,), f) for i, f in enumerate(fusions)]
    return [ModelSpec(BACKBONE, backbone), *alone, *fused]


def _saved(store: Store, kind: str, file: str, tensors: dict[str, torch.Tensor]) -> Artifact:
    artifact = store.artifact(kind, {}, {})
    save_tensors(artifact.begin() / file, tensors)
    artifact.commit()
    return artifact


def _embedded(images: ImageShards, passes: Sequence[Sequence[ModelSpec]], settings: PassesSettings) -> list[bytes]:
    """The bytes of all features, by model and shard."""
    device, how = torch.device(settings.device), Embedding(settings.batch, settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        store, made = Store(Path(folder)), list[Artifact]()
        for models in passes:
            release_cached_model()  # each pass of a run that trains in between builds its models
            features = [features_of(store, spec, EmbedConfig(batch_size=settings.batch), images) for spec in models]
            of_shards = [tuple(zip(models, of_shard, strict=True)) for of_shard in zip(*features, strict=True)]
            shards = [
                EmbedTask(images.part(i), images.shard_rows(i).start, of_shard, how)
                for i, of_shard in enumerate(of_shards)
            ]
            embed_shards(device, shards)
            made += [artifact for of_model in features for artifact in of_model]
        return [(artifact.path / ROWS_FILE).read_bytes() for artifact in made]


def as_text(header: dict[str, str], settings: PassesSettings, found: PassesFindings) -> str:
    about = f"{settings.backbone} at {settings.image_size} px, {found.models} models ({settings.sets} sets)"
    about += f", batches of {settings.batch}, on {settings.device}"
    lines: list[Sequence[str]] = [["", "seconds", "CPU s"]]
    lines += [[name, f"{timing.seconds:.2f}", f"{timing.cpu:.2f}"] for name, timing in found.timings.items()]
    notes = f"single passes take {found.ratio:.2f} times as long, and {found.cpu_ratio:.2f} times the CPU; "
    notes += f"the features are {'the same, bit for bit' if found.same_bytes else 'NOT the same'}"
    blocks = [aligned_header({**header, "images": found.source, "models": about}), f"{aligned(lines)}\n{notes}"]
    return "\n\n".join(blocks)


def as_json(header: dict[str, str], settings: PassesSettings, found: PassesFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "settings": vars(settings),
        "images": found.source,
        "models": found.models,
        "runs_s": {name: timing.runs for name, timing in found.timings.items()},
        "cpu_runs_s": {name: timing.cpu_runs for name, timing in found.timings.items()},
        "ratio": found.ratio,
        "cpu_ratio": found.cpu_ratio,
        "same_bytes": found.same_bytes,
    }


SHORT = "several models over the same images, in one pass or in one each"
DESCRIPTION = """\
Embedding images by the backbone, its adaptor sets and their fusions: in one pass, which reads each image once and runs
the backbone up to the first adaptor once, against a pass for each model. Prints seconds and how many times as long
single passes take (above 1, one pass is faster), and whether the features have the same bits."""
EXAMPLE = """example, a minute:
  python launch/bench.py passes --rows 128 --backbone vit_tiny_patch16_224 --image-size 128"""


def arguments(add: Callable[..., Any]) -> None:
    add("--shards", nargs="+", metavar="DIR_OR_TAR", help="real images; default: drawn ones")
    add("--rows", type=int, default=256, metavar="N", help="drawn images; default: %(default)s")
    add("--backbone", default="vit_tiny_patch16_224", metavar="NAME", help="of timm; default: %(default)s")
    add("--image-size", type=int, default=128, metavar="PIXELS", help="default: %(default)s")
    add("--sets", type=int, default=4, metavar="N", help="adaptor sets; default: %(default)s")
    add("--fusions", type=int, default=3, metavar="N", help="beside their average; default: %(default)s")
    add("--bottleneck", type=int, default=64, metavar="H", help="default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="of a side; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    options["shards"] = tuple(options["shards"]) if options["shards"] else None
    settings = PassesSettings(**options)
    header = machine(settings.threads, "pillow", "simplejpeg", "timm")
    found = measure_passes(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
