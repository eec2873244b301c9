"""What entries and files of a folder name: braces, and files beside shards that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grappa_dist.data import discovery
from grappa_dist.data.entries import expand_braces, is_named_like_a_copy, is_shard_name, resembles_shard
from grappa_dist.data.remote import RemoteObject
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from tests.data.written import write_tar
from tests.stores import folder_backend, proxy_to

FOREIGN = [
    '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 2}]}',
    '{"version": 2, "shards": []}',
    '{"version": 2, "shards": [{"format": "mds", "raw_data": {"basename": "shard.00000.mds"}}]}',
    '["a.tar", "b.tar"]',
    "{}",
]


def shard(path: Path, rows: range = range(2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, {f"{path.stem.partition('{')[0]}-{row}.jpg": b"image" for row in rows})


def opened(*entries: str | Path) -> tuple[list[str], list[str]]:
    """Names of the shards that entries stand for, and what was said."""
    lines = list[str]()
    images = ImageShards.open([str(entry) for entry in entries], None, log=lines.append)
    return [shard.name for shard in images.shards], lines


def test_braces_stand_for_names_as_in_webdataset() -> None:
    assert expand_braces("x-{008..010}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar"]
    assert expand_braces("{b,a}/x-{0..1}.tar") == ["b/x-0.tar", "b/x-1.tar", "a/x-0.tar", "a/x-1.tar"]
    assert expand_braces("x-{3..1}.tar") == ["x-3.tar", "x-2.tar", "x-1.tar"]
    assert expand_braces("x-{0..8..4}.tar") == ["x-0.tar", "x-4.tar", "x-8.tar"]
    for name in ("x.tar", "x{1}.tar", "x{.tar", "x}.tar"):
        assert expand_braces(name) == [name]
    with pytest.raises(ValueError, match="more than 1000000 names"):
        expand_braces("x-{0..99999}-{0..99999999999999999999999999}.tar")


@pytest.mark.parametrize(
    "entry", ["s-{000..002}.tar", "s-00{0,1,2}.tar", "s-{000..001}.tar|s-002.tar", "{s,t}-00*.tar"]
)
def test_braces_are_read_on_a_disk(tmp_path: Path, entry: str) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number:03d}.tar")
    entries = [tmp_path / part for part in entry.split("|")]
    if entry.startswith("{"):
        with pytest.raises(ValueError, match=r"nothing at .*t-00\*\.tar"):
            opened(*entries)
        shard(tmp_path / "t-000.tar")
    names, lines = opened(*entries)
    assert names[:3] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert lines == []


def test_a_shard_that_a_range_names_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    shard(tmp_path / "s-0.tar")
    with pytest.raises(ValueError, match=r"nothing at .*s-1\.tar"):
        opened(tmp_path / "s-{0..1}.tar")


def test_names_that_have_braces_are_names(tmp_path: Path) -> None:
    shard(tmp_path / "{a,b}" / "x-{0..1}.tar")
    for entry in ("{a,b}", "{a,b}/x-{0..1}.tar", "{a,b}/*.tar"):
        assert opened(tmp_path / entry)[0] == ["x-{0..1}.tar"]


HIDDEN = ["._a.tar", ".a.tar.Xy12", "a.tar~", "a.tar.part", "a.tar.tmp", "a.tar.crdownload", "b.tar.gz", "A.TAR"]


def test_hidden_and_unfinished_files_and_folders_are_passed_over_with_one_line(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar")
    for name in (*HIDDEN, ".nfs000000000001", ".DS_Store", "Thumbs.db", "a.tar.npy"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "x.tar").mkdir()
    names, lines = opened(tmp_path)
    assert names == ["a.tar"]
    assert len(lines) == 1
    assert lines[0].startswith(f"passed over in {tmp_path}, which by their names are no shards: '._a.tar'")
    assert lines[0].endswith("and 4 more")
    names, lines = opened(tmp_path / "*.tar")
    assert (names, len(lines)) == (["a.tar"], 1)
    assert "'x.tar/'" in lines[0]
    assert not any(is_shard_name(name) for name in HIDDEN)
    assert all(resembles_shard(name) for name in HIDDEN)


def test_a_folder_of_nothing_but_such_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "._a.tar").write_bytes(b"")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing at .*passed over in .*'\._a\.tar', 'a\.tar\.gz'"):
        opened(tmp_path)


def test_such_files_beside_an_index_of_ours_are_passed_over(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "f") as writer:
        writer.write(b"image", "jpg")
    tar = tmp_path / "f" / "shard-000000.tar"
    (tmp_path / "f" / "._shard-000000.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "f" / "x.tar").mkdir()
    shutil.copy(tar, tmp_path / "f" / "shard-000000 (copy).tar")
    names, lines = opened(tmp_path / "f")
    assert names == ["shard-000000.tar"]
    assert sorted("copies" in line for line in lines) == [False, True]
    (tmp_path / "f" / "shard-000000 (copy).tar").unlink()
    shard(tmp_path / "f" / "later.tar")
    with pytest.raises(ValueError, match=r"later\.tar: is none of the shards that .*absent; move it"):
        opened(tmp_path / "f")


@pytest.mark.parametrize(
    "copy", ["a (copy).tar", "a copy 2.tar", "a - Copy.tar", "a (1).tar", "a(1).tar", "Copy of a.tar"]
)
def test_a_copy_by_name_and_bytes_is_passed_over(tmp_path: Path, copy: str) -> None:
    shutil.copy(shard(tmp_path / "a.tar"), tmp_path / copy)
    names, lines = opened(tmp_path)
    assert names == ["a.tar"]
    assert lines == [f"passed over in {tmp_path}, which are copies of other shards there: {copy!r}"]
    shard(tmp_path / copy, range(3))  # a name alone proves nothing
    assert sorted(opened(tmp_path)[0]) == sorted(["a.tar", copy])
    assert not is_named_like_a_copy("a-1.tar", "a.tar")


@pytest.mark.parametrize("text", FOREIGN)
def test_an_index_of_another_program_is_passed_over_with_a_line(tmp_path: Path, text: str) -> None:
    shard(tmp_path / "a.tar")
    (tmp_path / "index.json").write_text(text)
    names, lines = opened(tmp_path)
    assert names == ["a.tar"]
    assert lines == [f"passed over: {tmp_path}/index.json, which is no index of shards, but another program's"]


@pytest.mark.parametrize("text", ["", '{"version": 1, "shards": [', "<html>"])
def test_an_index_that_may_be_ours_and_damaged_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    shard(tmp_path / "a.tar")
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not JSON.*rename it if another program made it"):
        opened(tmp_path)


def test_an_index_of_another_program_on_a_web_server_is_passed_over(tmp_path: Path) -> None:
    shard(tmp_path / "f" / "a.tar")
    shard(tmp_path / "f" / "b.tar")
    (tmp_path / "f" / "index.json").write_text(FOREIGN[0])
    with proxy_to(folder_backend(tmp_path)) as web:
        names, lines = opened(f"{web.url}/f/{{b,a}}.tar")
        assert names == ["b.tar", "a.tar"]
        assert lines == [f"passed over: {web.url}/f/index.json, which is no index of shards, but another program's"]


def test_hidden_files_in_a_remote_folder_are_passed_over_unless_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [RemoteObject(f"s3://b/f/{name}", 10240, "") for name in ("._a.tar", "a.tar")]
    monkeypatch.setattr(discovery, "list_remote", lambda entry: listed)
    lines = list[str]()
    assert [tar.name for tar in discovery._list_tars(["s3://b/f"], lines.append)] == ["a.tar"]
    assert lines == ["passed over in s3://b/f, which by their names are no shards: '._a.tar'"]
    monkeypatch.setattr(discovery, "list_remote", lambda entry: listed[:1])
    assert len(discovery._list_tars(["s3://b/f/._a.tar"], lines.append)) == 1
