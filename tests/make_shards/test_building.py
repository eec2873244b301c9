"""Folders of shards: the same bytes from any number of processes, killed and taken up again or not."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards import filling
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.make_shards.filling import Row
from grappa_dist.make_shards.sources import Encoded

SCRIPT = Path(__file__).parents[2] / "launch" / "make_shards.py"


def noise(size: int, seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + seed % 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def photos(folder: Path, images: int, size: int = 24) -> Path:
    """Images of 4 classes, one of them not an image."""
    for number in range(images):
        path = folder / "photos" / f"class {number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(size, number) if number != 5 else b"nonsense")
    (folder / "photos" / "class 0" / "notes.txt").write_text("none")
    return folder / "photos"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(images: Path, out: Path, workers: int = 1, **settings: int | None) -> list[str]:
    logged: list[str] = []
    make_shards([(None, str(images))], out, CollectionConfig(**settings), Work(workers, logged.append))  # type: ignore[arg-type]
    return logged


@pytest.mark.parametrize("settings", [{}, {"image_size": 16}, {"image_size": 16, "shard_bytes": 20_480}])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, settings: dict[str, int]) -> None:
    images = photos(tmp_path, 41)
    limits = {"images_per_shard": 6} | settings
    for workers in (1, 3):
        make(images, tmp_path / f"out{workers}", workers, **limits)
    one = files_in(tmp_path / "out1")
    assert one == files_in(tmp_path / "out3")
    assert sum(name.endswith(".tar") for name in one) >= 8
    assert not list(tmp_path.glob("*/.*"))
    assert len(ImageShards.open([tmp_path / "out1" / "train"], None)) == 21


def test_processes_import_nothing_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, elsewhere = photos(tmp_path / "photos", 6), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for module in ("random", "threading", "numpy"):
        (elsewhere / f"{module}.py").write_text("raise SystemExit('the one in the current directory')\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    make(images, tmp_path / "out", workers=2)
    assert (tmp_path / "out" / "train").is_dir()


@pytest.mark.parametrize("suffix", ["kept", "re-encoded"])
def test_no_tar_of_copies_is_larger_than_asked_for_and_re_encoded_ones_come_close(tmp_path: Path, suffix: str) -> None:
    images = photos(tmp_path, 120, size=40)
    target = 51_200
    make(images, tmp_path / "out", shard_bytes=target, image_size=20 if suffix == "re-encoded" else None)
    sizes = [tar.stat().st_size for tar in sorted((tmp_path / "out" / "test").glob("*.tar"))]
    assert len(sizes) > 2
    assert all(0.7 * target <= size for size in sizes[:-1])
    assert all(size <= (target if suffix == "kept" else 1.3 * target) for size in sizes)


def test_an_image_larger_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    images = photos(tmp_path, 12)
    (images / "class 3" / "0007.jpg").write_bytes(b"x" * 50_000)
    make(images, tmp_path / "out", shard_bytes=20_480)
    sizes = [tar.stat().st_size for tar in sorted((tmp_path / "out" / "test").glob("*.tar"))]
    assert sorted(size > 20_480 for size in sizes) == [False, False, True]


def test_the_summary_counts_images_classes_shards_bytes_and_why_files_were_left_out_or_kept(tmp_path: Path) -> None:
    images = photos(tmp_path, 20)
    (images / ".cache").mkdir()
    (images / ".cache" / "a.jpg").write_bytes(b"")
    logged = "\n".join(make(images, tmp_path / "out", images_per_shard=4, image_size=16))
    size = sum(tar.stat().st_size for tar in (tmp_path / "out" / "train").glob("*.tar"))
    assert f"train: 10 images, 2 classes, 1 task, 3 shards, {size:,} bytes; written" in logged
    assert "left out: 1 file, of the suffix '.txt'" in logged
    assert "left out: 1 file, hidden" in logged
    assert "0005.jpg does not decode; it keeps row" in logged
    assert "kept as they are, for they do not decode: 1 file, no JPEG, PNG, WEBP, GIF or BMP that can be read" in logged


def test_a_finished_folder_is_known_by_its_plan_and_no_image_is_read_again(tmp_path: Path) -> None:
    images = photos(tmp_path, 12)
    make(images, tmp_path / "out")
    before = files_in(tmp_path / "out")
    path = images / "class 0" / "0000.jpg"
    size = path.stat().st_size
    path.write_bytes(bytes(size))  # names and sizes make the plan
    assert "finished before" in "\n".join(make(images, tmp_path / "out"))
    assert files_in(tmp_path / "out") == before
    path.write_bytes(bytes(size + 1))
    with pytest.raises(ValueError, match="finished, with other shards than these"):
        make(images, tmp_path / "out")


@pytest.fixture
def half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Images, and the unfinished folder of a run that broke off in the third of its four train shards."""
    images = photos(tmp_path, 24)
    make(images, tmp_path / "whole", images_per_shard=3)
    real, read = filling._content, list[str]()

    def content(row: Row, image_size: int | None) -> Encoded:
        read.append(row.where)
        if len(read) > 7:
            raise OSError(f"{row.where}: the disk is gone")
        return real(row, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "_content", content)
        with pytest.raises(OSError, match="the disk is gone"):
            make(images, tmp_path / "out", images_per_shard=3)
    return images, tmp_path / "out" / ".train.partial"


