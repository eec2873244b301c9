"""What the parts of a training view cost: `python -m tests.data.parts` prints microseconds of a thread.

The least of some repeats counts. Decoders and resizers take turns, so that a busy machine does not favour one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from grappa_dist.data.decoding import decode, open_picture
from grappa_dist.data.rng import view_generator
from grappa_dist.data.transforms import Preprocess, draw_crop
from tests.data.test_decoding import encoded, picture

REPEATS, SIDE = 60, 224


def parts() -> dict[str, Callable[[], object]]:
    """By name, in the order of the table."""
    image, small = picture(500, 375), picture(128, 128)
    files = {
        "500 x 375": encoded(image, "JPEG", quality=90),
        "128 x 128": encoded(small, "JPEG", quality=90),
        "500 x 375, progressive": encoded(image, "JPEG", quality=90, progressive=True),
    }
    found: dict[str, Callable[[], object]] = {}
    for name, data in files.items():
        found[f"decode {name}: Pillow"] = lambda data=data: decode(data)  # type: ignore[misc]
        found[f"decode {name}: ours"] = lambda data=data: open_picture(data).pixels()  # type: ignore[misc]
    crop, view = image.crop((40, 30, 440, 330)), Preprocess(SIDE, "squash", "bicubic")
    pixels = np.array(crop)
    batch = torch.from_numpy(np.array(crop.resize((SIDE, SIDE))))[None].permute(0, 3, 1, 2)
    mirrored = np.array(crop.resize((SIDE, SIDE)))
    found[f"resize 400 x 300 to {SIDE}, bicubic: Pillow"] = lambda: crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    found[f"resize 400 x 300 to {SIDE}, bicubic: ours"] = lambda: view._resized(pixels, SIDE, SIDE)
    found["mirror: numpy"] = lambda: np.ascontiguousarray(mirrored[:, ::-1])
    found["mirror: torch"] = lambda: batch.flip(3)
    found["random numbers of a view, and its crop"] = lambda: draw_crop(500, 375, 0.08, view_generator(0, 0, 1, 0))
    return found


def microseconds(things: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Thread time of each, the least of some repeats in turn."""
    torch.set_num_threads(1)
    best = dict.fromkeys(things, float("inf"))
    for _ in range(repeats):
        for name, thing in things.items():
            start = time.thread_time_ns()
            thing()
            best[name] = min(best[name], (time.thread_time_ns() - start) / 1000)
    return best


if __name__ == "__main__":
    for name, value in microseconds(parts(), REPEATS).items():
        print(f"{name:50} {value:8.0f} us")
