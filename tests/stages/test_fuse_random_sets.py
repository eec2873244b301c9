from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grappa_dist import load_model
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.console import read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.export import export_model
from grappa_dist.models import Adaptors, Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, ModelSpec, build, build_backbone
from grappa_dist.stages.embed import Embedding
from grappa_dist.stages.fuse import (
    FuseJob,
    FuseObjective,
    fusion_of,
    lars_groups,
    randomise_adaptors,
    train_fusion,
)
from grappa_dist.training.barlow_twins_loss import barlow_twins
from grappa_dist.training.optim import Lars
from grappa_dist.variants import Variant
from tests import reference
from tests.processes import run_ranks
from tests.stages import tiny

EPOCHS, STEPS = 3, 9
PARTITIONS = 3
BOTTLENECK = 4
ADAPTOR_NAMES = ("down_weight", "down_bias", "up_weight", "up_bias")


def model_of(num_sets: int, seed: int) -> Grappa:
    settings = tiny.config(["shards"])
    grappa = Grappa(build_backbone(settings.backbone), num_sets, BOTTLENECK, attention=num_sets > 1)
    randomise_adaptors(grappa, seed)
    return grappa


def job_in(folder: Path, out: str, variant: str) -> FuseJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, fuse={"epochs": EPOCHS})
    random_sets = {"bottleneck": BOTTLENECK, "num_sets": Variant.parse(variant).num_random_sets(PARTITIONS)}
    store = Store(folder / out)
    images = ImageShards.open(paths, None)
    return FuseJob(
        variant=Variant.parse(variant),
        adaptors=(),
        labels={},
        training=tiny.training_images(settings, images),
        backbone=settings.backbone,
        bottleneck=BOTTLENECK,
        fuse=settings.fuse,
        embedding=Embedding(settings.embed.batch_size, 1),
        artifact=fusion_of(store, variant, settings.backbone, settings.fuse, settings.data, 0, {}, random_sets),
        random_sets=random_sets["num_sets"],
    )


def train_until(comm: Comm, job: FuseJob, kill_after: int | None = None) -> None:
    watcher = tiny.Watcher(kill_after=kill_after)
    if kill_after is None:
        train_fusion(watcher.context(comm), job)
    else:
        with pytest.raises(tiny.Killed):
            train_fusion(watcher.context(comm), job)


