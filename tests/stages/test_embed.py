from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.checksums import MANIFEST, forget
from grappa_dist.config import BackboneConfig, Config
from grappa_dist.console import read_events
from grappa_dist.data import shards
from grappa_dist.data.decoding import decode
from grappa_dist.data.loader import load_images
from grappa_dist.data.open_images import open_images
from grappa_dist.data.shards import ChangedImage, ImageShards
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, ModelSpec, build, build_backbone, preprocess_of
from grappa_dist.stages.bad_rows import bad_reasons, bad_rows, check_bad_share
from grappa_dist.stages.embed import (
    MOST_SHARDS,
    SUMS_FILE,
    Embedding,
    EmbedTask,
    embed,
    embed_rows,
    embed_shards,
    embed_side_by_side,
    feature_rows,
    features_of,
    held_against,
    tasks_of,
    to_images,
)
from tests.conftest import Bucket
from tests.data.test_decoding import encoded, picture, png_header
from tests.data.written import write_tar
from tests.stages import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny.config(tiny.write_shards(tmp_path_factory.mktemp("images")))


def embed_in(root: Path, settings: Config) -> tuple[tiny.Here, ImageShards, tuple[Artifact, ...]]:
    images, here = ImageShards.open(settings.data.train, None), tiny.Here()
    run, spec = tiny.run_in(settings, root, here), ModelSpec("backbone", settings.backbone)
    features = features_of(run.store, spec, settings.embed, images)
    embed(run, images, spec, features)
    return here, images, features


def test_a_row_of_features_belongs_to_the_image_of_that_row(settings: Config, tmp_path: Path) -> None:
    _, images, features = embed_in(tmp_path, settings)
    model = build(ModelSpec("backbone", settings.backbone), tiny.CPU)
    preprocess = preprocess_of(model)
    z = feature_rows(images, features).take(np.arange(tiny.NUM_ROWS))
    for row in (0, 12, 13, 14, 31, tiny.NUM_ROWS - 1):
        pixels = preprocess.test(decode(images.image_bytes(row)))[None]
        with torch.inference_mode():
            alone = F.normalize(model(to_images(pixels, tiny.CPU)), dim=1)[0].numpy()
        np.testing.assert_allclose(z[row], alone, atol=1e-5)
    assert len(np.unique(z.round(4), axis=0)) == tiny.NUM_ROWS


