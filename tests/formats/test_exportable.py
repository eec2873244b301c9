from __future__ import annotations

import pytest
import torch
from torch import nn

from grappa_dist.data.transforms import Preprocess
from grappa_dist.export import RetrievalModel
from grappa_dist.formats.exportable import Exportable, describe_preprocess, trace
from grappa_dist.models import Backbone, Grappa
from tests.formats.models import BOTTLENECK, model
from tests.models import tiny
from tests.models.odd import Function


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("name", "variant"),
    [(tiny.TIMM, "neighbours"), (tiny.TIMM, "gallery"), ("own", "average"), ("own", "k=4"), ("own", "backbone")],
)
def test_the_graph_gives_the_embeddings_of_the_model_for_any_batch_size(name: str, variant: str) -> None:
    whole = model(name, variant)
    graph = trace(Exportable(whole), name).module()
    for count in (1, 3, 17):
        z, *weights = graph(images(count))
        torch.testing.assert_close(z, whole(images(count)), rtol=1e-5, atol=1e-6)
        assert len(weights) == (variant == "neighbours")
        for found in weights:
            torch.testing.assert_close(found, whole.attention(images(count)), rtol=1e-5, atol=1e-6)


def test_a_graph_holds_no_path_of_this_machine_and_writes_nothing_in_place() -> None:
    traced = trace(Exportable(model()), "tiny")
    assert not [node for node in traced.graph.nodes if "stack_trace" in node.meta]
    assert not [node for node in traced.graph.nodes if str(node.target).split(".")[0].endswith("_")]


def test_other_types_round_the_weights_and_leave_the_model_as_it_is() -> None:
    whole = model()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for kind in (torch.float16, torch.bfloat16):
        half = Exportable(whole, "fp16" if kind == torch.float16 else "bf16")
        assert {p.dtype for p in half.grappa.parameters()} == {kind}
        z, weights = half(images(3))
        assert (z.dtype, weights.dtype) == (torch.float32, torch.float32)
        assert 0.999 < torch.cosine_similarity(z, whole(images(3))).min() < 1 - 1e-9
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    rounded = Exportable(whole, "bf16", computes="fp32")
    assert {p.dtype for p in rounded.grappa.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


def test_a_backbone_whose_code_depends_on_its_numbers_is_named() -> None:
    vit = tiny.create()
    vit.norm = Function("raises")  # type: ignore[assignment]
    whole = RetrievalModel(Grappa(Backbone(vit, Preprocess(image_size=32)), 0, BOTTLENECK, attention=False), [])
    with pytest.raises(ValueError, match=r"^the backbone odd: torch\.export cannot follow this backbone: .*\w+Error"):
        trace(Exportable(whole), "the backbone odd")


def test_the_fast_path_of_torchs_encoder_layers_is_put_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    trace(Exportable(model("own", "backbone")), "own")
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert isinstance(model("own").grappa.backbone.blocks[0].block, nn.TransformerEncoderLayer)


@pytest.mark.parametrize(("resize", "steps"), [("crop", 4), ("squash", 3)])
def test_preprocessing_is_stated_in_steps(resize: str, steps: int) -> None:
    found = describe_preprocess(Preprocess(image_size=224, resize=resize, crop_share=0.875))  # type: ignore[arg-type]
    assert (found["image_size"], found["resize"], len(found["steps"])) == (224, resize, steps)
    assert ("shorter side is 256" in found["steps"][1]) == (resize == "crop")
