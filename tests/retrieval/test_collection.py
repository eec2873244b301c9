"""Embeddings that are searched: kept, made again where files changed, refused where damaged or of another model."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.decoding import BadImage
from grappa_dist.files import lock_file
from grappa_dist.retrieval.collection import LOCK_FILE, Collection, open_collection, stored
from grappa_dist.retrieval.embedding import Embedder
from tests.retrieval.photos import EACH, embedder, model_in, write_photos
from tests.stages import tiny
from tests.test_artifacts import flip


def names_in(collection: Collection) -> list[str]:
    return [collection.name(row) for row in range(len(collection))]


def kept(folder: Path) -> tuple[list[str], Embedder, Path]:
    """Photos, one of them bad, and a folder in which their embeddings are kept."""
    write_photos(folder / "photos", bad=("cat/1.png",))
    places, run, keep = [str(folder / "photos")], embedder(model_in(folder / "run")), folder / "keep"
    open_collection(places, lambda: run, keep=keep)
    return places, run, keep


def test_kept_embeddings_are_read_back_as_they_were_with_the_files_they_are_of(tmp_path: Path) -> None:
    places, run, keep = kept(tmp_path)
    made, again = open_collection(places, lambda: run), open_collection([str(keep)], lambda: run)
    np.testing.assert_allclose(np.concatenate(made.rows), np.concatenate(again.rows), atol=1e-6)
    assert names_in(made) == names_in(again)
    assert made.bad == again.bad
    assert [again.name(row) for row in again.bad] == ["cat/1.png"]
    assert again.image(0) == (tmp_path / "photos" / again.name(0)).read_bytes()
    (tmp_path / "photos" / again.name(0)).unlink()
    assert isinstance(again.image(0), BadImage)


def test_only_new_and_changed_images_are_embedded_again_and_gone_ones_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, run, keep = kept(tmp_path)
    embedded: list[int] = []
    embed = Embedder.embed
    monkeypatch.setattr(
        Embedder, "embed", lambda self, images, rows: (embedded.append(len(rows)), embed(self, images, rows))[1]
    )
    open_collection(places, lambda: run, keep=keep)
    assert embedded == [1]  # what was bad is tried again
    first, second, third = (tmp_path / "photos" / "anemone" / f"{number}.png" for number in range(3))
    first.unlink()
    second.write_bytes(tiny.picture(40))
    os.utime(second, ns=(1, 1))
    third.rename(third.with_name("new.png"))
    found = open_collection(places, lambda: run, keep=keep)
    assert embedded == [1, 3]
    assert len(found) == 3 * EACH - 1
    fresh = open_collection(places, lambda: run, keep=tmp_path / "other")
    np.testing.assert_allclose(np.concatenate(found.rows), np.concatenate(fresh.rows), atol=1e-6)
    assert len([path for path in keep.iterdir() if path.is_dir()]) == 1


def test_embeddings_of_another_model_are_refused_with_both_named(tmp_path: Path) -> None:
    places, _, keep = kept(tmp_path)
    other = embedder("tests.models.tiny:create")
    theirs = json.loads((keep / "embeddings.json").read_text())["model_sha256"][:12]
    message = rf"of another model \(neighbours, sha256 {theirs}\) than tests.models.tiny:create \(backbone, sha256 "
    with pytest.raises(ValueError, match=message):
        open_collection([str(keep)], lambda: other)
    with pytest.raises(ValueError, match=message):
        open_collection(places, lambda: other, keep=keep)
    assert len(open_collection([str(keep)], lambda: other, any_model=True)) == 3 * EACH


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of embeddings, to be copied."""
    return kept(tmp_path_factory.mktemp("once"))[2]


