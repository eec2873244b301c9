"""Shards on S3 and on a web server: the same rows as on a disk, and every way in which a store can fail."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grappa_dist import object_store
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index_cache import IndexCache
from grappa_dist.data.remote import RemoteFile, list_tars, objects_at
from grappa_dist.data.shards import ImageShards
from grappa_dist.object_store import StoreUnavailable
from tests.conftest import Bucket
from tests.data.written import write_folder, write_tar
from tests.stores import Answer, StoreProxy, folder_backend, proxy_to

SIZES = {"a": 7, "b": 1, "c": 0, "d": 30}  # uneven, one shard without a row


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)


def raw_shards(folder: Path) -> Path:
    """Tars that another program wrote, without an index beside them."""
    for name, rows in SIZES.items():
        images = {f"{name}/{row:03d}.jpg": bytes([row]) * (997 * row + 1) for row in range(rows)}
        write_tar(folder / f"{name}.tar", {**images, **{f"{name}/{row:03d}.json": b'{"label": "x"}' for row in (0, 3)}})
    return folder


def read(shards: ImageShards) -> list[tuple[str, bytes, object]]:
    rows = range(len(shards))
    return [(shards.key(r), data, shards.labels(r)) for r, data in zip(rows, shards.images(rows), strict=True)]


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), 2**26, 4)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[StoreProxy]:
    """A web server of the folder `web`."""
    (tmp_path / "web").mkdir()
    with proxy_to(folder_backend(tmp_path / "web")) as proxy:
        yield proxy


@pytest.mark.parametrize("entry", ["", "/*.tar", "/[a-d].tar"])
@pytest.mark.parametrize("index_dir", [None, "index"])
def test_rows_of_s3_are_those_of_the_same_shards_on_disk(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path, entry: str, index_dir: str | None
) -> None:
    local = ImageShards.open([raw_shards(tmp_path / "raw")], None)
    where = bucket.upload(tmp_path / "raw", "some/where/")
    remote = ImageShards.open([where + entry], index_dir and tmp_path / index_dir, cache)
    assert remote.fingerprint == local.fingerprint
    assert remote.starts.tolist() == local.starts.tolist()
    assert read(pickle.loads(pickle.dumps(remote))) == read(local)


def test_one_tar_a_numbered_range_and_a_local_folder_go_together_in_the_order_given(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path
) -> None:
    write_folder(tmp_path / "f", 9, rows_per_shard=3)
    where = bucket.upload(tmp_path / "f")
    raw_shards(tmp_path / "raw")
    paths = [f"{where}/shard-000002.tar", tmp_path / "raw", where + "/shard-00000{0..1}.tar"]
    shards = ImageShards.open(paths, None, cache)
    assert [s.name for s in shards.shards] == ["shard-000002.tar", *(f"{n}.tar" for n in SIZES), "shard-000000.tar",
                                               "shard-000001.tar"]  # fmt: skip
    assert shards.image_bytes(len(shards) - 1) == bytes([5]) * 6
    with pytest.raises(ValueError, match="named 2 times"):
        ImageShards.open([where, f"{where}/shard-000000.tar"], None, cache)


def test_a_tar_is_read_once_to_index_it_and_not_again_by_the_next_run(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path
) -> None:
    where = bucket.upload(raw_shards(tmp_path / "raw"))
    sizes = sum(path.stat().st_size for path in (tmp_path / "raw").iterdir())
    first = ImageShards.open([where], tmp_path / "index", cache)
    assert bucket.proxy.sent(".tar") == sizes
    bucket.proxy.requests.clear()
    assert ImageShards.open([where], tmp_path / "index", cache) == first
    assert bucket.proxy.sent(".tar") == 0
    assert len(bucket.proxy.requests) < 6


def test_where_a_writer_left_an_index_no_tar_is_read_before_an_image_is_wanted(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path
) -> None:
    write_folder(tmp_path / "f", 40, rows_per_shard=10)
    where = bucket.upload(tmp_path / "f")
    shards = ImageShards.open([where], tmp_path / "index", cache)
    assert bucket.proxy.sent(".tar") == bucket.proxy.sent(".npy") == 0
    assert shards.image_bytes(33) == bytes([33]) * 34
    assert bucket.proxy.ranges(".tar") == [(int(shards.index(3)[3]["offset"]), int(shards.index(3)[3]["offset"]) + 33)]
    assert [r.path for r in bucket.proxy.requests if r.method == "GET"][-2].endswith("shard-000003.tar.npy")
    again = ImageShards.open([where], tmp_path / "index", CacheSettings(cache.folder, 0, 4))
    bucket.proxy.requests.clear()
    assert read(again) == read(ImageShards.open([tmp_path / "f"], None))
    assert bucket.proxy.sent("000003.tar.npy") == 0  # the run keeps it
    assert bucket.proxy.sent("000002.tar.npy") == (tmp_path / "f" / "shard-000002.tar.npy").stat().st_size


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_overwritten_while_a_run_goes_on_is_refused(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path, with_index: bool
) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    if not with_index:
        (tmp_path / "f" / "index.json").unlink()
    where = bucket.upload(tmp_path / "f")
    shards = ImageShards.open([where], None, cache)
    assert [shards.image_bytes(0) for _ in range(3)] == [bytes([0])] * 3
    whole = (tmp_path / "f" / "shard-000000.tar").read_bytes()
    for name in ("shard-000000.tar", "shard-000001.tar"):
        bucket.put(name, whole.replace(b"000000000", b"000000009"))
    with pytest.raises(ValueError, match=r"shard-000000\.tar: bytes 0-10239: another object .* the shard changed"):
        shards.image_bytes(1)  # open since before: the store holds the range against the version (If-Match)
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its size and version are .* the shard changed"):
        shards.image_bytes(2)


def test_a_shard_that_changed_between_runs_is_refused_or_indexed_again(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path
) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    where, raw = bucket.upload(tmp_path / "f", "f/"), bucket.upload(raw_shards(tmp_path / "raw"), "raw/")
    before = ImageShards.open([where, raw], tmp_path / "index", cache)
    whole = (tmp_path / "f" / "shard-000001.tar").read_bytes()
    bucket.put("raw/b.tar", write_tar(tmp_path / "b.tar", {"x.jpg": b"new"}).read_bytes())
    assert ImageShards.open([where, raw], tmp_path / "index", cache).fingerprint != before.fingerprint
    bucket.put("f/shard-000001.tar", whole[:512] + b"\xff" + whole[513:])  # as large as it was
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its version is .* changed after indexing"):
        ImageShards.open([where, raw], tmp_path / "index", cache)
    bucket.put("f/shard-000001.tar", whole + bytes(512))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its size is .* changed after indexing"):
        ImageShards.open([where], None, cache)
    bucket.client.delete_object(Bucket=bucket.name, Key="f/shard-000001.tar")
    with pytest.raises(ValueError, match=r"shard-000001\.tar: missing"):
        ImageShards.open([where], None, cache)


def test_a_shard_of_another_version_with_the_same_bytes_is_the_same(
    bucket: Bucket, cache: CacheSettings, tmp_path: Path
) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    where, kept = bucket.upload(tmp_path / "f", "f/"), IndexCache(tmp_path / "index")
    before = ImageShards.open([where], tmp_path / "index", cache)
    right = kept.versions(where.rstrip("/"))
    assert len(right) == 2
    kept.put_versions(where.rstrip("/"), {name: (fingerprint, "another") for name, (fingerprint, _) in right.items()})
    logged = list[str]()
    again = ImageShards.open([where], tmp_path / "index", cache, log=logged.append)
    assert again.fingerprint == before.fingerprint
    assert kept.versions(where.rstrip("/")) == right
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in logged] == ["shard-000000.tar", "shard-000001.tar"]
    assert all("is read to see whether its bytes are the same" in line for line in logged)


def test_a_tar_cut_off_on_the_store_keeps_what_is_whole_and_one_without_a_header_is_refused(
    bucket: Bucket, tmp_path: Path
) -> None:
    whole = write_tar(tmp_path / "t.tar", {"a.jpg": b"a" * 700, "b.jpg": b"b" * 10}).read_bytes()
    for length in (0, 511):
        bucket.put("t.tar", whole[:length])
        with pytest.raises(ValueError, match=r"^s3://.*/t\.tar: .*at byte \d+"):
            ImageShards.open([f"{bucket.url}/t.tar"], None)
    for length, good in ((512, 0), (1536, 1), (2050, 1), (2100, 2), (2560, 2)):
        bucket.put("t.tar", whole[:length])
        shards = ImageShards.open([f"{bucket.url}/t.tar"], None)
        found = list(shards.images(range(len(shards))))
        assert found[:good] == [b"a" * 700, b"b" * 10][:good]
        assert all(isinstance(why, BadImage) for why in found[good:])
        assert "what follows is missing" in str(found[-1])
        assert shards.key(len(shards) - 1) == ""


def test_what_is_not_there_is_reported(bucket: Bucket, web: StoreProxy) -> None:
    for entry in (bucket.url, f"{bucket.url}/none", f"{bucket.url}/none/*.tar", f"{web.url}/none"):
        with pytest.raises(ValueError, match=r"nothing at .*/"):
            ImageShards.open([entry], None)
    for entry in (f"{bucket.url}/none.tar", f"{web.url}/none.tar", "s3://no-such-bucket/t.tar"):
        with pytest.raises(ValueError, match=r"(none|t)\.tar: not there"):
            ImageShards.open([entry], None)


@pytest.mark.parametrize("with_index", [True, False])
def test_rows_of_a_web_server_are_those_of_the_disk(
    web: StoreProxy, cache: CacheSettings, tmp_path: Path, with_index: bool
) -> None:
    write_folder(tmp_path / "web" / "f", 9, rows_per_shard=4)
    entry = f"{web.url}/f"
    if not with_index:  # there is no folder to list, so the tars are counted out
        (tmp_path / "web" / "f" / "index.json").unlink()
        entry = web.url + "/f/shard-{000000..000002}.tar"
    shards = ImageShards.open([entry], tmp_path / "index", cache)
    assert read(shards) == read(ImageShards.open([tmp_path / "web" / "f"], None))
    (tmp_path / "web" / "f" / "shard-000002.tar").write_bytes(b"x" * 3072)
    fresh = ImageShards(shards.shards, shards.indexes, CacheSettings(str(tmp_path / "other"), 2**20, 4))
    with pytest.raises(ValueError, match=r"shard-000002\.tar: .*(changed|412)"):
        fresh.image_bytes(8)


def test_a_listing_of_links_names_the_tars_of_a_web_folder(
    web: StoreProxy, cache: CacheSettings, tmp_path: Path
) -> None:
    raw_shards(tmp_path / "web" / "f")
    page = "".join(f'<a href="{name}.tar">{name}</a>' for name in "badc").encode()

    def change(answer: Answer) -> Answer:
        status, headers, body = answer
        return (200, {"Content-Type": "text/html"}, page) if door_asks_folder() else (status, headers, body)

    def door_asks_folder() -> bool:
        return paths[-1].rstrip("/") == "/f"

    paths: list[str] = []
    web.refuse = lambda method, path: paths.append(path)  # type: ignore[func-returns-value]
    web.change = change
    assert [tar.name for tar in list_tars(f"{web.url}/f")] == ["a.tar", "b.tar", "c.tar", "d.tar"]


def a_file(web: StoreProxy, folder: Path, data: bytes = bytes(range(250)) * 40) -> RemoteFile:
    (folder / "web" / "t.tar").write_bytes(data)
    return RemoteFile(objects_at([f"{web.url}/t.tar"])[0])


def test_an_error_of_the_moment_is_tried_again_and_a_lasting_one_named(web: StoreProxy, tmp_path: Path) -> None:
    file, answers = a_file(web, tmp_path), iter([503, 429, None, None, *[503] * 99])
    web.refuse = lambda method, path: next(answers) if method == "GET" else None
    assert file.fetch(1, 3) == b"\x01\x02"
    assert file.fetch(250, 253) == b"\x00\x01\x02"
    asked = len(web.requests)
    with pytest.raises(StoreUnavailable, match=r"/t\.tar: bytes 5-8 cannot be read in 6 attempts: .*Error: 503"):
        file.fetch(5, 9)
    assert len(web.requests) - asked == 6
    for status in (403, 400, 410):
        asked = len(web.requests)
        web.refuse = lambda method, path, status=status: status  # type: ignore[misc]
        with pytest.raises(ValueError, match=rf"bytes 5-8 cannot be read.*{status}"):
            file.fetch(5, 9)
        assert len(web.requests) - asked == 1


def test_a_connection_that_breaks_off_is_tried_again(web: StoreProxy, tmp_path: Path) -> None:
    file, cuts = a_file(web, tmp_path), iter([10, 0, None, *[10] * 99])
    assert len(file.fetch(0, 1)) == 1
    web.cut = lambda method, path: next(cuts)
    assert file.fetch(0, 1000) == (bytes(range(250)) * 4)
    with pytest.raises(StoreUnavailable, match=r"bytes 0-999 cannot be read in 6 attempts: ClientPayloadError"):
        file.fetch(0, 1000)


def test_a_range_that_is_answered_with_other_bytes_is_refused(web: StoreProxy, tmp_path: Path) -> None:
    file = a_file(web, tmp_path)
    assert len(file.fetch(0, 1)) == 1
    web.change = lambda answer: (answer[0], answer[1], answer[2][:-3])
    with pytest.raises(StoreUnavailable, match=r"t\.tar: bytes 1000-1999 cannot be read .*: 997 of 1000 bytes came"):
        file.fetch(1000, 2000)
    web.change = lambda answer: (200, {}, bytes(10_000))  # a server without ranges
    with pytest.raises(ValueError, match=r"t\.tar: status 200 for bytes 1000-1999; the server has no ranges"):
        file.fetch(1000, 2000)


@pytest.mark.slow
def test_s3_errors_name_the_shard_and_the_range_and_no_secret(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)  # botocore's own attempts come on top
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    shards = ImageShards.open([bucket.upload(tmp_path / "f")], None, CacheSettings(max_bytes=0))
    assert len(shards.image_bytes(0)) == 1
    offset = int(shards.index(0)[1]["offset"])
    for status in (403, 500):
        bucket.proxy.refuse = lambda method, path, status=status: status  # type: ignore[misc]
        with pytest.raises(ValueError if status == 403 else StoreUnavailable) as caught:
            shards.image_bytes(1)
        message = str(caught.value)
        assert f"{bucket.url}/shard-000000.tar: bytes {offset}-{offset + 1} cannot be read" in message
        assert "\n" not in message
        assert "test-secret" not in message
        assert "test-key" not in message
    bucket.proxy.refuse = lambda method, path: None
    bucket.proxy.change = lambda answer: (answer[0], answer[1], answer[2][:1])
    with pytest.raises(StoreUnavailable, match=r"shard-000000\.tar: bytes .*: 1 of 2 bytes came"):
        shards.image_bytes(1)


def test_secrets_in_a_url_are_refused_and_not_repeated() -> None:
    for url in ("https://me:hidden@host/t.tar", "https://host/t.tar?signature=hidden", "s3://me:hidden@bucket/t.tar"):
        with pytest.raises(ValueError, match="expected a plain URL") as caught:
            ImageShards.open([url], None)
        assert "hidden" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"^gs://b/t\.tar: .*not installed: pip install 'grappa-dist\[gs\]'"):
        ImageShards.open(["gs://b/t.tar"], None)
