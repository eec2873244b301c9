"""Runs and data that are copied, moved or renamed: what was made of the same bytes is not made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grappa_dist import pipeline
from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.stages.mirror import artifacts_of
from tests.stages import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and a finished `run` of them, up to its labels."""
    folder = tmp_path_factory.mktemp("before")
    pipeline._run(
        tiny.run_in(tiny.config(tiny.write_shards(folder / "images")), folder / "run", tiny.Here()), "pseudo_label"
    )
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "another mount", symlinks=True))


def missing(settings: Config, root: Path) -> set[str]:
    """Kinds of artefacts that a run would still make, as far as `pseudo_label`."""
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, root / "index"), None)
    made = [*flow.features, *flow.labels.values(), flow.partitions]
    assert {a.name for a in made} <= {a.name for a in artifacts_of(flow)}
    return {artifact.kind for artifact in made if not artifact.complete}


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
    settings = tiny.config(folders(copy / "images"))
    assert missing(settings, copy / "run") == set()
    pipeline._run(tiny.run_in(settings, copy / "run", tiny.Here()), "pseudo_label")
    assert not list((copy / "run" / "features").glob("*/renamed-*"))


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
