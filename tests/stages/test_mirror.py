"""The copy of a run on an object store: nothing half done counts, and a run elsewhere goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from grappa_dist import pipeline
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.checksums import DamagedArtifact
from grappa_dist.config import Config
from grappa_dist.data.open_images import open_images
from grappa_dist.stages.damages import Mending, read_damages
from grappa_dist.stages.flow import artifacts_of
from grappa_dist.stages.mirror import Mirror
from tests.conftest import Bucket
from tests.stages import tiny
from tests.test_artifacts import flip


def artifact_in(root: Path, number: int = 0, *, made: bool = True) -> Artifact:
    artifact = Store(root).artifact(f"labels/k={number}", {"number": number}, {})
    if made:
        folder = artifact.begin()
        (folder / "deep" / "er").mkdir(parents=True)
        for name, size in (("rows-0.npy", 1000 * number + 1), ("empty.bin", 0), ("deep/er/x.json", 7)):
            (folder / name).write_bytes(bytes([number]) * size)
        artifact.commit()
    return artifact


def mending_in(root: Path) -> Mending:
    return Mending(tiny.run_in(tiny.config(["images"]), root, tiny.Here()))


def contents(artifact: Artifact) -> dict[str, bytes]:
    files = (path for path in artifact.path.rglob("*") if path.is_file())
    return {str(path.relative_to(artifact.path)): path.read_bytes() for path in files}


def test_what_was_copied_comes_back_file_by_file_and_the_manifest_is_written_last(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    made = [artifact_in(tmp_path / "a", number) for number in range(3)]
    unfinished = artifact_in(tmp_path / "a", 3, made=False)
    unfinished.begin()
    Mirror(f"{bucket.url}/runs/x").save([*made, unfinished])
    writes = [r.path.split("?")[0].rpartition("/")[2] for r in bucket.proxy.requests if r.method in ("PUT", "POST")]
    assert [at for at, name in enumerate(writes) if name == "manifest.json"] == [3, 7, 11]
    assert not any("k=3" in key for key in bucket.names())

    elsewhere = [artifact_in(tmp_path / "b", number, made=False) for number in range(4)]
    assert len(Mirror(f"{bucket.url}/runs/x/").fetch(elsewhere, mending_in(tmp_path / "b"))) == 3
    for here, there in zip(made, elsewhere, strict=False):
        there.check()
        assert contents(here) == contents(there)
    assert not elsewhere[3].complete
    bucket.proxy.requests.clear()
    again = Mirror(f"{bucket.url}/runs/x")
    again.save(made)
    assert again.fetch(elsewhere, mending_in(tmp_path / "b")) == []
    assert [r.method for r in bucket.proxy.requests] == ["GET"]  # one listing


def test_a_copy_without_its_manifest_does_not_count_and_is_made_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    made, mirror = artifact_in(tmp_path / "a", 2), Mirror(bucket.url)
    bucket.proxy.refuse = lambda method, path: 403 if method == "PUT" and "manifest" in path else None
    with pytest.raises(ValueError, match=rf"mirror={bucket.url}: cannot be used \(labels/k=2.*written\): Permission"):
        mirror.save([made])
    assert len(bucket.names()) == 3
    absent = artifact_in(tmp_path / "b", 2, made=False)
    assert Mirror(bucket.url).fetch([absent], mending_in(tmp_path / "b")) == []
    bucket.proxy.refuse = lambda method, path: None
    mirror.save([made])
    assert Mirror(bucket.url).fetch([absent], mending_in(tmp_path / "b")) == [absent]


@pytest.mark.parametrize("damage", ["changed", "short", "missing", "manifest"])
def test_a_damaged_copy_is_set_aside_on_the_store_and_made_and_copied_anew(
    damage: str, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.allow_writing()
    made = artifact_in(tmp_path / "a", 2)
    Mirror(bucket.url).save([made])
    key = f"{made.name}/{'manifest.json' if damage == 'manifest' else 'rows-0.npy'}"
    if damage == "missing":
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    else:
        bucket.put(key, b"short" if damage in ("short", "manifest") else b"x" * 2001)
    before = bucket.names()
    absent, mirror, mending = artifact_in(tmp_path / "b", 2, made=False), Mirror(bucket.url), mending_in(tmp_path / "b")
    assert mirror.fetch([absent], mending) == []
    assert not absent.path.exists()
    assert bucket.names() == [name.replace(made.name, f"{made.name}.damaged") for name in before]
    assert f"damaged: {made.name}: {key.rpartition('/')[2]} " in capsys.readouterr().err
    assert [d.aside for d in read_damages(tmp_path / "b")] == [f"{bucket.url}/{made.name}.damaged"]
    mirror.save([artifact_in(tmp_path / "b", 2)])
    assert Mirror(bucket.url).fetch([artifact_in(tmp_path / "c", 2, made=False)], mending_in(tmp_path / "c"))


def test_what_is_damaged_here_is_not_copied_and_comes_back_from_a_copy_that_is_known_to_be_whole(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    made = artifact_in(tmp_path / "a", 2)
    Mirror(bucket.url).save([made])
    other = artifact_in(tmp_path / "a", 3)
    flip(other.path / "rows-0.npy")
    flip(made.path / "rows-0.npy")
    with pytest.raises(DamagedArtifact, match=r"k=3.*rows-0.npy does not hold what was written"):
        Mirror(bucket.url).save([made, other])
    assert not any(name.startswith(f"{other.name}/manifest") for name in bucket.names())
    mending = mending_in(tmp_path / "a")
    assert mending.check([made])
    assert Mirror(bucket.url).fetch([made], mending) == [made]
    made.check(None)


def test_a_copy_without_checksums_does_not_replace_what_was_damaged(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    made = artifact_in(tmp_path / "a", 2)
    Mirror(bucket.url).save([made])
    sizes = {name: listed.bytes for name, listed in made.files.items()}
    manifest = {"kind": made.kind, "fingerprint": made.fingerprint, "files": sizes}
    bucket.put(f"{made.name}/manifest.json", json.dumps(manifest).encode())
    lost = artifact_in(tmp_path / "b", 2, made=False)
    assert Mirror(bucket.url).fetch([lost], mending_in(tmp_path / "b")) == [lost]  # it is all there is
    flip(made.path / "rows-0.npy")
    mending = mending_in(tmp_path / "a")
    mending.check([made])
    assert Mirror(bucket.url).fetch([made], mending) == []
    assert any(name.startswith(f"{made.name}.damaged/") for name in bucket.names())


def test_a_manifest_cannot_name_a_file_outside_of_its_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    absent = artifact_in(tmp_path / "b", 2, made=False)
    manifest = {"kind": absent.kind, "fingerprint": absent.fingerprint, "files": {"../../outside": 3}}
    bucket.put(f"{absent.name}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ValueError, match=r"manifest.json: names '\.\./\.\./outside', outside of its folder"):
        Mirror(bucket.url).fetch([absent], mending_in(tmp_path / "b"))
    assert not absent.complete


def settings_on(bucket: Bucket, folder: Path) -> Config:
    """Images and the mirror of a tiny run in one bucket."""
    local = tiny.write_shards(folder / "images")
    paths = [bucket.upload(Path(path), f"images/{number}/") for number, path in enumerate(local)]
    settings = tiny.config(paths, adapt={"epochs": 1}, resources={"cache_dir": str(folder / "cache")})
    return settings.model_copy(update={"mirror": f"{bucket.url}/runs/tiny"})


@pytest.mark.slow
def test_a_run_that_lost_its_directory_goes_on_from_the_store_and_does_nothing_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    settings, here = settings_on(bucket, tmp_path), tiny.Here()
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", here))
    assert "k=6" in here.asked
    report = (tmp_path / "run" / "report" / "report.html").read_bytes()
    latest = json.loads(bucket.client.get_object(Bucket=bucket.name, Key="runs/tiny/latest.json")["Body"].read())
    assert f"runs/tiny/{latest['report']}/report.html" in bucket.names()
    assert f"runs/tiny/{latest['model']}/model.safetensors" in bucket.names()

    shutil.rmtree(tmp_path / "run")
    again = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, tmp_path / "elsewhere", again))
    assert again.asked == []
    assert (tmp_path / "elsewhere" / "report" / "report.html").read_bytes() == report
    train, _ = open_images(settings.data, Store(tmp_path / "elsewhere"))
    for artifact in artifacts_of(pipeline.lay_out(settings, Store(tmp_path / "elsewhere"), train, None)):
        artifact.check()


def test_a_run_that_was_to_end_early_names_no_report(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    pipeline.run_in(tiny.run_in(settings_on(bucket, tmp_path), tmp_path / "run", tiny.Here()), "embed")
    assert any(name.endswith("rows.npy") for name in bucket.names())
    assert "runs/tiny/latest.json" not in bucket.names()


@pytest.mark.long
def test_a_store_that_cannot_be_written_to_fails_the_run_at_its_end_and_loses_nothing(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.allow_writing()
    settings = settings_on(bucket, tmp_path)
    bucket.proxy.refuse = lambda method, path: None if method in ("GET", "HEAD") else 403
    with pytest.raises(ValueError, match=r"mirror=s3://.*written.*PermissionError"):
        pipeline.run_in(tiny.run_in(settings, tmp_path / "run", tiny.Here()))
    assert "warning: mirror=s3://" in capsys.readouterr().err
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    bucket.proxy.refuse = lambda method, path: None
    again = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, tmp_path / "run", again))
    assert again.asked == []
    assert "runs/tiny/latest.json" in bucket.names()
