from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data import decoding, transforms
from grappa_dist.data.decoding import decode, open_picture


def test_the_probe_is_a_plain_jpeg_that_both_decoders_read_alike() -> None:
    assert decoding._plain_jpeg(transforms._JPEG) is not None
    pixels = open_picture(transforms._JPEG).pixels()
    assert pixels.shape == (26, 34, 3)
    assert pixels.std() > 20
    assert np.array_equal(pixels, np.asarray(decode(transforms._JPEG)))


def test_other_pixels_of_any_step_and_other_arithmetic_of_ours_give_another_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen() -> str:
        return transforms.pixels_class.__wrapped__()

    classes = [seen(), transforms.pixels_class()]
    assert len(set(classes)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(transforms, "PIXELS_VERSION", transforms.PIXELS_VERSION + 1)
        classes.append(seen())
    with monkeypatch.context() as patch:
        fast = decoding.simplejpeg.decode_jpeg
        patch.setattr(decoding.simplejpeg, "decode_jpeg", lambda data, **how: fast(data, fastupsample=True, **how))
        classes.append(seen())
    with monkeypatch.context() as patch:
        whole = Image.Image.resize
        patch.setattr(Image.Image, "resize", lambda self, size, *how, **more: whole(self, size))
        classes.append(seen())
    assert len(set(classes)) == 4


def test_the_class_does_not_depend_on_the_vector_instructions_of_the_processor() -> None:
    code = "from grappa_dist.data.transforms import pixels_class; print(pixels_class())"
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == transforms.pixels_class(), done.stderr