def test_what_broke_off_has_no_name_yet_and_keeps_only_finished_shards(half_done: tuple[Path, Path]) -> None:
    partial = half_done[1]
    assert not (partial.parent / "train").exists()
    assert [tar.name for tar in sorted(partial.glob("*.tar"))] == ["shard-000000.tar", "shard-000001.tar"]
    assert not list((partial / "making").glob("unfinished-*"))


def test_the_next_run_writes_only_what_is_missing(half_done: tuple[Path, Path], tmp_path: Path) -> None:
    kept = half_done[1] / "shard-000000.tar"
    before = kept.stat().st_ino
    logged = "\n".join(make(half_done[0], tmp_path / "out", images_per_shard=3))
    assert "train: 2 of 4 shards were there" in logged
    assert (tmp_path / "out" / "train" / kept.name).stat().st_ino == before
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def cut_tar(partial: Path) -> None:
    os.truncate(partial / "shard-000001.tar", 1024)


def lose_index(partial: Path) -> None:
    (partial / "shard-000000.tar.npy").unlink()


def lose_note(partial: Path) -> None:
    (partial / "making" / "shard-000000.tar.json").unlink()


def damage_note(partial: Path) -> None:
    (partial / "making" / "shard-000000.tar.json").write_text("{}")


def leave_scraps(partial: Path) -> None:
    (partial / "making" / "unfinished-1-ab").mkdir()
    (partial / "making" / "unfinished-1-ab" / "shard-000002.tar").write_bytes(b"half")
    (partial / "shard-000002.tar.npy").write_bytes(b"half")


def lose_everything(partial: Path) -> None:
    shutil.rmtree(partial)
    partial.mkdir()


@pytest.mark.parametrize("spoil", [cut_tar, lose_index, lose_note, damage_note, leave_scraps, lose_everything])
def test_nothing_unfinished_is_mistaken_for_finished(
    half_done: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(half_done[1])
    make(half_done[0], tmp_path / "out", images_per_shard=3)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("with_desk", [True, False])
def test_a_run_killed_just_before_the_last_rename_is_finished_by_the_next(tmp_path: Path, with_desk: bool) -> None:
    images = photos(tmp_path, 12)
    make(images, tmp_path / "out")
    before = files_in(tmp_path / "out")
    partial = tmp_path / "out" / ".train.partial"
    (tmp_path / "out" / "train").rename(partial)
    if with_desk:
        (partial / "making").mkdir()
    make(images, tmp_path / "out")
    assert files_in(tmp_path / "out") == before


def test_another_plan_is_refused_by_what_differs_and_changes_nothing(half_done: tuple[Path, Path]) -> None:
    images, partial = half_done
    before = files_in(partial)
    with pytest.raises(ValueError, match="images_per_shard was 3, now 4; image_size was None, now 9") as refusal:
        make(images, partial.parent, images_per_shard=4, image_size=9)
    assert "run that again to go on, or remove the folder to start over" in str(refusal.value)
    with pytest.raises(ValueError, match=r"begun with another plan \(other files, labels or order"):
        make(images, partial.parent, images_per_shard=3, seed=1)
    (images / "class 0" / "0000.jpg").write_bytes(b"changed")
    with pytest.raises(ValueError, match="begun with another plan"):
        make(images, partial.parent, images_per_shard=3)
    assert files_in(partial) == before


def test_two_runs_do_not_write_at_once(half_done: tuple[Path, Path]) -> None:
    images, partial = half_done
    with (partial / "making" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run is writing here.*; expected one at a time"):
            make(images, partial.parent, images_per_shard=3)
    make(images, partial.parent, images_per_shard=3)


def wait_for(what: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Images that take seconds to decode, and the files that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("many")
    images = photos(folder, 300, size=300)
    make(images, folder / "whole", images_per_shard=5, image_size=32)
    return images, files_in(folder / "whole")


@pytest.mark.parametrize(
    ("number", "to_worker", "status"),
    [
        (signal.SIGKILL, False, -9),
        pytest.param(signal.SIGTERM, False, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, True, 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes_and_leaves_no_process(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, number: int, to_worker: bool, status: int
) -> None:
    images, whole = many
    options = ["--images-per-shard", "5", "--image-size", "32", "--workers", "2"]
    call = [sys.executable, str(SCRIPT), "--images", str(images), "--out", str(tmp_path / "out"), *options]
    making = tmp_path / "out" / ".train.partial" / "making"
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: list(making.glob("*.tar.json")))
        workers = children_of(run.pid)
        worker = next(pid for pid in workers if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(worker if to_worker else run.pid, number)
        stderr = run.communicate(timeout=60)[1]
    assert run.returncode == status
    assert ("a worker process was killed" in stderr) == to_worker
    assert "Traceback" not in stderr
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert not (tmp_path / "out" / "train").exists()
    again = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "shards were there" in again.stderr
    assert files_in(tmp_path / "out") == whole
