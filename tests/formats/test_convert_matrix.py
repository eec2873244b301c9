"""Every variant and every family of backbones in every format and type, each compared on 1,000 images: minutes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grappa_dist.export import Transform
from grappa_dist.formats import exportable as exporting
from grappa_dist.formats import onnx
from grappa_dist.formats.checking import CHECK_IMAGES, NEEDED, check, images_to_check
from grappa_dist.formats.exportable import Dtype, Exportable, trace
from tests.formats.models import SETS, model
from tests.models import tiny
from tests.models.test_grappa_whole import FAMILIES

FAMILY_NAMES = [f"timm:{name}" for name in FAMILIES]


@cache
def images_of(transform: Transform) -> list[Tensor]:
    return list(images_to_check([], CHECK_IMAGES, transform)[0])


def least_cosines(name: str, variant: str, dtype: Dtype, folder: Path) -> dict[str, float]:
    """The minimum cosine of .pt2 and of ONNX with the model."""
    whole, found = model(name, variant), {}
    exportable = Exportable(whole, dtype)
    traced, images = trace(exportable, name), images_of(whole.transform)
    exporting.write(traced, folder / "model.pt2", {})
    found["torch"] = check(whole, exporting.read(folder / "model.pt2"), images, "generated", dtype).min_cosine
    narrow = dtype == "bf16"
    if narrow:
        traced = trace(Exportable(whole, dtype, computes="fp32"), name)
    about = {"outputs": [{"name": output} for output in exportable.outputs]}
    onnx.write(traced, folder / "model.onnx", about, narrow=narrow)
    found["onnx"] = check(whole, onnx.read(folder / "model.onnx"), images, "generated", dtype).min_cosine
    return found


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, "own"])
def test_every_family_in_every_format_and_type(name: str, dtype: Dtype, tmp_path: Path) -> None:
    found = least_cosines(name, "neighbours", dtype, tmp_path)
    print(f"MATRIX {name} neighbours {dtype}", " ".join(f"{to} {cosine:.7f}" for to, cosine in found.items()))
    assert min(found.values()) >= NEEDED[dtype]


@pytest.mark.long
@pytest.mark.parametrize("name", [tiny.TIMM, "timm:vit_small_patch16_dinov3", "own"])
@pytest.mark.parametrize("variant", [variant for variant in SETS if variant != "neighbours"])
def test_every_variant_in_every_format(variant: str, name: str, tmp_path: Path) -> None:
    found = least_cosines(name, variant, "fp32", tmp_path)
    print(f"MATRIX {name} {variant} fp32", " ".join(f"{to} {cosine:.7f}" for to, cosine in found.items()))
    assert min(found.values()) >= NEEDED["fp32"]


@pytest.mark.parametrize("variant", SETS)
def test_every_variant_of_these_tests_is_a_model_of_its_own(variant: str) -> None:
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    others = [model("own", other)(given) for other in SETS if other != variant]
    assert all(not torch.allclose(model("own", variant)(given), other, atol=1e-4) for other in others)