@pytest.mark.parametrize("what", ["rows", "names", "bad", "keys", "stamps"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_file_of_embeddings_is_refused_by_name(what: str, how: str, once: Path, tmp_path: Path) -> None:
    keep = shutil.copytree(once, tmp_path / "keep")
    path = keep / json.loads((keep / "embeddings.json").read_text())["shards"][0][what]
    if how == "flipped":
        flip(path, -2)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*the embeddings are damaged; run the command"):
        stored(keep, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 3}', '{"shards": [{}]}', '{"shards": []}', '{"shards": [7]}'])
def test_a_damaged_list_of_embeddings_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "embeddings.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/embeddings.json: .*are damaged"):
        stored(tmp_path, None)


def test_folders_of_others_beside_kept_embeddings_stay(tmp_path: Path) -> None:
    places, run, keep = kept(tmp_path)
    theirs = keep / "images-2019" / "a.png"
    theirs.parent.mkdir()
    theirs.write_bytes(b"a photo")
    (tmp_path / "photos" / "cat" / "0.png").unlink()
    open_collection(places, lambda: run, keep=keep)
    assert theirs.exists()
    assert len([path for path in keep.iterdir() if path.is_dir()]) == 2


def test_a_list_of_anyone_has_no_folder_removed(tmp_path: Path) -> None:
    places, run, keep = kept(tmp_path)
    theirs, path = tmp_path / "theirs", keep / "embeddings.json"
    theirs.mkdir()
    listed = json.loads(path.read_text())
    for named in (str(theirs), "../theirs", "", ".", f"{listed['shards'][0]['shard']}/../../theirs"):
        listed["shards"][0]["shard"] = named
        path.write_text(json.dumps(listed))
        (tmp_path / "photos" / "cat" / "0.png").write_bytes(tiny.picture(len(named) + 50))
        open_collection(places, lambda: run, keep=keep)
        assert theirs.exists(), named
        assert path.exists(), named
        listed["shards"] = json.loads(path.read_text())["shards"]


def test_a_folder_of_other_files_is_no_place_for_embeddings(tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos")
    places, run = [str(tmp_path / "photos")], embedder(model_in(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"photos: holds other files; to keep embeddings, expected a new or an empty"):
        open_collection(places, lambda: run, keep=tmp_path / "photos")
    with pytest.raises(ValueError, match=r"0.png: is a file; to keep embeddings, expected a folder"):
        open_collection(places, lambda: run, keep=tmp_path / "photos" / "cat" / "0.png")
    assert len([path for path in (tmp_path / "photos").rglob("*") if path.is_file()]) == len(names)


def test_embeddings_are_kept_by_one_process_at_a_time(tmp_path: Path) -> None:
    places, run, keep = kept(tmp_path)
    held = lock_file(keep / LOCK_FILE)
    with held, pytest.raises(ValueError, match=r"keep: another process keeps embeddings there \(process \d+ on "):
        open_collection(places, lambda: run, keep=keep)
    assert len(open_collection(places, lambda: run, keep=keep)) == 3 * EACH


def test_embeddings_are_not_kept_a_second_time(tmp_path: Path) -> None:
    _, run, keep = kept(tmp_path)
    with pytest.raises(ValueError, match="holds embeddings, which are searched as they are; --keep is for images"):
        open_collection([str(keep)], lambda: run, keep=tmp_path / "second")


def test_embeddings_are_not_kept_among_those_that_embed_made(tmp_path: Path) -> None:
    places, run, keep = kept(tmp_path)
    listed = json.loads((keep / "embeddings.json").read_text())
    for shards in ([{**listed["shards"][0], "stamps": None}], listed["shards"] * 2):
        entries = [{what: value for what, value in entry.items() if value is not None} for entry in shards]
        (keep / "embeddings.json").write_text(json.dumps({**listed, "shards": entries}))
        with pytest.raises(ValueError, match="holds embeddings that `grappa-dist embed` made; name another folder"):
            open_collection(places, lambda: run, keep=keep)


def test_rows_between_those_that_are_gone_are_parts_with_their_names_and_files(tmp_path: Path) -> None:
    _, _, keep = kept(tmp_path)
    whole = stored(keep, None)
    listed = json.loads((keep / "embeddings.json").read_text())
    listed["shards"][0]["gone"] = [0, 4, 5]
    (keep / "embeddings.json").write_text(json.dumps(listed))
    found = stored(keep, None)
    left = [row for row in range(3 * EACH) if row not in (0, 4, 5)]
    assert names_in(found) == [whole.name(row) for row in left]
    assert np.array_equal(np.concatenate(found.rows), np.concatenate(whole.rows)[left])
    assert {found.name(row): why for row, why in found.bad.items()} == {"cat/1.png": next(iter(whole.bad.values()))}
    assert [found.image(i) for i in range(len(left))] == [whole.image(row) for row in left]


def test_what_an_entry_of_a_list_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "embeddings.json").write_text('{"shards": [{}]}')
    with pytest.raises(ValueError, match=r"is no list of embeddings \(an entry has no 'shard'\): the embeddings are"):
        stored(tmp_path, None)


def test_embeddings_of_shards_are_not_kept_here(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "shards", (3,), bad=())
    run = embedder(model_in(tmp_path / "run"))
    with pytest.raises(ValueError, match="of shards, `grappa-dist embed` writes them"):
        open_collection(paths, lambda: run, keep=tmp_path / "keep")


def test_images_of_shards_without_names_are_called_by_shard_and_key(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "shards", (2, 2), bad=())
    run = embedder(model_in(tmp_path / "run"))
    found = open_collection(paths, lambda: run)
    expected = [f"part{part}-000000.tar: {row:09d}" for part in (0, 1) for row in range(2)]
    assert names_in(found) == expected
    assert found.image(3) == tiny.picture(3)
