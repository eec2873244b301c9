from __future__ import annotations

import torch

from grappa_dist.demo import backbone


def test_the_weights_are_small_enough_to_ship() -> None:
    assert backbone.WEIGHTS_PATH.stat().st_size <= 4_000_000


def test_features_are_finite_and_of_the_stated_width() -> None:
    model = backbone.create()
    with torch.no_grad():
        features = model(torch.randn(3, 3, 48, 48))
    assert features.shape == (3, backbone.EMBED_DIM)
    assert features.isfinite().all()


def test_two_backbones_are_the_same_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = backbone.create()
    assert torch.equal(torch.get_rng_state(), before)
    other = backbone.create()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_backbone_is_ready_to_be_frozen() -> None:
    model = backbone.create()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_timm_finds_the_normalisation() -> None:
    model = backbone.create()
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 48, 48)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 1.0)
