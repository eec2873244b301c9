from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grappa_dist.models import Backbone, Grappa, PackedGrappa, create_backbone
from grappa_dist.models.precision import Precision, hold_weights, products_in
from tests.models import tiny

NOISE = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KWARGS = {**tiny.TIMM_KWARGS, "embed_dim": 48, "depth": 3}


def backbone(precision: Precision = "fp32", name: str = tiny.TIMM) -> Backbone:
    made = create_backbone(name, KWARGS if name == tiny.TIMM else {"dim": 48}, {"image_size": 32}, pretrained=False)
    tiny.fill(made, 1)
    return made.compute_in(precision)


def packed(precision: Precision, *, recompute: bool = False) -> PackedGrappa:
    """Two sets that learn."""
    model = PackedGrappa(backbone(precision), 2, 4, recompute=recompute)
    for index in range(2):
        model.initialise(index, torch.Generator().manual_seed(index))
        for parameter in model.parameters_of(index):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.requires_grad_(True)
    return model


def fused(precision: Precision) -> Grappa:
    model = Grappa(backbone(precision), 2, 4, attention=True)
    for number, layer in enumerate(model.layers):
        rng = torch.Generator().manual_seed(number)
        layer.adaptors.randomise(rng)
        assert layer.attention is not None
        layer.attention.initialise(rng)
    model.trainable_attention()
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    z: Tensor = model(NOISE)
    (z * torch.linspace(-1, 1, z.shape[-1])).sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert found
    return found


def types_of(func: object, run: Callable[[], object]) -> set[torch.dtype]:
    """The types of the first argument of all calls of a function of torch."""
    seen = set[torch.dtype]()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if called is func:
                seen.add(args[0].dtype)
            return called(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


@pytest.mark.parametrize("name", [tiny.TIMM, "tests.models.tiny:create"])
def test_features_in_bf16_are_those_of_fp32_to_its_rounding(name: str) -> None:
    with torch.no_grad():
        right, found = backbone(name=name)(NOISE), backbone("bf16", name)(NOISE)
    assert found.dtype == torch.float32
    assert not torch.equal(found, right)
    assert float(F.cosine_similarity(found, right).min()) > 0.9995


def test_weights_of_products_are_held_in_bf16_and_norms_positions_and_adaptors_in_fp32() -> None:
    model = packed("bf16")
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    narrow = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert {part for part in ("qkv", "patch_embed", "fc1") if any(part in name for name in narrow)} == {
        "qkv",
        "patch_embed",
        "fc1",
    }
    assert not any(part in name for name in narrow for part in ("norm", "pos_embed", "cls_token", "sets"))


def test_frozen_weights_are_cast_once_and_not_in_every_pass() -> None:
    model, casts = backbone("bf16"), list[torch.Size]()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(NOISE)
    assert not casts


@pytest.mark.parametrize("build", [packed, fused])
def test_gradients_in_bf16_are_fp32_and_near_those_of_fp32(build: Callable[[Precision], nn.Module]) -> None:
    right, found = gradients(build("fp32")), gradients(build("bf16"))
    assert {g.dtype for g in found} == {torch.float32}
    for ours, theirs in zip(found, right, strict=True):
        assert float((ours - theirs).norm()) <= 0.03 * float(theirs.norm())


def test_attention_is_fp32_on_a_cpu_where_it_takes_part_in_gradients_and_bf16_elsewhere() -> None:
    attention, model = F.scaled_dot_product_attention, packed("bf16")
    with torch.no_grad():
        assert types_of(attention, lambda: model(NOISE)) == {torch.bfloat16}
    of_training = types_of(attention, lambda: gradients(model))
    assert of_training == {torch.bfloat16, torch.float32}  # the first block has nothing before it that learns


def test_a_pass_that_is_computed_again_has_the_gradients_of_one_that_is_kept() -> None:
    for kept, again in zip(gradients(packed("bf16")), gradients(packed("bf16", recompute=True)), strict=True):
        assert torch.equal(kept, again)


def test_the_same_model_gives_the_same_bits_twice() -> None:
    assert all(map(torch.equal, gradients(packed("bf16")), gradients(packed("bf16"))))


def test_a_model_in_fp32_stays_so_within_anothers_autocast() -> None:
    model = backbone()
    with torch.no_grad():
        right = model(NOISE)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(NOISE), right)


def test_going_back_to_fp32_keeps_the_numbers_of_bf16() -> None:
    model, before = backbone("bf16"), backbone()
    weights = [p.detach().clone() for p in model.parameters()]
    model.compute_in("fp32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for p, narrow, given in zip(model.parameters(), weights, before.parameters(), strict=True):
        assert torch.equal(p, narrow.float())
        assert float((p - given).abs().max()) <= 2.0**-8 * float(given.abs().max())


def test_what_learns_what_is_double_and_what_has_no_memory_keeps_its_type() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)])
    layers[1:].requires_grad_(False)
    hold_weights(layers, "bf16")
    wanted = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    assert [layer.weight.dtype for layer in layers] == wanted  # type: ignore[union-attr]


def test_a_copy_in_double_precision_is_exact() -> None:
    model = backbone("bf16")
    wide = copy.deepcopy(model).double()
    plain = copy.deepcopy(model.compute_in("fp32")).double()
    with torch.no_grad():
        assert torch.equal(wide(NOISE.double()), plain(NOISE.double()))
        assert wide(NOISE.double()).dtype == torch.float64


def test_nothing_is_entered_where_nothing_is_computed() -> None:
    with products_in("bf16", torch.device("meta")):
        assert torch.nn.Linear(3, 2, device="meta")(torch.ones(1, 3, device="meta")).dtype == torch.float32


def test_fp32_on_a_gpu_is_without_tf32_also_where_the_process_allows_it() -> None:
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with products_in("fp32", torch.device("cuda")):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
