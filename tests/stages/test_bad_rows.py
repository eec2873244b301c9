from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.checksums import DamagedArtifact, forget
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_json
from grappa_dist.stages import bad_rows as module
from grappa_dist.stages.bad_rows import BAD_FILE, BadRows, EarlyCheck, bad_reasons, bad_rows

ROWS = 5  # of a shard


def images_of(shards: int) -> ImageShards:
    made = (Shard(f"{i:06d}.tar", f"/none/{i:06d}.tar", ROWS, 9, f"{i:064d}") for i in range(shards))
    return ImageShards(tuple(made), ("/none.npy",) * shards)


def features_of(root: Path, bad: list[dict[int, str]]) -> list[Artifact]:
    made = [Store(root).artifact(f"features/backbone/{i:06d}", {}, {"shard": str(i)}) for i in range(len(bad))]
    for artifact, of_shard in zip(made, bad, strict=True):
        write_json(artifact.begin() / BAD_FILE, {str(place): why for place, why in of_shard.items()})
        artifact.commit()
    return made


def test_bad_rows_are_ascending_whatever_order_the_lists_have(tmp_path: Path) -> None:
    bad = [{3: "cut off", 1: "empty file"}, {}, {4: "cut off", 0: "empty file"}]
    found = bad_reasons(images_of(3), features_of(tmp_path, bad))
    assert found == {1: "empty file", 3: "cut off", 10: "empty file", 14: "cut off"}
    assert list(found) == found.rows.tolist() == [1, 3, 10, 14]
    assert bad_rows(images_of(3), features_of(tmp_path / "none", [{}] * 3)).dtype == np.int64


def test_only_lists_that_have_rows_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [{2: "cut off"} if shard == 70 else {} for shard in range(100)]
    features, opened, load = features_of(tmp_path, bad), list[Path](), module.load_json
    monkeypatch.setattr(module, "load_json", lambda path: (opened.append(path), load(path))[1])
    assert bad_reasons(images_of(100), features) == {352: "cut off"}
    assert opened == [features[70].path / BAD_FILE]


def test_a_list_that_is_not_what_was_written_is_damaged(tmp_path: Path) -> None:
    features = features_of(tmp_path, [{2: "cut off"}])
    (features[0].path / BAD_FILE).write_text('{"3": "cut off"}\n')
    forget()
    with pytest.raises(DamagedArtifact, match=r"bad\.json has 17 bytes"):
        bad_reasons(images_of(1), features)


def test_a_million_reasons_of_a_few_kinds_take_twelve_bytes_each() -> None:
    found = BadRows(np.arange(0, 2_000_000, 2), (f"cut off {i % 3}" for i in range(1_000_000)))
    assert found.rows.nbytes + found._kinds.nbytes == 12_000_000
    assert len(found._reasons) == 3
    assert (found[8], found.get(9), len(found)) == ("cut off 1", None, 1_000_000)


def test_rows_that_do_not_matter_are_taken_out() -> None:
    found = BadRows([2, 5, 9], ["a", "b", "a"])
    assert found.without(frozenset({5, 7})) == {2: "a", 9: "a"}
    assert found.without(frozenset()) is found


def test_an_early_check_counts_each_finished_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = list[tuple[dict[int, str], int]]()
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(module, "check_bad_share", lambda _, bad, limit, rows: counted.append((dict(bad), rows)))
    features = [Store(tmp_path).artifact(f"features/backbone/{i:06d}", {}, {"shard": str(i)}) for i in range(2)]
    early = EarlyCheck(images_of(2), features, 0.25, gone=frozenset({1}))
    early.check()
    for artifact, bad in zip(features, [{"0": "cut off", "1": "cut off"}, {"4": "empty file"}], strict=True):
        write_json(artifact.begin() / BAD_FILE, bad)
        artifact.commit()
        early.check()
        early.check()
    first, both = {0: "cut off"}, {0: "cut off", 9: "empty file"}
    assert counted == [({}, 0), (first, 5), (first, 5), (both, 10), (both, 10)]
