"""--clean: what no result of a configuration needs, and nothing else, whoever put it there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.clean import clean
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out
from grappa_dist.report.collect import KEEP_REPORTS, remove_old_reports
from grappa_dist.stages.flow import artifacts_of
from tests.data.written import write_tar
from tests.stages import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = tiny.write_shards(tmp_path_factory.mktemp("images"))
    return [*paths, str(write_tar(Path(paths[0]).parent / "raw.tar", {"a.png": tiny.picture(0)}))]


def artifacts(settings: Config, root: Path) -> list[Artifact]:
    return artifacts_of(lay_out(settings, Store(root), ImageShards.open(settings.data.train, root / "index"), None))


def make(root: Path, *settings: Config) -> None:
    """All artefacts of some configurations, without their content."""
    wanted = {a.name: a for each in settings for a in artifacts(each, root)}
    for artifact in (a for a in wanted.values() if not a.complete):
        (artifact.begin() / "content").write_bytes(bytes(2000))
        (artifact.partial / "names.json").write_text('{"tasks": [], "labels": []}')  # that of ground truth is read
        artifact.commit()


def listed(text: str) -> set[str]:
    return set(re.findall(r"^ *[\d.]+ \w+  (.*?)  \(", text, re.MULTILINE))


def paths_in(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")} - {".lock"}


@pytest.fixture
def mine(shards: list[str]) -> Config:
    return tiny.config(shards)


@pytest.fixture
def other(shards: list[str]) -> Config:
    return tiny.config(shards, clustering={"num_labels": (4, 5)})


def test_artefacts_of_other_settings_are_listed_with_their_size_and_go_only_when_asked(
    tmp_path: Path, mine: Config, other: Config
) -> None:
    make(tmp_path, mine)
    needed = paths_in(tmp_path)
    assert "nothing that this configuration does not need" in clean(mine, tmp_path, remove=True)
    make(tmp_path, other)
    before = paths_in(tmp_path)
    ours, theirs = ({a.name for a in artifacts(each, tmp_path)} for each in (mine, other))
    text = clean(mine, tmp_path, remove=False)
    assert listed(text) == theirs - ours
    assert re.search(rf"^{len(theirs - ours)} files and folders, .* KiB; nothing is removed without --yes$", text, re.M)
    assert paths_in(tmp_path) == before
    assert clean(mine, tmp_path, remove=True).endswith("removed")
    assert {path for path in paths_in(tmp_path) if (tmp_path / path).is_file()} == {
        path for path in needed if (tmp_path / path).is_file()
    }


def test_work_in_progress_stays_and_what_was_set_aside_or_half_removed_goes(
    tmp_path: Path, mine: Config, other: Config
) -> None:
    make(tmp_path, mine)
    labels = next(a for a in artifacts(mine, tmp_path) if a.kind == "labels/k=4")
    report = artifacts(mine, tmp_path)[-2]
    labels.path.rename(labels.partial)
    for ending in ("damaged", "damaged-2", "removed", "partial.fetched"):
        (tmp_path / f"{labels.name}.{ending}").mkdir()
    report.begin()  # again, though it is finished
    theirs = next(a for a in artifacts(other, tmp_path) if a.kind == "labels/k=5")
    theirs.begin()
    gone = {f"{labels.name}.{ending}" for ending in ("damaged", "damaged-2", "removed", "partial.fetched")}
    gone |= {f"{report.name}.partial", f"{theirs.name}.partial"}
    assert listed(clean(mine, tmp_path, remove=True)) == gone
    assert labels.partial.exists()
    assert not any((tmp_path / name).exists() for name in gone)


def test_jobs_of_several_sets_stay_while_one_of_their_sets_is_missing(
    tmp_path: Path, mine: Config, other: Config
) -> None:
    make(tmp_path, mine)
    sets = [a for a in artifacts(mine, tmp_path) if a.kind.startswith("adaptors/")]
    theirs = [a.name for a in artifacts(other, tmp_path) if a.kind == "adaptors/k=5"]
    for job, names in (("a", [s.name for s in sets]), ("b", theirs)):
        (tmp_path / "packs" / job).mkdir(parents=True)
        (tmp_path / "packs" / job / "pack.json").write_text(json.dumps({"sets": names}))
    (tmp_path / "packs" / "of another program").mkdir()
    sets[0].path.rename(sets[0].partial)
    assert listed(clean(mine, tmp_path, remove=False)) == {"packs/b"}
    sets[0].partial.rename(sets[0].path)
    assert listed(clean(mine, tmp_path, remove=False)) == {"packs/a", "packs/b"}


def test_what_other_programs_put_there_stays(tmp_path: Path, mine: Config, other: Config) -> None:
    make(tmp_path, mine, other)
    for name in ("notes.txt", "features/notes.txt", "labels/old-0123456789/x.bin", "mine-0123456789/x", ".x/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "labels" / "k=7-0123456789").symlink_to(tmp_path / "labels")
    theirs = next(a for a in artifacts(other, tmp_path) if a.kind == "labels/k=5")
    (theirs.path / "notes.txt").write_text("mine")
    report = next(a for a in artifacts(other, tmp_path) if a.kind == "reports/report")
    Store(tmp_path).publish("report", report)
    text = clean(mine, tmp_path, remove=True)
    assert re.search(rf"kept  {theirs.name}  \(it has files that are not ours\)", text)
    assert (tmp_path / "report" / "content").exists()
    left = paths_in(tmp_path)
    assert {"notes.txt", "features/notes.txt", "labels/old-0123456789/x.bin", "mine-0123456789/x", ".x/y"} <= left
    assert {"labels/k=7-0123456789", f"{theirs.name}/notes.txt", f"{theirs.name}/content"} <= left


def test_the_index_of_other_shards_and_temporary_files_go(tmp_path: Path, mine: Config, shards: list[str]) -> None:
    ImageShards.open([write_tar(tmp_path / "other.tar", {"b.png": tiny.picture(1)})], tmp_path / "run" / "index")
    theirs = paths_in(tmp_path / "run")
    make(tmp_path / "run", mine)
    for name in (".report.json.123.0a1b2c3d", "index/.x.npy.123.0a1b2c3d", "index/.keep", ".env.local"):
        (tmp_path / "run" / name).write_text("")
    found = listed(clean(mine, tmp_path / "run", remove=True))
    assert found == {*theirs, ".report.json.123.0a1b2c3d", "index/.x.npy.123.0a1b2c3d"} - {"index"}
    assert ImageShards.open(shards, tmp_path / "run" / "index", write=False).fingerprint
    assert (tmp_path / "run" / ".env.local").exists()
    assert (tmp_path / "run" / "index" / ".keep").exists()


def test_nothing_is_cleaned_while_a_run_writes_or_where_none_is(tmp_path: Path, mine: Config) -> None:
    make(tmp_path / "run", mine)
    with Store(tmp_path / "run").lock(), pytest.raises(ValueError, match="another run"):
        clean(mine, tmp_path / "run", remove=True)
    with pytest.raises(ValueError, match="no such directory"):
        clean(mine, tmp_path / "none", remove=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="nothing at"):  # the data is gone: unknown is what is needed
        clean(tiny.config([str(tmp_path / "gone")]), tmp_path / "run", remove=True)
    assert all(artifact.complete for artifact in artifacts(mine, tmp_path / "run"))


def test_the_newest_reports_are_kept(tmp_path: Path) -> None:
    made = []
    for number in range(KEEP_REPORTS + 3):
        made.append(Store(tmp_path).artifact("reports/report", {"number": number}, {}))
        made[-1].begin()
        made[-1].commit()
        manifest = json.loads((made[-1].path / "manifest.json").read_text())
        stamp = {"created": f"2026-01-{number + 1:02d}T00:00:00Z"}
        (made[-1].path / "manifest.json").write_text(json.dumps(manifest | stamp))
    remove_old_reports(tmp_path, made[0])
    assert [report.complete for report in made] == [True] + [False] * 3 + [True] * (KEEP_REPORTS - 1)