def train_all_ways(comm: Comm, folder: Path) -> None:
    out = str(comm.size)
    train_until(comm, job_in(folder, out, "random-all"))
    train_until(comm, job_in(folder, f"{out}-killed", "random-all"), kill_after=5)
    if comm.size == 1:
        train_until(comm, job_in(folder, f"{out}-killed", "random-all"))
        train_until(comm, job_in(folder, out, "random-one"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    tiny.write_shards(folder / "images")
    for size in (1, 2):
        run_ranks(train_all_ways, size, folder, timeout_s=400)
    run_ranks(train_until, 1, job_in(folder, "2-killed", "random-all"), timeout_s=400)  # goes on on one rank
    return folder


def artifact(folder: Path, out: str, variant: str = "random-all") -> Artifact:
    return job_in(folder, out, variant).artifact


def tensors(folder: Path, out: str) -> dict[str, Tensor]:
    path = artifact(folder, out).path
    return load_file(path / ADAPTORS_FILE) | load_file(path / FUSION_FILE)


def test_the_start_is_a_function_of_the_seed_and_nothing_of_it_is_zero() -> None:
    first, again, other = (model_of(2, seed).adaptor_tensors(1) for seed in (5, 5, 6))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        assert (tensor != 0).all()
        assert tensor.abs().max() <= 1 / (4 if "down" in name else BOTTLENECK**0.5)  # sqrt of 16 channels is 4


def test_the_one_set_is_the_first_of_several_and_no_two_are_alike() -> None:
    one, three = model_of(1, 0), model_of(3, 0)
    sets = [three.adaptor_tensors(i) for i in range(3)]
    for name, tensor in one.adaptor_tensors().items():
        assert torch.equal(tensor, sets[0][name])
        assert not torch.equal(sets[0][name], sets[1][name])
        assert not torch.equal(sets[1][name], sets[2][name])


def test_gradients_reach_every_adaptor_and_the_attention_of_every_layer(world: Path) -> None:
    objective = FuseObjective(tiny.Watcher().context(Comm()), job_in(world, "start", "random-all"), world)
    images = torch.rand(12, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))
    z = objective.grappa(images)
    barlow_twins(objective.module.projector(z[:6]), objective.module.projector(z[6:]), 0.005).backward()
    for layer in objective.grappa.layers:
        assert layer.attention is not None
        for name, parameter in [*layer.attention.named_parameters(), *layer.adaptors.named_parameters()]:
            assert parameter.grad is not None, name
            for of_set in parameter.grad.chunk(PARTITIONS if name in ADAPTOR_NAMES else 1):
                assert of_set.norm() > 0, name
    parts = [part for layer in objective.grappa.layers for part in (layer.adaptors, layer.attention)]
    learning = {id(p) for part in parts if part is not None for p in part.parameters()}
    frozen = [p for p in objective.grappa.parameters() if id(p) not in learning]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_lars_sees_the_tensors_of_every_set_and_its_biases() -> None:
    model, settings = model_of(2, 0), {"lr": 0.5, "momentum": 0.9, "eta": 1e-3, "weight_decay": 1e-3}
    model.trainable_attention(and_adaptors=True)
    for layer in model.layers:
        assert layer.attention is not None
        layer.attention.initialise(torch.Generator().manual_seed(1))
    apart = [{name: t.clone() for name, t in model.adaptor_tensors(i).items()} for i in range(2)]
    momenta = [{name: torch.zeros_like(t) for name, t in of_set.items()} for of_set in apart]
    optimizer = Lars(lars_groups(model), **settings)
    draws = torch.Generator().manual_seed(2)
    for _ in range(3):
        grads = [{n: torch.randn(t.shape, generator=draws) for n, t in of_set.items()} for of_set in apart]
        for number, layer in enumerate(model.layers):
            like = Adaptors(2, layer.adaptors.dim, BOTTLENECK)
            like.load([{n.split(".", 2)[2]: g[n] for n in g if n.startswith(f"layers.{number}.")} for g in grads])
            for parameter, grad in zip(layer.adaptors.parameters(), like.parameters(), strict=True):
                parameter.grad = grad.detach().clone()
        optimizer.step()
        for of_set, momentum, grad_of in zip(apart, momenta, grads, strict=True):
            for name, grad in grad_of.items():
                of_set[name], momentum[name] = reference.lars_step(of_set[name], grad, momentum[name], **settings)
    for index, of_set in enumerate(apart):
        for name, tensor in model.adaptor_tensors(index).items():
            torch.testing.assert_close(tensor, of_set[name])


def test_what_does_not_learn_is_not_given_to_lars() -> None:
    model = model_of(2, 0)
    model.trainable_attention()
    (only,) = lars_groups(model)
    assert len(only["params"]) == 2 * len(model.layers)


def test_losses_do_not_depend_on_ranks_nor_on_a_kill_nor_on_both(world: Path) -> None:
    alone = tiny.losses_of(artifact(world, "1").path)
    assert len(alone) == STEPS
    for out in ("2", "2-killed"):
        np.testing.assert_allclose(tiny.losses_of(artifact(world, out).path), alone, rtol=0, atol=1e-5)
        for name, tensor in tensors(world, "1").items():
            torch.testing.assert_close(tensors(world, out)[name], tensor, rtol=0, atol=1e-4)
    begins = [e for e in read_events(artifact(world, "2-killed").path / "metrics.jsonl") if e["name"] == "begins"]
    assert [(e["ranks"], e["at_step"]) for e in begins] == [(2, 0), (1, 4)]


@pytest.mark.parametrize("name", [ADAPTORS_FILE, FUSION_FILE])
def test_a_killed_job_ends_with_the_same_bytes(world: Path, name: str) -> None:
    ours, straight = ((artifact(world, out).path / name).read_bytes() for out in ("1-killed", "1"))
    assert ours == straight


def test_adaptors_move_from_where_they_began(world: Path) -> None:
    start = FuseObjective(tiny.Watcher().context(Comm()), job_in(world, "start", "random-all"), world).grappa
    for index in range(PARTITIONS):
        for name, tensor in start.adaptor_tensors(index).items():
            assert not torch.equal(tensor, tensors(world, "1")[f"sets.{index}.{name}"])


def test_a_set_alone_has_no_attention_to_speak_of(world: Path) -> None:
    steps = tiny.steps_of(artifact(world, "1", "random-one").path)
    assert len(steps) == STEPS
    assert not any(name.startswith(("entropy", "attention", "decay")) for step in steps for name in step)


@pytest.mark.parametrize("variant", ["random-one", "random-all"])
def test_the_exported_model_is_the_one_that_was_trained(world: Path, variant: str, tmp_path: Path) -> None:
    random_sets = Variant.parse(variant).num_random_sets(PARTITIONS)
    backbone = job_in(world, "1", variant).backbone
    spec = ModelSpec(variant, backbone, BOTTLENECK, fusion=artifact(world, "1", variant), random_sets=random_sets)
    made = Store(tmp_path).artifact(f"models/{variant}", {}, spec.inputs)
    export_model(spec, made)
    model = load_model(made.path, trust_modules=True)
    images = torch.rand(4, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))
    built: Any = build(spec, tiny.CPU)
    expected = torch.nn.functional.normalize(built(images), dim=1)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert model.sets == [f"random {i + 1}" for i in range(random_sets)]
    assert model.attention(images).shape == (4, 2, random_sets)
    assert spec.weights_vary == (random_sets > 1)
