"""What a batch of images asks of a GPU on its way there and back: one copy each, and one wait, for the batch before."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import Config
from grappa_dist.data.device_batches import Memory, device_batches
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import ModelSpec, build
from grappa_dist.stages.embed import Embedding, EmbedTask, RowSet, embed_row_sets, embed_shards, features_of
from tests.gpu.counting import counting
from tests.gpu.process import PretendGpu
from tests.gpu.workloads import CUDA, folder_of, settings_of
from tests.stages import tiny

BATCH = 4


def embed_counts(comm: Comm) -> dict[str, Any]:
    """Features of all rows here and on a CPU, and what each batch but the first has asked for."""
    with folder_of(comm) as folder:
        settings = settings_of(folder, {"depth": 1, "image_size": 32})
        images, spec = ImageShards.open(settings.data.train, None), ModelSpec("backbone", settings.backbone)
        row_sets = [RowSet(images, np.arange(start, stop)) for start, stop in ((0, 9), (9, 32), (32, len(images)))]
        found = dict[str, Any]()
        for device in (tiny.CPU, CUDA):
            model, counts, features = build(spec, device), list[dict[str, Any]](), list[Any]()
            with counting() as meter:
                for batch in embed_row_sets(model, row_sets, device=device, how=Embedding(BATCH, 2)):
                    counts.append(meter.take().as_json())
                    features += batch.unit.tolist()
            found[device.type], found["counts"] = features, counts[2:-2]
    return found


def test_a_batch_is_copied_once_each_way_and_the_host_waits_once(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.test_feeding:embed_counts", 1)
    for counts in found["counts"]:
        assert counts["waits"] <= 1, counts["waits_at"]
        assert counts["copies"] <= 4  # two of them of a batch that is ahead, where reading catches up
    total = sum(counts["copies"] for counts in found["counts"])
    assert total <= 2 * len(found["counts"]) + 2
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=0.02)  # of bf16


def one_pass(comm: Comm) -> dict[str, Any]:
    """Bytes of the features of four models, each alone and in one pass; and the waits of a pass of each kind."""
    with folder_of(comm) as folder:
        settings = settings_of(folder, {"depth": 2, "image_size": 32})
        images, sets = ImageShards.open(settings.data.train, None), tiny_sets(folder, settings)
        specs = [ModelSpec("backbone", settings.backbone)]
        specs += [ModelSpec(f"k={i}", settings.backbone, settings.adapt.bottleneck, (one,)) for i, one in sets.items()]
        specs += [ModelSpec("average", settings.backbone, settings.adapt.bottleneck, (*sets.values(),))]
        found, waits = dict[str, list[str]](), dict[str, int]()
        for way, passes in {"alone": [[spec] for spec in specs], "together": [specs]}.items():
            features = {s.name: features_of(Store(folder / way), s, settings.embed, images) for s in specs}
            for several in passes:
                tasks = [
                    EmbedTask(
                        images.part(shard),
                        images.shard_rows(shard).start,
                        tuple((spec, features[spec.name][shard]) for spec in several),
                        Embedding(BATCH, 2),
                    )
                    for shard in range(len(images.shards))
                ]
                with counting() as meter:
                    embed_shards(CUDA, tasks)
                    waits[way] = meter.take().waits.total()
            paths = [artifact.path / "rows.npy" for of_model in features.values() for artifact in of_model]
            found[way] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        return {**found, "waits": waits}


def tiny_sets(folder: Path, settings: Config) -> dict[int, Artifact]:
    return {seed: tiny.random_adaptors(Store(folder), settings, seed) for seed in (1, 2)}


def test_four_models_in_one_pass_have_the_bits_of_four_passes_and_wait_for_a_batch_once(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.test_feeding:one_pass", 1)
    assert found["together"] == found["alone"]
    assert len(set(found["alone"])) == 4 * len(tiny.SIZES)
    compared = 2 * 3  # of the first images: patches and first block of three models with those of the first one
    assert found["waits"]["together"] <= found["waits"]["alone"] + compared


def many_batches(comm: Comm) -> list[list[float]]:
    def read(job: int, memory: Memory) -> int:
        memory((2, 3, 3, 3))[...] = job
        return job

    sums = [pixels.float().mean() + 0 * job for pixels, job in device_batches(range(50), read, CUDA, threads=3)]
    return [[float(value) for value in torch.stack(sums).cpu()]]


def test_a_device_that_is_late_sees_every_batch_as_it_was_read(gpu: PretendGpu) -> None:
    (found,) = gpu.run("tests.gpu.test_feeding:many_batches", 1)
    assert found == [list(map(float, range(50)))]