def change(images: ImageShards, row: int, offset: int = 5) -> None:
    """Flips a bit of an image in its tar, whose size and times stay."""
    shard, position = images.locate(row)
    tar, place = images.shards[shard].path, images.index(shard)[position]
    before = os.stat(tar)
    with open(tar, "r+b") as file:
        file.seek(int(place["offset"]) + offset)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_image_that_has_changed_since_it_was_embedded_is_named_by_whatever_reads_it(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"))
    _, opened, features = embed_in(tmp_path / "run", settings)
    images = held_against(opened, features)
    assert images.check_images() == tiny.NUM_ROWS
    change(images, 15)
    for row in range(tiny.NUM_ROWS):
        if row != 15:
            images.image_bytes(row)
    expected = rf"part2.*image '{images.key(15)}'.* its bytes are not those that its features were made of .*Restore it"
    readers: list[Callable[[], object]] = [
        lambda: images.image_bytes(15),
        lambda: images.part(images.locate(15)[0]).images([15 - int(images.starts[images.locate(15)[0]])]).__next__(),
        lambda: load_images(images, [14, 15], lambda picture, row: np.zeros((1,), np.uint8), (1,)),
        images.check_images,
        lambda: embed_shards(tiny.CPU, [task_of(images, settings, Store(tmp_path / "other"), name="k=4")]),
    ]
    for read in readers:
        with pytest.raises(ChangedImage, match=expected):
            read()
    for artifact in features:  # of an earlier version
        (artifact.path / SUMS_FILE).unlink()
    forget()
    shards._SUMS.clear()
    assert images.check_images() == 0
    images.image_bytes(15)


def test_an_image_that_is_read_wrongly_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"))
    _, opened, features = embed_in(tmp_path / "run", settings)
    images = held_against(opened, features)
    right, real, reads = images.image_bytes(15), ImageShards._read, list[int]()

    def read(self: ImageShards, shard: int, offset: int, size: int) -> bytes:
        reads.append(offset)
        data = real(self, shard, offset, size)
        return data if len(reads) > 1 else bytes([data[0] ^ 1]) + data[1:]

    monkeypatch.setattr(ImageShards, "_read", read)
    assert images.image_bytes(15) == right
    assert len(reads) == 2


def task_of(images: ImageShards, settings: Config, store: Store, name: str) -> EmbedTask:
    """The embedding of the shard of row 15 by a model of that name."""
    shard, spec = images.locate(15)[0], ModelSpec(name, settings.backbone)
    artifact = features_of(store, spec, settings.embed, images)[shard]
    return EmbedTask(images.part(shard), int(images.starts[shard]), ((spec, artifact),), Embedding(4, 2))


def test_images_that_are_not_embedded_yet_are_read_and_compared_with_nothing(tmp_path: Path) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images"))
    opened, spec = ImageShards.open(settings.data.train, None), ModelSpec("backbone", settings.backbone)
    features = features_of(Store(tmp_path / "run"), spec, settings.embed, opened)
    images = held_against(opened, features)
    assert images.check_images() == 0
    images.image_bytes(15)
    embed(tiny.run_in(settings, tmp_path / "run", tiny.Here()), images, spec, features)
    assert images.check_images() == tiny.NUM_ROWS


def test_a_bad_row_is_zero_and_listed_with_its_reason(settings: Config, tmp_path: Path) -> None:
    _, images, features = embed_in(tmp_path, settings)
    norms = np.linalg.norm(feature_rows(images, features).take(np.arange(tiny.NUM_ROWS)), axis=1)
    assert norms[tiny.BAD] == 0
    np.testing.assert_allclose(np.delete(norms, tiny.BAD), 1, atol=1e-6)
    assert bad_rows(images, features).tolist() == [tiny.BAD]
    assert "that can be read" in bad_reasons(images, features)[tiny.BAD]
    in_shard = json.loads((features[2].path / "bad.json").read_text())
    assert list(in_shard) == [str(tiny.BAD - 14)]


def test_a_shard_that_is_done_is_not_done_again(settings: Config, tmp_path: Path) -> None:
    first, _, _ = embed_in(tmp_path, settings)
    assert first.asked == ["embed_shards"] * 4
    before = tiny.files_below(tmp_path / "features")
    again, _, _ = embed_in(tmp_path, settings)
    assert again.asked == []
    more = tiny.write_shards(tmp_path / "more", (3,), bad=(), seed=1)
    longer = tiny.config([*settings.data.train, *more])
    grown, images, features = embed_in(tmp_path, longer)
    assert grown.asked == ["embed_shards"]
    assert len(images) == tiny.NUM_ROWS + 3
    assert before.items() < tiny.files_below(tmp_path / "features").items()
    assert all(f.complete for f in features)


def test_equal_shards_in_two_folders_are_embedded_once(tmp_path: Path) -> None:
    paths = [tiny.write_shards(tmp_path / name, (5,), bad=())[0] for name in ("a", "b")]
    here, images, features = embed_in(tmp_path / "run", tiny.config(paths))
    assert len(images) == 10
    assert here.asked == ["embed_shards"]
    z = feature_rows(images, features).take(np.arange(10))
    np.testing.assert_array_equal(z[:5], z[5:])


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (8, 9), (16, 23), (32, 32), (0, 39)])
def test_features_do_not_depend_on_what_else_is_in_the_padded_batch(settings: Config, start: int, stop: int) -> None:
    images = ImageShards.open(settings.data.train, None)
    model = build(ModelSpec("backbone", settings.backbone), tiny.CPU)

    def features(rows: np.ndarray) -> np.ndarray:
        found = np.full((len(rows), 16), np.nan, dtype=np.float32)
        for place, unit, bad in embed_rows(model, images, rows, device=tiny.CPU, how=Embedding(8, 0)):
            assert not bad
            found[place] = unit
        return found

    good = np.delete(np.arange(tiny.NUM_ROWS), tiny.BAD)
    np.testing.assert_array_equal(features(good[start:stop]), features(good)[start:stop])


def test_too_many_bad_images_name_the_first(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "images", (9, 11), bad=(12, 17))
    strict = tiny.config(paths, data={"max_bad_share": 0.09})
    message = (
        rf"2 of 20 images are bad \(2 x .*=0\.09 allows 2.*{re.escape('part-1/part1-000000.tar: image ')}'000000003'"
    )
    with pytest.raises(ValueError, match=message):
        embed_in(tmp_path / "run", strict)
    embed_in(tmp_path / "run", tiny.config(paths, data={"max_bad_share": 0.1}))


