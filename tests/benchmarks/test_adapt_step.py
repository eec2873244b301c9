from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.adapt import (
    BOTTLENECK,
    AdaptSettings,
    StepFindings,
    learning_model,
    measure_step,
    random_images,
    step_json,
    step_operations,
    step_text,
    types_of_products,
)
from benchmarks.harness import Timing
from grappa_dist.models.precision import Precision

TINY = AdaptSettings(sets=2, backbone="vit_tiny_patch16_224", image_size=64, images=3, threads=1, steps=2, repeats=1)
DIM, DEPTH, PATCH = 192, 12, 16


def by_hand(settings: AdaptSettings) -> float:
    """Of the step with whole blocks, from the shapes of a ViT."""
    tokens = (settings.image_size // PATCH) ** 2 + 1
    images, rows = settings.images, settings.images * settings.sets  # an image, and an image as a set sees it
    patches = 2 * images * (tokens - 1) * DIM * 3 * PATCH**2
    linear = 2 * tokens * DIM * (3 * DIM + DIM + 8 * DIM)  # of a row: queries, keys and values, projection, MLP
    attention = 2 * 2 * tokens * tokens * DIM  # products with keys, then with values
    adaptor = 2 * tokens * DIM * BOTTLENECK  # one of its two matrices
    first = images * (linear + attention) + rows * (2 + 3) * adaptor  # nothing learns before its adaptor
    others = rows * (2 * linear + 3 * attention + (2 + 4) * adaptor)  # attention backward has four products
    return float(patches + first + (DEPTH - 1) * others)


def test_operations_are_those_of_the_matrix_products_of_a_vit() -> None:
    assert step_operations(TINY, class_token_only=False) == by_hand(TINY)
    assert 0.9 * by_hand(TINY) < step_operations(TINY) < 0.97 * by_hand(TINY)  # the last block for one token


@pytest.mark.long
def test_a_step_is_timed_and_held_against_the_limit_of_its_type() -> None:
    found = measure_step(TINY, lambda line: None)
    figures = step_json(TINY, found)
    assert len(figures["runs_s"]) == 2
    assert figures["dtype"] == "float32"
    assert figures["compiled"] == "not compiled"
    assert figures["images_per_s"] == pytest.approx(3 / min(figures["runs_s"]))
    assert 0 < figures["of_limit"] < 1


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), (None, torch.float32)])
def test_the_type_is_that_of_products_and_not_of_their_sums(precision: Precision | None, expected: torch.dtype) -> None:
    settings = replace(TINY, precision=precision)
    model = learning_model(settings)
    types = types_of_products(model)
    model(random_images(settings))
    assert types == {expected}


def test_the_share_is_of_the_fastest_step() -> None:
    found = StepFindings(Timing((2.0, 4.0), (2.0, 4.0)), 3e12, 6e12, "bfloat16", "compiled")
    text = step_text(TINY, found)
    assert "25.0%" in text
    assert "6.000 TFLOP/s in one large product in bfloat16; layers compiled" in text
