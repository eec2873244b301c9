from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.fuse import (
    LISTED,
    OURS,
    STACKED,
    FuseSettings,
    LiteralAdaptors,
    LiteralLayer,
    as_json,
    as_text,
    drawn_layer,
    measure_fuse,
)
from grappa_dist.models import GrappaLayer, create_backbone
from tests import reference

TINY = FuseSettings(batch=2, tokens=5, dim=64, sets=3, bottleneck=4, depth=1, repeats=1, threads=1)


def test_both_sides_are_timed_and_found_to_agree() -> None:
    lines: list[str] = []
    findings = measure_fuse(TINY, lines.append)
    assert [f.name for f in findings.layer] == [f.name for f in findings.model] == [OURS, STACKED, LISTED]
    assert findings.difference < 1e-5
    text = as_text({"command": "here"}, TINY, findings)
    assert all(side in text for side in (OURS, STACKED, LISTED))
    figures = as_json({}, TINY, findings)
    assert figures["layer"][0]["ratio"]["forward"] == 1
    assert len(lines) == 2


def test_the_layer_keeps_at_most_a_fifth_of_what_a_literal_one_keeps() -> None:
    settings = FuseSettings(batch=2, tokens=17, dim=384, sets=8, bottleneck=64, depth=1, repeats=1, threads=1)
    findings = measure_fuse(settings, lambda line: None)
    ours, *literal = findings.layer
    assert all(5 * ours.kept <= side.kept for side in literal)
    assert ours.kept >= 4 * 2 * 17 * 8 * 64  # what enters the GELU


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_the_baseline_is_algorithm_1_and_opens_the_block_as_it_should(form: str) -> None:
    draws = torch.Generator().manual_seed(0)
    adaptors, attention = drawn_layer(TINY, draws)
    block = create_backbone(
        "timm:vit_small_patch16_224", {"embed_dim": 64, "num_heads": 1, "depth": 1}, {}, pretrained=False
    ).blocks[0]
    tokens = torch.randn(2, 5, 64, generator=draws)
    literal = LiteralLayer(block, getattr(LiteralAdaptors(adaptors, attention), form))
    ours = GrappaLayer(block, adaptors, attention)
    torch.testing.assert_close(ours(tokens), literal(tokens), rtol=1e-5, atol=1e-5)
    downs, ups, q, k = _modules(adaptors, attention)
    torch.testing.assert_close(
        literal(tokens), reference.grappa_layer(tokens, block, downs, ups, q, k), rtol=1e-5, atol=1e-5
    )


def _modules(adaptors, attention):  # type: ignore[no-untyped-def]
    """The same weights as linear layers."""

    def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.weight.data.copy_(weight)
        if bias is not None:
            made.bias.data.copy_(bias)
        return made

    sets = [adaptors.tensors(i) for i in range(adaptors.num_sets)]
    downs = [linear(s["down.weight"], s["down.bias"]) for s in sets]
    return downs, [linear(s["up.weight"], s["up.bias"]) for s in sets], linear(attention.query), linear(attention.key)


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("repeats", 0), ("dim", 100)])
def test_a_wrong_setting_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be"):
        FuseSettings(**{**vars(TINY), name: value}).check()


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device cuda: torch sees no GPU here$"):
        measure_fuse(replace(TINY, device="cuda"), lambda line: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_in_bfloat16_and_compared_in_float32() -> None:
    settings = replace(TINY, device="cuda")
    findings = measure_fuse(settings, lambda line: None)
    assert findings.difference < 1e-4
    assert "bfloat16" in as_text({"command": "here"}, settings, findings)