@pytest.mark.parametrize(("count", "total"), [(1, 1), (29, 100), (1, 3), (3, 136), (100, 100)])
def test_the_share_that_the_error_names_is_enough(tmp_path: Path, count: int, total: int) -> None:
    images = ImageShards.open(tiny.write_shards(tmp_path / "images", (total,), bad=range(total)), None)
    bad = dict.fromkeys(range(count), "why")
    with pytest.raises(ValueError, match="max_bad_share") as error:
        check_bad_share(images, bad, (count - 0.5) / total)
    (share,) = re.findall(r"reused with data\.max_bad_share=([\d.]+)$", str(error.value))
    check_bad_share(images, bad, float(share))
    assert count / total <= float(share) <= min(1, count / total + 0.0101)


def dirty_members() -> list[tuple[str, bytes]]:
    image, exif = picture(60, 40), Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(image, "JPEG")
    good = {
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "moving.webp": encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "turned.jpg": encoded(image, "JPEG", exif=exif),
        "wrong suffix.jpg": encoded(image, "PNG"),
        "caf\udce9.jpg": jpeg,
        "k.jpg": jpeg,
        "notes.txt": b"no image by its suffix",
        "k.tiff": b"nor this",
    }
    bad = {"empty.jpg": b"", "cut.jpg": jpeg[:500], "page.jpg": b"<html>404</html>", "bomb.png": png_header(9000, 9000)}
    return [*good.items(), *bad.items(), ("k.jpg", jpeg), ("last.jpg", jpeg)]


def test_dirt_is_kept_as_bad_rows_with_shard_and_key_and_stops_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "images" / "dirty.tar", dirty_members(), tarfile.GNU_FORMAT)
    whole = (tmp_path / "images" / "dirty.tar").read_bytes()
    (tmp_path / "images" / "dirty.tar").write_bytes(whole[: whole.rindex(encoded(picture(60, 40), "JPEG")) + 600])
    settings = tiny.config([str(tmp_path / "images")], data={"max_bad_share": 0.75})
    _, images, features = embed_in(tmp_path / "run", settings)
    found = {images.key(row): why for row, why in bad_reasons(images, features).items()}
    assert list(found) == ["empty", "cut", "page", "bomb", "k", "last", ""]
    assert (len(images), images.shards[0].ignored) == (15, 2)
    reasons = ("empty file", "runcated", "can be read", "pixels", "second", "cut off", "missing")
    assert all(part in why for part, why in zip(reasons, found.values(), strict=True)), found
    message = r"20 of 28 images are bad .*about 13 have no row.*dirty\.tar: image 'empty': empty file; .*'cut': "
    with pytest.raises(ValueError, match=message):
        embed_in(tmp_path / "run", tiny.config([str(tmp_path / "images")], data={"max_bad_share": 0.7}))


