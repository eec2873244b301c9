"""What files of each suffix become in a shard."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.decoding import (
    COPIED,
    REENCODED,
    REWRITTEN,
    TAKEN,
    decode,
    describe_missing_decoder,
    suffix_of,
)
from grappa_dist.data.index import IMAGE_SUFFIXES
from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.make_shards.sources import Encoded, encoded
from tests.data.test_decoding import picture


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "format"), [("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("gif", "GIF")])
def test_other_formats_become_png_of_the_same_pixels(suffix: str, format: str) -> None:
    image = picture(30, 20)
    shown = image.quantize(64) if format == "GIF" else image
    made = encoded(saved(shown, format), suffix, None)
    assert (made.suffix, made.bad) == ("png", None)
    assert made.data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.asarray(decode(made.data)), np.asarray(shown.convert("RGB")))
    smaller = encoded(saved(shown, format), suffix, 10)
    assert (smaller.suffix, Image.open(io.BytesIO(smaller.data)).size) == ("png", (15, 10))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_tiff_is_read_whatever_its_compression_and_mode(compression: str, mode: str) -> None:
    image = picture(30, 20).convert(mode)
    made = encoded(saved(image, "TIFF", compression=compression), "tif", None)
    expected = np.asarray(image.convert("RGB")).astype(int)
    tolerance = 80 if compression == "jpeg" else 0  # noise at quality 75
    assert np.abs(np.asarray(decode(made.data)).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_upright_as_a_jpeg_is(orientation: int) -> None:
    image, exif = picture(30, 20), Image.Exif()
    exif[0x0112] = orientation
    made = decode(encoded(saved(image, "TIFF", exif=exif), "tif", None).data)
    jpeg = decode(saved(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert made.size == jpeg.size
    assert np.abs(np.asarray(made).astype(int) - np.asarray(jpeg)).mean() < 3  # a wrong turn is above 50


def test_deep_tiff_is_scaled_and_of_many_pages_the_first_is_taken() -> None:
    grey = Image.fromarray(np.array([[0, 300, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(decode(encoded(saved(grey, "TIFF"), "tiff", None).data))[0, :, 0].tolist() == [0, 1, 128, 255]
    pages = saved(Image.new("RGB", (4, 4), "red"), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert decode(encoded(pages, "tif", None).data).getpixel((0, 0)) == (255, 0, 0)


def test_what_cannot_be_rewritten_is_kept_and_reported() -> None:
    whole = saved(picture(30, 20), "TIFF")
    floats = saved(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")
    assert "floating-point pixels" in (encoded(floats, "tif", None).bad or "")
    for data in (whole[:300], whole[: len(whole) // 2], b"text"):
        made = encoded(data, "tif", None)
        assert (made.data, made.suffix) == (data, "png")
        assert made.bad


def test_copies_keep_their_bytes_and_empty_files_are_reported_without_decoding() -> None:
    assert [encoded(b"any", suffix, None) for suffix in ("jpeg", "jfif")] == [
        Encoded(b"any", "jpeg"),
        Encoded(b"any", "jpg"),
    ]
    assert encoded(b"", "jpg", None).bad == "empty file"
    assert set(COPIED.values()) == set(IMAGE_SUFFIXES)
    assert set(TAKEN) == {*COPIED, *REWRITTEN, *REENCODED}


def test_a_folder_of_all_kinds_becomes_shards_that_decode_within_the_size_asked_for(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "jfif": "JPEG", "PNG": "PNG", "webp": "WEBP", "BMP": "BMP", "gif": "GIF", "tiff": "TIFF"}
    (tmp_path / "pile").mkdir()
    for number in range(42):
        suffix, format = list(kinds.items())[number % len(kinds)]
        (tmp_path / "pile" / f"{number}.{suffix}").write_bytes(saved(picture(40, 30), format))
    (tmp_path / "pile" / "a.mp4").write_bytes(b"")
    (tmp_path / "pile" / "README").write_bytes(b"")
    logged: list[str] = []
    cfg = CollectionConfig(split="none", shard_bytes=40_960)
    make_shards([(None, str(tmp_path / "pile"))], tmp_path / "out", cfg, Work(1, logged.append))
    images = ImageShards.open([tmp_path / "out" / "train"], None)
    assert {decode(images.image_bytes(row)).size for row in range(len(images))} == {(40, 30)}
    assert sorted(images.name(row).partition(".")[2] for row in range(len(images))) == sorted([*kinds] * 6)
    assert all(shard.bytes <= 1.3 * 40_960 for shard in images.shards)
    assert {"left out: 1 file, of the suffix '.mp4' (a.mp4)", "left out: 1 file, without a suffix (README)"} <= set(
        logged
    )
    assert sum(line.startswith("taken are files ending in jpg, jpeg, png, ") for line in logged) == 1


@pytest.mark.parametrize(("suffix", "format"), [("heic", "HEIF"), ("heif", "HEIF"), ("avif", "AVIF")])
def test_photos_of_phones_become_jpeg_upright(suffix: str, format: str) -> None:
    assert describe_missing_decoder(suffix) == ""
    image, exif = Image.new("RGB", (64, 48), "white"), Image.Exif()
    image.paste((200, 30, 30), (0, 0, 32, 24))
    exif[0x0112] = 6
    data = saved(image, format, exif=exif.tobytes(), quality=90)
    assert suffix_of(data) == ("avif" if suffix == "avif" else "heic")
    made = encoded(data, suffix, None)
    assert (made.suffix, made.bad) == ("jpg", None)
    shown = np.asarray(decode(made.data)).astype(int)
    assert np.abs(shown - np.asarray(image.transpose(Image.Transpose.ROTATE_270))).mean() < 5
    assert Image.open(io.BytesIO(encoded(data, "", 24).data)).size == (24, 32)  # told by its content
    cut = encoded(data[: len(data) // 2], suffix, None)
    assert (cut.suffix, bool(cut.bad)) == ("jpg", True)


def test_avif_is_read_where_nothing_reads_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (64, 48), "white"), "AVIF")
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)  # pillow-heif adds it, once the first HEIC is seen
    made = encoded(data, "avif", None)
    assert (made.suffix, made.bad) == ("jpg", None)


def test_without_their_decoder_photos_are_left_out_by_name_with_the_install_line_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.HEIC").write_bytes(b"x")
    (tmp_path / "photos" / "1.png").write_bytes(saved(picture(8, 8), "PNG"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    describe_missing_decoder.cache_clear()
    lines = list[str]()
    try:
        cfg = CollectionConfig(split="none")
        make_shards([(None, str(tmp_path / "photos"))], tmp_path / "out", cfg, Work(1, lines.append))
        assert encoded(b"x", "heic", None).bad == "HEIC, which needs pillow-heif: pip install 'grappa-dist[heif]'"
    finally:
        describe_missing_decoder.cache_clear()
    needs = "HEIC, which needs pillow-heif: pip install 'grappa-dist[heif]'"
    assert f"left out: 5 files, {needs} (0.HEIC, 1.HEIC, 2.HEIC, ...)" in lines
    assert f"all of them by name: {tmp_path / 'out' / 'left_out.csv'}" in lines
    assert (tmp_path / "out" / "left_out.csv").read_text().count("HEIC, which needs") == 5
    assert len(ImageShards.open([str(tmp_path / "out" / "train")], None)) == 1
