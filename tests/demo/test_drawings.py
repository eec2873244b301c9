from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections import defaultdict

import pytest
from PIL import Image

from grappa_dist.demo.drawings import MAX_MONSTERS, SPECIES, Drawing, draw, monster_name, picture, sizes, tasks

SMALL = 0.05


@pytest.fixture(scope="module")
def small() -> list[Drawing]:
    return list(draw(SMALL, seed=3))


def digest(drawings: list[Drawing]) -> str:
    return hashlib.sha256(b"".join(one.encoded + one.label.encode() for one in drawings)).hexdigest()


def test_a_second_process_draws_the_same_bytes(small: list[Drawing]) -> None:
    code = (
        "import hashlib; from grappa_dist.demo.drawings import draw; "
        f"print(hashlib.sha256(b''.join(d.encoded + d.label.encode() for d in draw({SMALL}, seed=3))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == digest(small)


def test_a_picture_depends_on_its_identity_and_on_nothing_drawn_before() -> None:
    for task in tasks():
        label = task.labels[3]
        alone = picture(5, task.name, label, 7).tobytes()
        for _ in draw(0.001, seed=11):
            pass
        assert picture(5, task.name, label, 7).tobytes() == alone
        others = [
            picture(6, task.name, label, 7),
            picture(5, task.name, task.labels[4], 7),
            picture(5, task.name, label, 8),
        ]
        assert alone not in [other.tobytes() for other in others]


def test_a_larger_collection_contains_the_smaller_kinds_and_species() -> None:
    def drawn(scale: float) -> set[bytes]:
        return {one.encoded for one in draw(scale) if one.task != "instances" and one.split == "test"}

    assert drawn(0.03) <= drawn(0.06)


@pytest.mark.parametrize("scale", [0.001, 0.05, 0.06])
def test_sizes_agrees_with_what_is_drawn(scale: float) -> None:
    counts = {"train": 0, "test": 0}
    for one in draw(scale):
        counts[one.split] += 1
    assert counts == sizes(scale)


def test_the_full_collection_has_the_promised_size() -> None:
    assert sizes() == {"train": 1410, "test": 896}


@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0])
def test_the_first_half_of_the_sorted_classes_trains_and_the_other_half_tests(scale: float) -> None:
    for task in tasks(scale):
        train, test = task.classes("train"), task.classes("test")
        assert train + test == sorted({*train, *test})
        assert 0 <= len(train) - len(test) <= 1


def test_every_class_can_be_retrieved(small: list[Drawing]) -> None:
    images: defaultdict[tuple[str, str], int] = defaultdict(int)
    for one in small:
        images[one.task, one.label] += 1
    assert min(images.values()) >= 2


def test_images_decode_to_the_promised_size_and_no_two_are_alike(small: list[Drawing]) -> None:
    formats = {"jpg": "JPEG", "png": "PNG"}
    for one in small:
        image = Image.open(io.BytesIO(one.encoded))
        assert (image.size, image.mode, image.format) == ((48, 48), "RGB", formats[one.suffix])
    assert len({one.encoded for one in small}) == len(small)


def test_no_two_species_share_their_traits() -> None:
    assert len(set(SPECIES.values())) == len(SPECIES) == 24


def test_no_two_monsters_share_a_name() -> None:
    assert len({monster_name(index) for index in range(MAX_MONSTERS)}) == MAX_MONSTERS


def test_a_monster_beyond_the_last_name_is_refused() -> None:
    with pytest.raises(ValueError, match=f"from 0 to {MAX_MONSTERS - 1}, got {MAX_MONSTERS}"):
        monster_name(MAX_MONSTERS)


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be above 0, got 0"):
        sizes(0)


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="no class 'unicorns' in task 'kinds'"):
        picture(0, "kinds", "unicorns", 0)
    with pytest.raises(ValueError, match="in task 'colours'"):
        picture(0, "colours", "red", 0)