def test_images_without_a_row_count_as_bad_before_any_is_embedded(tmp_path: Path) -> None:
    jpeg = encoded(picture(60, 40), "JPEG")
    misnamed = {f"IMG.{number}.jpg": jpeg for number in range(3)}
    write_tar(tmp_path / "images" / "a.tar", {**{f"{row}.jpg": jpeg for row in range(9)}, **misnamed})
    cut = write_tar(tmp_path / "images" / "b.tar", {f"{row}.jpg": jpeg for row in range(9)})
    cut.write_bytes(cut.read_bytes()[: (len(jpeg) // 512 + 2) * 512 * 4 + 600])  # four images, and five rows and one
    strict = tiny.config([str(tmp_path / "images")], data={"max_bad_share": 0.4})
    message = r"8 of 23 images are bad \(about 8 have no row\).*: about 5 .*b\.tar: .*; 3 .*rename 'IMG\.0\.jpg' to "
    with pytest.raises(ValueError, match=message):
        embed_in(tmp_path / "run", tiny.config([str(tmp_path / "images")], data={"max_bad_share": 0.3}))
    assert not list((tmp_path / "run").glob("features/*"))
    with pytest.raises(ValueError, match=r"10 of 23 images are bad \(1 x .*, about 8 have no row\), .*allows 9\. "):
        embed_in(tmp_path / "run", strict)
    embed_in(tmp_path / "run", tiny.config([str(tmp_path / "images")], data={"max_bad_share": 0.5}))


def test_a_run_stops_as_soon_as_too_many_are_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa_dist.stages.bad_rows.CHECK_INTERVAL_S", 0.0)
    paths = tiny.write_shards(tmp_path / "images", (4, 4, 4, 4), bad=(0, 5))
    with pytest.raises(ValueError, match="2 of 16 images are bad"):
        embed_in(tmp_path / "run", tiny.config(paths, data={"max_bad_share": 0.1}))
    assert len(list((tmp_path / "run").glob("features/backbone/*/bad.json"))) == 2


def test_the_share_named_where_a_run_stops_early_is_enough_for_others_as_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grappa_dist.stages.bad_rows.CHECK_INTERVAL_S", 0.0)
    sizes = (10,) * 6
    bad = [row for row in range(sum(sizes)) if row % 10 < 3]
    paths, limit, refused = tiny.write_shards(tmp_path / "images", sizes, bad=bad), 0.01, []
    while len(refused) < 2:
        try:
            embed_in(tmp_path / "run", tiny.config(paths, data={"max_bad_share": limit}))
            break
        except ValueError as error:
            refused.append(str(error))
            limit = float(re.findall(r"reused with data\.max_bad_share=([\d.]+)$", refused[-1])[0])
    assert len(refused) == 1
    assert "3 of 60 images are bad, of 10 looked at so far (3 x " in refused[0]
    assert "and, unless more of the others are bad, reused with data.max_bad_share=0.31" in refused[0]


def several_models(store: Store, settings: Config) -> dict[str, ModelSpec]:
    """The backbone, two sets, their average and a fusion of them."""
    sets = tuple(tiny.random_adaptors(store, settings, seed) for seed in (1, 2))
    bottleneck = settings.adapt.bottleneck
    fused = Grappa(build_backbone(settings.backbone), 2, bottleneck, attention=True)
    for layer in fused.layers:
        assert layer.attention is not None
        layer.attention.initialise(torch.Generator().manual_seed(3))
    fusion = store.artifact("fusion/neighbours", {}, {})
    if not fusion.complete:
        save_file(fused.attention_tensors(), fusion.begin() / FUSION_FILE)
        fusion.commit()
    specs = [
        ModelSpec("backbone", settings.backbone),
        *(ModelSpec(f"k={i}", settings.backbone, bottleneck, (one,)) for i, one in enumerate(sets, 1)),
        ModelSpec("average", settings.backbone, bottleneck, sets),
        ModelSpec("neighbours", settings.backbone, bottleneck, sets, fusion),
    ]
    return {spec.name: spec for spec in specs}


def embed_several(root: Path, settings: Config, *, alone: bool) -> tuple[tiny.Here, dict[str, tuple[Artifact, ...]]]:
    """Features by several models, in one pass or each in its own."""
    images, here = ImageShards.open(settings.data.train, None), tiny.Here()
    run = tiny.run_in(settings, root, here)
    models = several_models(run.store, settings)
    features = {name: features_of(run.store, spec, settings.embed, images) for name, spec in models.items()}
    images = held_against(images, features["backbone"])
    for name in models if alone else ():
        embed(run, images, models[name], features[name])
    if not alone:
        embed_side_by_side(run, images, models, features)
    return here, features


def contents(features: Mapping[str, Sequence[Artifact]]) -> dict[str, bytes]:
    """The bytes of all files but manifests, which have the time."""
    paths = [path for of_model in features.values() for a in of_model for path in a.path.iterdir()]
    return {f"{p.parent.parent.name}/{p.parent.name}/{p.name}": p.read_bytes() for p in paths if p.name != MANIFEST}


def counting_reads(patch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are read from here on."""
    real, rows = ImageShards.image_bytes, list[int]()

    def read(images: ImageShards, row: int) -> bytes:
        rows.append(row)
        return real(images, row)

    patch.setattr(ImageShards, "image_bytes", read)
    return rows


def test_one_pass_of_several_models_reads_an_image_once_and_writes_the_bytes_of_single_passes(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, singly = embed_several(tmp_path / "singly", settings, alone=True)
    read = counting_reads(monkeypatch)
    here, together = embed_several(tmp_path / "together", settings, alone=False)
    assert len(read) == tiny.NUM_ROWS
    assert here.asked == ["embed_shards"] * len(tiny.SIZES)
    found, expected = contents(together), contents(singly)
    assert found == expected
    assert sum(name.endswith("sums.npy") for name in found) == len(tiny.SIZES)  # of the backbone alone
    assert len({found[name] for name in found if name.endswith("rows.npy") and "part2" in name}) == len(together)
    names = {name: [artifact.name for artifact in of_model] for name, of_model in together.items()}
    assert names == {name: [artifact.name for artifact in of_model] for name, of_model in singly.items()}


def test_after_a_kill_between_two_models_a_shard_is_embedded_by_the_others_alone(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, singly = embed_several(tmp_path / "singly", settings, alone=True)
    commit, commits = Artifact.commit, list[str]()

    def killed_at(artifact: Artifact) -> None:
        if artifact.kind.startswith("features"):
            if len(commits) == 7:  # the first shard is whole, the second one has the backbone and one set
                raise tiny.Killed
            commits.append(artifact.kind)
        commit(artifact)

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "commit", killed_at)
        with pytest.raises(tiny.Killed):
            embed_several(tmp_path / "run", settings, alone=False)
    before = tiny.files_below(tmp_path / "run" / "features")
    assert sum(name.endswith(MANIFEST) for name in before) == 7
    read = counting_reads(monkeypatch)
    here, features = embed_several(tmp_path / "run", settings, alone=False)
    assert here.asked == ["embed_shards"] * 3
    assert len(read) == tiny.NUM_ROWS - tiny.SIZES[0]
    after = tiny.files_below(tmp_path / "run" / "features")
    finished = [name for name in before if "/." not in name and not name.startswith(".")]
    assert {name: before[name] for name in finished if name in after} == {n: after[n] for n in finished if n in after}
    assert contents(features) == contents(singly)
    events = read_events(tmp_path / "run" / "events.jsonl")
    (_, begun) = [event["what"] for event in events if event["name"] == "stage_begins"]
    expected = f"backbone, k=1, k=2, average, neighbours, {tiny.NUM_ROWS - tiny.SIZES[0]} images in 3 shards, 1 reused"
    assert begun == f"{expected}, each image read once for all models"


def test_a_model_of_several_whose_features_are_not_finite_is_named(settings: Config, tmp_path: Path) -> None:
    store = Store(tmp_path)
    images, models = ImageShards.open(settings.data.train, None), several_models(store, settings)
    broken = Grappa(build_backbone(settings.backbone), 1, settings.adapt.bottleneck, attention=False)
    tensors = {name: torch.full_like(t, 1e38) for name, t in broken.adaptor_tensors().items()}
    wrong = store.artifact("adaptors/k=9", {}, {})
    save_file(tensors, wrong.begin() / ADAPTORS_FILE)
    wrong.commit()
    models["k=9"] = replace(models["k=1"], name="k=9", adaptors=(wrong,))
    features = {name: features_of(store, spec, settings.embed, images) for name, spec in models.items()}
    with pytest.raises(
        ValueError, match=r"^embed k=9: the model's features are not finite .* 8 images of a batch of 8"
    ):
        embed_side_by_side(tiny.run_in(settings, tmp_path, tiny.Here()), images, models, features)


def test_names_of_features_depend_on_model_shard_and_batch_size(settings: Config, tmp_path: Path) -> None:
    images, store = ImageShards.open(settings.data.train, None), Store(tmp_path)
    spec = ModelSpec("backbone", settings.backbone)

    def names(spec: ModelSpec, batch_size: int) -> set[str]:
        embed = settings.embed.model_copy(update={"batch_size": batch_size})
        return {artifact.name for artifact in features_of(store, spec, embed, images)}

    same = names(spec, 8)
    assert len(same) == len(tiny.SIZES)
    adapted = ModelSpec("k=1", settings.backbone, 4, (tiny.random_adaptors(store, settings, 1),))
    assert not same & (names(spec, 9) | names(adapted, 8))


def test_features_of_shards_on_s3_are_the_same_artefacts_with_the_same_bytes(
    settings: Config, tmp_path: Path, bucket: Bucket
) -> None:
    _, _, features = embed_in(tmp_path / "local", settings)
    paths = [bucket.upload(Path(path), f"images/{number}/") for number, path in enumerate(settings.data.train)]
    settings = tiny.config(paths, resources={"cache_dir": str(tmp_path / "cache"), "requests_in_flight": 4})
    images, _ = open_images(settings.data, Store(tmp_path / "remote"), settings.resources)
    run, spec = tiny.run_in(settings, tmp_path / "remote", tiny.Here()), ModelSpec("backbone", settings.backbone)
    remote = features_of(run.store, spec, settings.embed, images)
    embed(run, images, spec, remote)
    assert [artifact.name for artifact in remote] == [artifact.name for artifact in features]
    for one, other in zip(remote, features, strict=True):
        assert (one.path / "rows.npy").read_bytes() == (other.path / "rows.npy").read_bytes()
    assert bad_rows(images, remote).tolist() == [tiny.BAD]
    assert bucket.proxy.sent(".tar") < 2 * sum(shard.bytes for shard in images.shards)
    assert any((tmp_path / "cache").iterdir())


def with_backbone(settings: Config, function: str, **kwargs: object) -> Config:
    backbone = {"name": f"tests.models.odd:{function}", "kwargs": kwargs, "image_size": tiny.SIZE_PX}
    return settings.model_copy(update={"backbone": BackboneConfig(**backbone)})  # type: ignore[arg-type]


def test_features_that_are_not_finite_name_the_image_and_not_the_clustering(tmp_path: Path, settings: Config) -> None:
    words = r"features are not finite \(NaN or infinite\) for 8 images of a batch of 8, the first is .*\.tar: image"
    with pytest.raises(ValueError, match=words):
        embed_in(tmp_path, with_backbone(settings, "filled", value=float("nan")))


@pytest.mark.parametrize(("function", "warned"), [("constant", True), ("wrapped", False)])
def test_features_that_are_all_alike_are_warned_of(
    function: str, warned: bool, tmp_path: Path, settings: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    embed_in(tmp_path, with_backbone(settings, function))
    warning = f"warning: embed backbone: the features of {tiny.NUM_ROWS - 1} images that were compared are all alike"
    assert (warning in capsys.readouterr().err) == warned


def test_tasks_have_all_shards_in_order_many_at_first_and_one_at_the_end(settings: Config, tmp_path: Path) -> None:
    images = ImageShards.open(settings.data.train, None)
    one = task_of(images, settings, Store(tmp_path), name="k=4")
    shards = [replace(one, first=number) for number in range(1000)]
    tasks = tasks_of(shards, 4)
    assert [shard.first for task in tasks for shard in task] == list(range(1000))
    sizes = [len(task) for task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == MOST_SHARDS
    assert sizes[-16:] == [1] * 16  # each worker has the last ones of its share alone
    assert [len(task) for task in tasks_of(shards[:7], 2)] == [1] * 7


def test_a_shard_is_committed_when_it_is_embedded_while_the_next_one_is_being_read(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, spec, store = (
        ImageShards.open(settings.data.train, None),
        ModelSpec("m", settings.backbone),
        Store(tmp_path),
    )
    features, how = features_of(store, spec, settings.embed, images), Embedding(8, 1)
    tasks = [EmbedTask(images.part(i), images.shard_rows(i).start, ((spec, f),), how) for i, f in enumerate(features)]
    complete_at = dict[int, list[bool]]()
    read = ImageShards.image_bytes

    def watched(part: ImageShards, row: int) -> bytes:
        shard = next(i for i, task in enumerate(tasks) if task.images.shards == part.shards)
        complete_at.setdefault(shard, [artifact.complete for artifact in features])
        if shard == len(tasks) - 1 and row == len(part) - 1:
            raise tiny.Killed
        return read(part, row)

    monkeypatch.setattr(ImageShards, "image_bytes", watched)
    with pytest.raises(tiny.Killed):
        embed_shards(tiny.CPU, tasks)
    assert not complete_at[1][0]  # reading did not wait for the end of the shard before
    assert [artifact.complete for artifact in features] == [True, True, True, False]
    monkeypatch.undo()
    embed_shards(tiny.CPU, tasks)
    alone = features_of(Store(tmp_path / "alone"), spec, settings.embed, images)
    for task, artifact in zip(tasks, alone, strict=True):
        embed_shards(tiny.CPU, [replace(task, models=((spec, artifact),))])
    whole, singly = (feature_rows(images, found).take(np.arange(tiny.NUM_ROWS)) for found in (features, alone))
    np.testing.assert_array_equal(whole, singly)
    assert bad_reasons(images, features) == bad_reasons(images, alone)
