"""Test and training views of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.decoding import Picture, open_picture
from grappa_dist.data.rng import view_generator
from grappa_dist.data.transforms import Preprocess, draw_crop
from tests.data.test_decoding import encoded, picture


@pytest.mark.parametrize("size", [(100, 60), (60, 101), (33, 33), (500, 320), (20, 31), (1, 1), (37, 900)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("crop_share", [1.0, 0.875])
def test_the_centre_crop_is_resize_then_crop(size: tuple[int, int], interpolation: str, crop_share: float) -> None:
    image, side = picture(*size), 32
    shorter = int(side / crop_share)
    scaled = tuple(shorter if edge == min(size) else int(shorter * edge / min(size)) for edge in size)
    left, top = (round((edge - side) / 2.0) for edge in scaled)
    resized = image.resize(scaled, Image.Resampling[interpolation.upper()])  # type: ignore[arg-type]
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=int)
    found = Preprocess(side, "crop", interpolation, crop_share).test(image)
    assert found.shape == (side, side, 3)
    assert found.dtype == np.uint8
    if interpolation != "nearest":  # torch's weights and ours for long images: one grey level away at most
        assert np.abs(found - expected).max() <= 1
        assert np.abs(found - expected).mean() < 0.05
    elif max(size) < 8 * min(size):
        assert np.array_equal(found, expected)


def test_squash_keeps_the_whole_image() -> None:
    image = picture(50, 20)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(Preprocess(16, "squash").test(image) - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_pillows_to_one_grey_level(interpolation: str) -> None:
    method = Image.Resampling[interpolation.upper()]
    rng = np.random.default_rng(0)
    for size, side in (((640, 480), 224), ((30, 50), 96), ((9000, 8), 64), ((224, 224), 224), ((2, 1), 7)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        found = Preprocess(side, "squash", interpolation).test(image).astype(int)
        assert np.abs(found - np.asarray(image.resize((side, side), method), dtype=int)).max() <= 1


def test_a_very_long_image_costs_no_more_than_its_crop() -> None:
    for size in ((1, 20_000), (20_000, 1), (3, 2)):
        preprocess = Preprocess(224)
        assert preprocess.test(Image.new("RGB", size)).shape == (224, 224, 3)
        assert preprocess.augment(Image.new("RGB", size), view_generator(0, 0, 0, 0), 0.1).shape == (224, 224, 3)


def test_a_grey_or_transparent_pil_image_is_taken_as_it_is() -> None:
    for mode in ("L", "RGBA", "P"):
        assert Preprocess(8).test(picture(9, 8).convert(mode)).shape == (8, 8, 3)


def test_an_augmentation_is_a_function_of_seed_epoch_row_and_view() -> None:
    image, preprocess = picture(64, 48), Preprocess(16)

    def view(*name: int) -> bytes:
        return preprocess.augment(image, view_generator(*name), 0.2).tobytes()

    assert view(1, 2, 3, 4) == view(1, 2, 3, 4)
    names = [(1, 2, 3, 4), (0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 2**40, 4), (2, 1, 3, 4)]
    assert len({view(*name) for name in names}) == len(names)


def test_an_augmentation_is_a_crop_of_whole_pixels_resized_and_perhaps_mirrored() -> None:
    image = picture(80, 60)
    crop = draw_crop(80, 60, 0.3, view_generator(0, 0, 5, 0))
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    resized = image.crop(box).resize((24, 24), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else resized, dtype=int)
    found = Preprocess(24).augment(image, view_generator(0, 0, 5, 0), 0.3)
    assert np.abs(found - expected).max() <= 1


def test_several_views_of_an_image_are_those_that_one_by_one_would_be() -> None:
    image, preprocess = open_picture(encoded(picture(60, 50), "JPEG")), Preprocess(32)
    both = preprocess.views(image, [view_generator(0, 0, 9, view) for view in (0, 1)], 0.25)
    for view in (0, 1):
        assert np.array_equal(both[view], preprocess.augment(image, view_generator(0, 0, 9, view), 0.25))


@pytest.mark.parametrize(("side", "shrink"), [(201, 1), (200, 2), (101, 2), (100, 4), (50, 8), (3, 8)])
def test_large_images_are_decoded_smaller_for_training_and_never_for_tests(side: int, shrink: int) -> None:
    whole, asked = open_picture(encoded(picture(400, 400), "JPEG", quality=95)), []

    def read(shrink: int) -> np.ndarray:
        asked.append(shrink)
        return whole.pixels(shrink)

    watched, preprocess = Picture(400, 400, read), Preprocess(side)
    found = preprocess.augment(watched, view_generator(0, 0, 0, 0), 1.0)  # the crop is the image
    assert asked == [shrink]
    full = preprocess.augment(picture(400, 400), view_generator(0, 0, 0, 0), 1.0).astype(int)
    assert np.abs(found - full).mean() < 4  # another low-pass filter, the same picture
    preprocess.test(watched)
    assert asked == [shrink, 1]


def test_augmented_crops_keep_to_area_and_aspect_and_flip_half() -> None:
    width, height = 400, 300
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    place = np.stack([x * 255 / width, y * 255 / height, 0 * x], axis=2).astype(np.uint8)
    preprocess, flips, areas = Preprocess(64, interpolation="nearest"), 0, []
    for row in range(200):
        pixels = preprocess.augment(Image.fromarray(place), view_generator(0, 0, row, 0), 0.3).astype(float)
        across, down = pixels[0, -1, 0] - pixels[0, 0, 0], pixels[-1, 0, 1] - pixels[0, 0, 1]
        flips += across < 0
        w, h = (abs(across) * 64 / 63 + 2) * width / 255, (down * 64 / 63 + 2) * height / 255
        areas.append(w * h / (width * height))
        assert 0.70 < w / h < 1.40
    assert 0.28 < min(areas) < 0.45
    assert 0.85 < max(areas) < 1.05
    assert 70 < flips < 130


def test_wrong_settings_are_refused_by_name() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "resize": "pad"}, "resize"),
        ({"image_size": 8, "interpolation": "cubic"}, "interpolation"),
        ({"image_size": 8, "crop_share": 0.0}, "crop_share"),
    ]
    for settings, name in wrong:
        with pytest.raises(ValueError, match=name):
            Preprocess(**settings)
    with pytest.raises(ValueError, match="min_scale"):
        Preprocess(8).augment(picture(8, 8), view_generator(0, 0, 0, 0), 0.0)
