from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.cli.search import command as search
from grappa_dist.data.decoding import decode
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.export import describe_embeddings, embed_images, load_model
from grappa_dist.files import Sum, read_json
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.retrieval.collection import open_collection
from tests.cli.calling import called
from tests.retrieval.embedded import here as of_embedding
from tests.retrieval.photos import embedder, write_photos
from tests.stages import tiny
from tests.test_artifacts import flip
from tests.test_export import exported

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_embeddings_are_those_of_the_exported_model_with_the_images_keys(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    paths = tiny.write_shards(tmp_path / "images")
    command = [sys.executable, "launch/embed.py", "--model", str(tmp_path / "run"), "--images", *paths]
    command += ["--out", str(tmp_path / "out"), "resources.num_cpus=1", "embed.batch_size=8", "data.max_bad_share=0.1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    count = sum(tiny.SIZES)
    assert f"left out    1 of {count} images could not be read; their rows are zeros: named" in ended.stdout
    listing = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    images = ImageShards.open(paths, tmp_path / "index")
    assert listing["images"] == len(images)
    rows = np.concatenate([np.load(tmp_path / "out" / shard["rows"]) for shard in listing["shards"]])
    keys = [key for shard in listing["shards"] for key in json.loads((tmp_path / "out" / shard["keys"]).read_text())]
    assert keys == [images.key(row) for row in range(len(images))]
    good = [row for row in range(len(images)) if row != tiny.BAD]
    model = load_model(tmp_path / "run")
    expected = model(torch.stack([model.transform(decode(images.image_bytes(row))) for row in good]))
    torch.testing.assert_close(torch.from_numpy(rows[good]), expected, atol=1e-5, rtol=0)
    assert not rows[tiny.BAD].any()
    (reasons,) = (json.loads((tmp_path / "out" / s["bad"]).read_text()) for s in listing["shards"][2:3])
    assert list(reasons) == [str(tiny.BAD - sum(tiny.SIZES[:2]))]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        embed_images(tmp_path, ["nowhere"], tmp_path / "out")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Here:
    """Work is done in this process, without Ray; a model lies in tmp_path/run."""
    exported(tmp_path / "run")
    return of_embedding(monkeypatch)


def test_images_that_have_no_embedding_are_counted_once_and_named_each_time(
    here: tiny.Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tiny.write_shards(tmp_path / "images")
    for _ in range(2):  # the second time nothing is embedded
        found = embed_images(tmp_path / "run", paths, tmp_path / "out", ["data.max_bad_share=0.1"])
        assert "could not be read" not in capsys.readouterr().err  # said at the end alone
        where = ImageShards.open(paths, None).where(tiny.BAD)
        assert describe_embeddings(found).splitlines() == [
            f"embeddings  {found}",
            f"left out    1 of {sum(tiny.SIZES)} images could not be read; their rows are zeros: named, with reasons, "
            f"in {found.parent / 'bad_images.csv'}",
        ]
        with (tmp_path / "out" / "bad_images.csv").open(newline="") as file:
            ((name, reason),) = list(csv.reader(file))[1:]
        assert name == where
        assert reason.startswith("no JPEG")


def test_a_folder_becomes_shards_below_the_embeddings_which_search_reads_with_its_files(
    here: tiny.Here, tmp_path: Path
) -> None:
    names = write_photos(tmp_path / "photos")
    found = embed_images(tmp_path / "run", [str(tmp_path / "photos")], tmp_path / "out", ["embed.batch_size=8"])
    assert describe_embeddings(found) == f"embeddings  {found}"
    assert not (tmp_path / "out" / "bad_images.csv").exists()
    run = embedder(str(tmp_path / "run"))
    collection = open_collection([str(tmp_path / "out")], lambda: run)
    assert [collection.name(row) for row in range(len(collection))] == names
    assert collection.image(5) == (tmp_path / "photos" / names[5]).read_bytes()
    fresh = open_collection([str(tmp_path / "photos")], lambda: run)
    np.testing.assert_allclose(np.concatenate(collection.rows), np.concatenate(fresh.rows), atol=1e-5)
    (tmp_path / "photos" / "new.png").write_bytes(tiny.picture(99))
    here.asked.clear()
    embed_images(tmp_path / "run", [str(tmp_path / "photos")], tmp_path / "out", ["embed.batch_size=8"])
    assert here.asked == ["embed_shards", "write_keys"]
    assert len(open_collection([str(tmp_path / "out")], lambda: run)) == len(names) + 1


def test_new_and_changed_images_alone_are_embedded_and_those_that_are_gone_count_for_nothing(
    here: tiny.Here, tmp_path: Path
) -> None:
    photos, run = tmp_path / "photos", embedder(str(tmp_path / "run"))
    names = write_photos(photos, bad=("cat/1.png",))
    model, out = tmp_path / "run", tmp_path / "out"
    embed_images(model, [str(photos)], out, ["embed.batch_size=8", "data.max_bad_share=0.1"])
    (photos / "cat" / "1.png").unlink()
    (photos / "anemone" / "0.png").unlink()
    write_photos(tmp_path / "others")
    shutil.copyfile(tmp_path / "others" / "cat" / "3.png", photos / "anemone" / "1.png")
    found = embed_images(model, [str(photos)], out, ["embed.batch_size=8"])  # and none is bad
    assert read_json(found)["images"] == len(names) - 2
    assert read_json(found)["bad"] == 0
    (old, new) = read_json(found)["shards"]
    assert (len(old["gone"]), new["images"]) == (3, 1)
    assert not (out / "bad_images.csv").exists()
    collection = open_collection([str(out)], lambda: run)
    assert collection.bad == {}
    rows = dict(zip(map(collection.name, range(len(collection))), np.concatenate(collection.rows), strict=True))
    fresh = open_collection([str(photos)], lambda: run)
    assert sorted(rows) == sorted(fresh.name(row) for row in range(len(fresh)))
    for row in range(len(fresh)):
        np.testing.assert_allclose(rows[fresh.name(row)], fresh.rows[0][row], atol=1e-5)
    for row, name in enumerate(map(collection.name, range(len(collection)))):
        assert collection.image(row) == (photos / name).read_bytes()


def listed(found: Path, what: str) -> list[Any]:
    """Keys or names of all images, or None for a shard that has none."""
    of_shards = [shard[what] for shard in json.loads(found.read_text())["shards"]]
    return [item for name in of_shards for item in (json.loads((found.parent / name).read_text()) if name else [None])]


def test_names_of_files_lie_beside_the_keys_and_shards_without_any_go_on_with_keys_alone(
    tmp_path: Path, here: tiny.Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f"b/{number}.png" for number in range(5)] + ["caf\udce9\n.png"]
    for number, file in enumerate(files):
        (tmp_path / "pile" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pile" / file).write_bytes(tiny.picture(number))
    cfg = CollectionConfig(split="none", images_per_shard=4)
    make_shards([(None, str(tmp_path / "pile"))], tmp_path / "shards", cfg, Work())
    (foreign,) = tiny.write_shards(tmp_path / "foreign", (3,), bad=())
    paths = [str(tmp_path / "shards" / "train"), foreign]
    found = embed_images(tmp_path / "run", paths, tmp_path / "out", ["embed.batch_size=8"])
    images = ImageShards.open(paths, None)
    names = listed(found, "names")
    assert sorted(names[:-1]) == sorted(files)
    assert [(tmp_path / "pile" / name).read_bytes() for name in names[:-1]] == [images.image_bytes(r) for r in range(6)]
    assert names[-1] is None
    assert listed(found, "keys") == [images.key(row) for row in range(len(images))]
    assert not (tmp_path / "out" / "names").exists()
    assert [len(list(made.glob("*.json"))) for made in sorted(tmp_path.glob("out/keys/*"))] == [2, 3, 3]  # one manifest

    def again() -> tuple[list[str], list[Any], int]:
        """What workers are asked to do, the names, and how many files the driver reads for them."""
        here.asked.clear()
        read = list[Path]()
        with monkeypatch.context() as patch:
            patch.setattr("grappa_dist.export.read_json", lambda path: (read.append(path), read_json(path))[1])
            embed_images(tmp_path / "run", paths, tmp_path / "out", ["embed.batch_size=8"])
        return [*here.asked], listed(found, "names"), len(read)

    assert again() == ([], names, 1)
    found.unlink()  # as after a kill
    assert again() == ([], names, 0)
    features = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out/features/*/*"))}
    shutil.rmtree(tmp_path / "out" / "keys")
    assert again() == (["write_keys"] * 3, names, 1)
    assert listed(found, "keys") == [images.key(row) for row in range(len(images))]
    assert features == {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out/features/*/*"))}


def test_what_was_embedded_of_dirty_images_is_reused_with_the_share_that_the_message_names(
    tmp_path: Path, here: tiny.Here, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "images", rows_per_shard=10) as writer:
        for row in range(35):
            image = b"no image" if row in (3, 12, 13) else tiny.picture(row)
            writer.write(image, "png", name=f"photos/{row}.png")
    paths, settings = [str(tmp_path / "images")], ["embed.batch_size=8"]
    with pytest.raises(ValueError, match=r"3 of 35 images are bad .*'000000003' \('photos/3.png'\)") as error:
        embed_images(tmp_path / "run", paths, tmp_path / "out", settings)
    assert not (tmp_path / "out" / "embeddings.json").exists()
    (share,) = re.findall(r"What is embedded is kept, and reused with (data\.max_bad_share=[\d.]+)$", str(error.value))
    rows = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/features/*/*/rows.npy")}
    here.asked.clear()
    found = embed_images(tmp_path / "run", paths, tmp_path / "out", [*settings, share])
    assert here.asked == ["write_keys"] * 4
    assert len(rows) == 4
    assert rows == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/features/*/*/rows.npy")}
    assert listed(found, "names") == [f"photos/{row}.png" for row in range(35)]
    assert "embed: all 4 shards were embedded before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adapt.epochs=3", "adapt.epochs: is no setting of embedding"),
        ("backbone.image_size=224", "backbone.image_size: is no setting"),
        ("data.train=[elsewhere]", "data.train: is no setting"),
        ("resources={workers: 2}", "resources: is no setting"),
        ("resources.adapt_ranks=2", "expected one of data.max_bad_share, embed.batch_size, "),
        ("out=s3://a/b", "out: is no setting"),
        ("embed.batch_sise=2", "unknown key embed.batch_sise; did you mean 'batch_size'?"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(
    setting: str, message: str, tmp_path: Path, here: tiny.Here
) -> None:
    paths = tiny.write_shards(tmp_path / "images", (3,), bad=())
    with pytest.raises(ValueError, match=re.escape(message)):
        embed_images(tmp_path / "run", paths, tmp_path / "out", ["embed.batch_size=8", setting])
    assert not (tmp_path / "out").exists()


def blocks(kind: str) -> str:
    """What the docs on an index have of a language."""
    page = (ROOT / "docs" / "index_and_search.md").read_text()
    return "\n".join(re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL))


@pytest.mark.slow
def test_the_docs_search_of_a_folder_finds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands, and then faiss and a vector database, which read what they wrote."""
    exported(tmp_path / "runs" / "mine")
    for number in range(6):
        path = tmp_path / "photos" / "some" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.picture(number))
    (tmp_path / "query.jpg").write_bytes(tiny.picture(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda url: url == (tmp_path / "sheet.html").as_uri())
    (embedding, *searches) = [shlex.split(line) for line in blocks("sh").splitlines()]
    call = [sys.executable, "-m", "grappa_dist", *embedding[1:], "resources.num_cpus=1", "embed.batch_size=8"]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(call, env=here, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for program, verb, *argv in searches:
        found = called(search, *argv)
        assert (program, verb, found.status) == ("grappa-dist", "search", 0), found.err
        assert "warning" not in found.err
    assert (tmp_path / "sheet.html").read_text().count("<figure") == 7
    capsys.readouterr()
    exec(compile(blocks("python"), "index_and_search.md", "exec"), {})
    hits = capsys.readouterr().out.splitlines()
    assert hits[0] == "1.000  'some/4.png'"
    assert len(hits) == 10
    assert hits[:5] == hits[5:]  # of faiss, and of the database
    assert [hit.replace("'", "") for hit in hits[:5]] == found.out.splitlines()[:5]


def test_damaged_embeddings_are_noticed_and_made_anew_and_their_checksums_are_listed(
    here: tiny.Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, allow = tiny.write_shards(tmp_path / "images"), ["data.max_bad_share=0.1"]
    out = tmp_path / "out"
    found = embed_images(tmp_path / "run", paths, out, allow)
    first = read_json(found)["shards"][0]
    for what in ("rows", "keys", "bad"):
        assert first["xxh3"][what] == Sum.of(out / first[what]).xxh3
    assert first["names"] is first["xxh3"]["names"] is None
    before = {what: (out / first[what]).read_bytes() for what in ("rows", "keys")}
    text = found.read_text()
    for what in before:
        flip(out / first[what], -3)
    found.write_text("{")
    here.asked.clear()
    assert embed_images(tmp_path / "run", paths, out, allow).read_text() == text
    assert here.asked == ["embed_shards", "write_keys"]
    assert {what: (out / first[what]).read_bytes() for what in before} == before
    assert len(list(out.glob("*/**/*.damaged"))) == 2
    assert "damaged and made anew: " in capsys.readouterr().err
