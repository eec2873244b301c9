"""torch.compile is used where it gives the same and is faster, and only there. Without a GPU: by a cheap backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from grappa_dist import progress
from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, PackedGrappa
from grappa_dist.training.compile import compile_if_faster, seconds
from tests.models import tiny


def model(*, recompute: bool = False, timm: bool = True) -> PackedGrappa:
    base = Backbone(tiny.timm_vit() if timm else tiny.create(), Preprocess(image_size=32))
    packed = PackedGrappa(base, 2, 3, recompute=recompute)
    for index in range(2):
        for i, adaptors in enumerate(packed.adaptors(index)):
            tiny.fill(adaptors, seed=10 * index + i)
            adaptors.requires_grad_(True)
    return packed


def gradients(packed: PackedGrappa, images: int) -> list[torch.Tensor]:
    z = packed(torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(images)))
    z.square().sum(2).sqrt().sum().backward()
    found = [p.grad.clone() for p in packed.parameters() if p.grad is not None]
    packed.zero_grad()
    return [z.detach(), *found]


def timings(*times: float) -> Callable[[Callable[[], object]], float]:
    of: Iterator[float] = iter(times)

    def measure(work: Callable[[], object]) -> float:
        work()
        return next(of)

    return measure


def is_compiled(packed: PackedGrappa) -> set[bool]:
    return {layer.compiled is not None for layer in packed.layers}


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "timm"), [(False, True), (True, False)])
def test_compiled_layers_have_the_features_and_gradients_of_plain_ones(recompute: bool, timm: bool) -> None:
    packed = model(recompute=recompute, timm=timm)
    found = compile_if_faster(packed, 3, backend="aot_eager", measure=timings(2.0, 1.0))
    assert found == "compiled; 3 images take 1000.0 ms compiled, 2000.0 ms plain"
    assert is_compiled(packed) == {True}
    assert all(p.grad is None for p in packed.parameters())
    for images in (3, 2, 1):  # batches differ in size
        for found, right in zip(
            gradients(packed, images), gradients(model(recompute=recompute, timm=timm), images), strict=True
        ):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_what_is_not_faster_is_not_used() -> None:
    packed = model(timm=False)
    found = compile_if_faster(packed, 2, backend="aot_eager", measure=timings(1.0, 0.99))
    assert found == "not compiled: not faster; 2 images take 990.0 ms compiled, 1000.0 ms plain"
    assert is_compiled(packed) == {False}


def test_a_compiler_that_fails_is_not_used_and_its_error_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_lost", list[str]())

    def failing(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler\nfor this GPU")

    for packed in (model(timm=False), model(timm=False)):
        found = compile_if_faster(packed, 2, backend=failing, measure=timings(2.0, 1.0))  # type: ignore[arg-type]
        assert found.startswith("not compiled: BackendCompilerFailed: ")
        assert "no compiler for this GPU" in found
    (told,) = progress.lost_trials()
    assert told.startswith("torch.compile is not used: BackendCompilerFailed: ")
    assert is_compiled(packed) == {False}
    assert len(gradients(packed, 2)) == len(gradients(model(timm=False), 2))


def test_a_compiler_that_computes_something_else_is_not_used() -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *given: tuple(t * 1.001 if t.is_floating_point() else t for t in graph(*given))

    packed = model(timm=False)
    found = compile_if_faster(packed, 2, backend=wrong, measure=timings(2.0, 1.0))  # type: ignore[arg-type]
    assert found.startswith("not compiled: off by ")
    assert is_compiled(packed) == {False}


def test_a_compiler_that_makes_one_gradient_nan_is_not_used() -> None:
    """Not the first of the values that are compared, which Python's max alone would see."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return torch.full_like(gradients[0], torch.nan)

    def wrong(graph: Any, inputs: Any) -> Any:
        learning = max(i for i, given in enumerate(inputs) if isinstance(given, torch.nn.Parameter))
        return lambda *given: graph(*given[:learning], Spoilt.apply(given[learning]), *given[learning + 1 :])

    packed = model(timm=False)
    found = compile_if_faster(packed, 2, backend=wrong, measure=timings(2.0, 1.0))  # type: ignore[arg-type]
    assert found.startswith("not compiled: off by nan, 1 x 10^-5 allowed")
    assert is_compiled(packed) == {False}


@pytest.mark.long
def test_batches_of_any_size_need_no_graph_beyond_those_of_the_trial() -> None:
    packed = model()
    compile_if_faster(packed, 12, backend="aot_eager", measure=timings(2.0, 1.0))
    before = counters["stats"]["unique_graphs"]
    for images in (11, 1, 2, 0, 5):
        gradients(packed, images)
    assert counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.long
def test_in_bf16_it_may_be_as_far_from_float32_as_plain_bf16_is() -> None:
    packed = model()
    packed.backbone.compute_in("bf16")
    found = compile_if_faster(packed, 2, backend="aot_eager", measure=timings(2.0, 1.0))
    assert found.startswith("compiled; ")
    assert packed.backbone.precision == "bf16"


def test_the_least_time_counts() -> None:
    assert 0 <= seconds(lambda: None) < 1
