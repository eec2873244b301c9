"""How many images fit: all ranks agree, what does not fit is halved, and a job resumes with the size it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grappa_dist.config import AdaptConfig
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import Backbone, Grappa, PackedGrappa
from grappa_dist.models.packed import activation_bytes
from grappa_dist.training import memory
from grappa_dist.training.memory import (
    AutomaticBatch,
    ModelSizes,
    adapt_advice,
    automatic_batch_size,
    fuse_advice,
    largest_that_runs,
    memory_budget,
    micro_batch_size,
    naming_lack_of_memory,
    usable_bytes,
)
from tests.models.tiny import create
from tests.processes import run_ranks
from tests.stages import tiny


def model(*, recompute: bool = False) -> PackedGrappa:
    packed = PackedGrappa(Backbone(create(), Preprocess(image_size=32)), 2, 3, recompute=recompute)
    for index in range(2):
        packed.initialise(index, torch.Generator().manual_seed(index))
        for parameter in packed.parameters_of(index):
            parameter.requires_grad_(True)
    return packed


def test_a_cpus_memory_is_shared_by_the_workers_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1200)
    assert [usable_bytes(tiny.CPU, sharing) for sharing in (1, 3)] == [600, 200]


def test_an_image_takes_what_is_kept_and_one_layer_at_work() -> None:
    plain, sparing = model(), model(recompute=True)
    # three layers, of which the first keeps little
    kept, kept_when_sparing = activation_bytes(plain, 32), activation_bytes(sparing, 32)
    assert memory_budget(plain, 7).usable_bytes == 7
    assert memory_budget(plain, 7).image_bytes == kept + memory.LAYERS_AT_WORK * (kept // 2)
    assert kept_when_sparing < kept
    assert memory_budget(sparing, 7).image_bytes == kept_when_sparing + memory.LAYERS_AT_WORK * (kept // 2)
    assert all(layer.recompute for layer in sparing.layers)
    assert not any(layer.recompute for layer in plain.layers)


def test_the_sizes_of_a_backbone_are_those_of_a_model_with_one_set_and_leave_it_as_it_is() -> None:
    backbone = Backbone(create(), Preprocess(image_size=32, resize="squash"))
    before = [type(block) for block in backbone.blocks]
    sizes = ModelSizes.of(backbone, 3)
    assert [type(block) for block in backbone.blocks] == before
    assert (sizes.channels, sizes.layers) == (backbone.embed_dim, len(before))
    assert (sizes.image_size, sizes.resize, sizes.interpolation) == (32, "squash", "bicubic")
    assert sizes.weights == sum(parameter.numel() for parameter in backbone.parameters())
    for recompute in (False, True):
        of_model = memory_budget(
            PackedGrappa(Backbone(create(), Preprocess(image_size=32)), 1, 3, recompute=recompute), 1
        )
        assert sizes.image_bytes(recompute=recompute) == of_model.image_bytes
    assert sizes.image_bytes(recompute=True) < sizes.image_bytes(recompute=False)


def limited(most: int, tried: list[int]) -> None:
    def run(images: int) -> None:
        tried.append(images)
        if images > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand much more")

    assert largest_that_runs(50, run) == tried[-1]


def test_what_does_not_fit_is_halved_until_it_does() -> None:
    for most, expected in ((50, [50]), (13, [50, 25, 13]), (12, [50, 25, 13, 7]), (1, [50, 25, 13, 7, 4, 2, 1])):
        tried = list[int]()
        limited(most, tried)
        assert tried == expected


def test_where_not_one_image_fits_the_error_names_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"not one image fits .* lower adapt\.sets_per_job.*allocate 2 GiB") as caught:
        limited(0, [])
    assert "\n" not in str(caught.value)


def test_an_error_for_lack_of_memory_names_settings_and_any_other_is_left_as_it_is() -> None:
    settings = AdaptConfig(micro_batch="auto", activation_checkpointing=True, sets_per_job=2)
    for error, advice, expected in (
        (
            "CUDA is full\nas ever",
            adapt_advice(settings),
            r"is auto; try a lower adapt\.sets_per_job or .* \(CUDA is full\)",
        ),
        ("full", fuse_advice(64), r"lower fuse\.micro_batch=64 \(full\)"),
    ):
        with pytest.raises(ValueError, match=rf"^some: .* {expected}$"), naming_lack_of_memory("some", advice):
            raise torch.OutOfMemoryError(error)
    with pytest.raises(RuntimeError, match="a kernel is missing"), naming_lack_of_memory("some", "advice"):
        raise RuntimeError("a kernel is missing")


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def run(images: int) -> None:
        raise RuntimeError("a kernel is missing")

    with pytest.raises(RuntimeError, match="a kernel is missing"):
        largest_that_runs(8, run)


def test_the_trial_leaves_no_gradients_behind() -> None:
    packed = model()
    memory._train_pass(packed, 2)
    assert all(parameter.grad is None for parameter in packed.parameters())


def test_the_trial_takes_the_fusion_of_a_single_set_whose_attention_has_no_gradient() -> None:
    fusion = Grappa(Backbone(create(), Preprocess(image_size=32)), 1, 3, attention=True)
    fusion.trainable_attention()
    memory._train_pass(fusion, 2)
    assert all(parameter.grad is None for parameter in fusion.parameters())


def uneven(comm: Comm, folder: Path, usable: int) -> AutomaticBatch:
    """Later ranks have less memory."""
    return automatic_batch_size(tiny.Watcher().context(comm), model(), folder, 64, usable // (1 + comm.rank))


def test_ranks_agree_on_what_fits_all_and_a_job_goes_on_with_it(tmp_path: Path) -> None:
    image = memory_budget(model(), 1).image_bytes
    first, second = run_ranks(uneven, 2, tmp_path, 20 * image)
    assert (first.images, second.images) == (10, 10)  # 64 in parts of 20 at most are 16 each, of 10 at most 10
    assert first.why == "another rank has memory for 10 only"
    assert second.why.endswith(f"an image takes {image / 2**20:.1f} MiB")
    assert json.loads((tmp_path / memory.FILE).read_text()) == {"images": 10, "ranks": 2}
    again, _ = run_ranks(uneven, 2, tmp_path, 60 * image)
    assert again == AutomaticBatch(10, "as when the job began on 2 ranks")
    (alone,) = run_ranks(uneven, 1, tmp_path, 60 * image)
    assert alone.images == 32  # two parts, if 60 fit
    job = tmp_path / "run-2026113012" / "packs" / "0123456789"  # a run may be called as artefacts are
    for damaged in ("", "[]", "{}", '{"images": null, "ranks": 1}'):
        (job / memory.FILE).parent.mkdir(parents=True, exist_ok=True)
        (job / memory.FILE).write_text(damaged)
        assert uneven(Comm(), job, 60 * image).images == 32
    assert uneven(Comm(), job, 20 * image).images == 32
    assert uneven(Comm(), tmp_path / "ample", 10**6 * image).images == 64
    assert uneven(Comm(), tmp_path / "full", 0).images == 1


@pytest.mark.parametrize(("images", "sets", "at_a_time"), [(32, 8, 4), (33, 8, 5), (3, 8, 1), (128, 1, 128)])
def test_on_a_cpu_all_sets_together_take_about_as_many_images_as_one(images: int, sets: int, at_a_time: int) -> None:
    assert micro_batch_size(None, images, sets, on_gpu=False) == at_a_time
