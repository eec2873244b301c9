from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from grappa_dist.data.transforms import Preprocess
from grappa_dist.export import Transform
from grappa_dist.formats.checking import check, generated, images_to_check

TRANSFORM = Transform(Preprocess(image_size=16))


def embed(images: Tensor) -> Tensor:
    return torch.nn.functional.normalize(images.flatten(1) + 0.1, dim=1)


def images(count: int) -> list[Tensor]:
    return list(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("count", "sizes"), [(1, (1,)), (21, (1, 3, 17)), (60, (1, 3, 17, 32, 7))])
def test_all_images_are_compared_in_batches_of_several_sizes(count: int, sizes: tuple[int, ...]) -> None:
    seen: list[int] = []

    def exported(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return embed(batch)

    found = check(embed, exported, images(count), "noise", "fp32")
    assert (found.images, found.batch_sizes, tuple(seen)) == (count, sizes, sizes)
    assert found.min_cosine == pytest.approx(1)
    assert "minimum cosine 1.0000000" in found.describe()


def turned(degrees: float, row: int, batch: Tensor) -> Tensor:
    """The embeddings, with that of one image turned by an angle; of the first three only the third batch."""
    z = embed(batch)
    if len(batch) == 17:
        other = torch.zeros_like(z[row])
        other[0], other[1] = -z[row, 1], z[row, 0]
        other /= other.norm()
        z[row] = math.cos(math.radians(degrees)) * z[row] + math.sin(math.radians(degrees)) * other
    return z


@pytest.mark.parametrize(
    ("dtype", "degrees", "right"), [("fp32", 0.7, True), ("fp32", 0.9, False), ("bf16", 2.7, False)]
)
def test_one_image_that_differs_is_enough_to_refuse(dtype: str, degrees: float, right: bool) -> None:
    def compare() -> float:
        return check(embed, lambda b: turned(degrees, 5, b), images(40), "noise", dtype).min_cosine  # type: ignore[arg-type]

    if right:
        assert compare() == pytest.approx(math.cos(math.radians(degrees)), abs=1e-6)
        return
    with pytest.raises(ValueError, match=r"differs from the model: on image 10 of noise its cosine is 0\.99"):
        compare()


@pytest.mark.parametrize("scale", [2.0, math.nan, 0.0])
def test_what_is_no_unit_vector_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="differs from the model: on image 1 of noise"):
        check(embed, lambda batch: embed(batch) * scale, images(2), "noise", "fp32")


def test_generated_images_are_the_same_in_every_call_and_differ() -> None:
    first, second = (list(map(TRANSFORM, generated(8))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({image.numpy().tobytes() for image in first}) == 8


def test_images_of_a_folder_are_seen_as_the_model_sees_them_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    picture = next(generated(1))
    picture.save(tmp_path / "a.png")
    Image.new("L", (30, 50), 200).save(tmp_path / "c.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    found, source = images_to_check([str(tmp_path)], 5, TRANSFORM)
    first, second = found
    assert torch.equal(first, TRANSFORM(picture))
    assert (second.shape, source) == ((3, 16, 16), "the given images")
    assert len(list(images_to_check([str(tmp_path)], 1, TRANSFORM)[0])) == 1
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").unlink()
    with pytest.raises(ValueError, match="of the given images none can be read"):
        check(embed, embed, images_to_check([str(tmp_path)], 5, TRANSFORM)[0], "the given images", "fp32")
