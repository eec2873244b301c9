"""Runs and data that are copied, moved or renamed: what was made of the same bytes is not made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from tests.stages import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, and a `run` that has the artefacts made of them, up to its labels, without content."""
    folder = tmp_path_factory.mktemp("before")
    tiny.write_shards(folder / "images")
    for artifact in made(tiny.config(folders(folder / "images")), folder / "run"):
        artifact.begin()
        artifact.commit()
    return folder


def made(settings: Config, root: Path) -> list[Artifact]:
    """Features, labels and partitions of a run, finished or not."""
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, root / "index"), None)
    return [*flow.features, *flow.labels.values(), flow.partitions]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "another mount", symlinks=True))


def missing(settings: Config, root: Path) -> set[str]:
    """Kinds of artefacts that a run would still make, as far as its labels."""
    return {artifact.kind for artifact in made(settings, root) if not artifact.complete}


def folders(images: Path) -> list[str]:
    return sorted(str(path) for path in images.iterdir())


def test_copies_links_and_other_mounts_of_run_and_data_keep_everything(copy: Path, tmp_path: Path) -> None:
    assert missing(tiny.config(folders(copy / "images")), copy / "run") == set()
    (tmp_path / "data").symlink_to(copy / "images")
    (tmp_path / "linked run").symlink_to(copy / "run")
    assert missing(tiny.config(folders(tmp_path / "data")), tmp_path / "linked run") == set()


def rename(folder: Path, name: str) -> None:
    """Another name for the one shard of a folder, which another program may give it: its index is then made again."""
    (tar,) = folder.glob("*.tar")
    tar.rename(folder / name)
    for path in (folder / "index.json", *folder.glob("*.npy")):
        path.unlink()


def test_renamed_shards_keep_everything_where_their_order_stays(copy: Path) -> None:
    for number, folder in enumerate(folders(copy / "images")):
        rename(Path(folder), f"renamed-{number}.tar")
    assert missing(tiny.config(folders(copy / "images")), copy / "run") == set()


def test_shards_in_another_order_keep_their_features_and_nothing_else(copy: Path) -> None:
    paths = folders(copy / "images")
    rename(Path(paths[0]), "renamed.tar")
    kinds = missing(tiny.config(paths[::-1]), copy / "run")
    assert {kind.partition("/")[0] for kind in kinds} == {"labels", "partitions"}


def test_only_features_of_the_same_bytes_and_settings_are_taken(copy: Path) -> None:
    first, *others = folders(copy / "images")
    rename(Path(first), "renamed.tar")
    smaller = missing(tiny.config([first, *others], embed={"batch_size": 4}), copy / "run")
    assert sum(kind.startswith("features/") for kind in smaller) == len(tiny.SIZES)
    (copy / "run" / "features" / "backbone" / "of another program").mkdir()
    for path in (copy / "run" / "features" / "backbone").glob("part0*/manifest.json"):
        path.write_text("no JSON")
    assert "features/backbone/renamed" in missing(tiny.config([first, *others]), copy / "run")
