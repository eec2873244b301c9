"""An index of embeddings: what it finds is what an exact search finds; it grows, and is one state at any moment."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.console import Console
from grappa_dist.files import lock_file
from grappa_dist.retrieval import faiss_index
from grappa_dist.retrieval import index as module
from grappa_dist.retrieval.collection import stored
from grappa_dist.retrieval.index import SearchIndex, build_index, describe_index, open_index
from grappa_dist.retrieval.nearest import nearest
from tests.retrieval.embedded import BAD, CHANNELS, EACH, write_embeddings
from tests.test_artifacts import flip

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]


def built(folder: Path) -> SearchIndex:
    build_index(folder, folder / "model", Console())
    return open_index(folder)


def names_in(index: SearchIndex) -> list[str]:
    return [index.collection.name(row) for row in range(len(index.collection))]


def check_exact(index: SearchIndex, k: int = 5) -> None:
    """What is found is what the exact search finds."""
    collection = index.collection
    queries = np.concatenate(collection.rows)[::7] + 0.01
    expected = nearest(queries, collection.rows, collection.bad, k, CPU)
    found = index.nearest(queries, k)
    assert found.rows.tolist() == expected.rows.tolist()
    torch.testing.assert_close(found.cosines, expected.cosines)


@pytest.fixture(params=["Flat", "IVF"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether indexes of some hundred rows have lists; with all probed, what they find is exact."""
    if request.param == "IVF":
        monkeypatch.setattr(faiss_index, "FLAT_ROWS", 30)
        monkeypatch.setattr(faiss_index, "LISTS_PER_ROOT", 0.5)
        monkeypatch.setattr(faiss_index, "RECALL", 1.01)
    return str(request.param)


def test_an_index_finds_what_an_exact_search_finds_and_grows_and_shrinks_with_the_embeddings(
    kind: str, tmp_path: Path
) -> None:
    first = built(write_embeddings(tmp_path, [0, 1, 2]))
    assert kind in first.kind.factory
    check_exact(first)
    assert describe_index(first.path).startswith(
        f"index       {tmp_path}/search: {3 * EACH - 3} images, {first.kind.factory}"
    )
    write_embeddings(tmp_path, [2, 4, 0], gone={0: [0, 1, BAD, EACH - 1]})
    second = built(tmp_path)
    check_exact(second)
    of_shards = {number: [f"{number}/{place}.png" for place in range(EACH)] for number in (0, 2, 4)}
    of_shards[0] = [name for name in of_shards[0] if name not in ("0/0.png", "0/1.png", "0/3.png", "0/39.png")]
    assert names_in(second) == [name for number in (0, 2, 4) for name in of_shards[number]]
    assert len(names_in(first)) == 3 * EACH
    check_exact(first)  # who has the old one open goes on with it
    assert len(list((tmp_path / "search").glob("*.faiss"))) == 1


def test_fewer_rows_than_hits_are_all_found_once(kind: str, tmp_path: Path) -> None:
    index = built(write_embeddings(tmp_path, [0]))
    found = index.nearest(np.eye(CHANNELS, dtype=np.float32), 1000)
    assert found.rows.shape == (CHANNELS, EACH - 1)
    assert all(sorted(row) == [place for place in range(EACH) if place != BAD] for row in found.rows.tolist())
    with pytest.raises(ValueError, match=rf"queries of shape \(1, 3\): expected \(q, {CHANNELS}\)"):
        index.nearest(np.ones((1, 3), np.float32), 2)


def test_without_faiss_the_search_is_exact_and_no_index_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(write_embeddings(tmp_path, [0, 1]))
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = open_index(tmp_path)
    assert index.faiss is None
    check_exact(index)
    with pytest.raises(
        ValueError, match=r"--index: needs faiss, which is not installed: pip install 'grappa-dist\[cpu\]'"
    ):
        build_index(tmp_path, tmp_path / "model", Console())


def test_a_damaged_index_is_refused_by_name_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = built(write_embeddings(tmp_path, [0, 1]))
    (file,) = index.path.parent.glob("*.faiss")
    flip(file, -3)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(file))}: does not hold what was written: .*run the command"
    ):
        open_index(tmp_path)
    check_exact(built(tmp_path))
    assert f"warning: the index is made anew: {file}: does not hold" in capsys.readouterr().err
    index.path.write_text("{")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(index.path))}: not JSON"):
        open_index(tmp_path)
    check_exact(built(tmp_path))
    flip(tmp_path / "shard-1" / "rows.npy", -3)
    with pytest.raises(ValueError, match=r"shard-1/rows.npy: does not hold what was written"):
        open_index(tmp_path)


def test_a_list_of_an_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    index = built(write_embeddings(tmp_path, [0]))
    listed = json.loads(index.path.read_text())
    for wrong in ("../../secret", "/etc/passwd", 3):
        index.path.write_text(json.dumps({**listed, "index": {**listed["index"], "path": wrong}}))
        with pytest.raises(ValueError, match=r"is no list of an index \(index.path="):
            open_index(tmp_path)
    index.path.write_text(json.dumps({**listed, "format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        open_index(tmp_path)


WRONG = (None, True, -1, 10**30, math.inf, math.nan, "", "../x", "/etc/passwd", "\0", [], [10**30], {}, {"a": 1})


@pytest.mark.parametrize("name", ["search/index.json", "embeddings.json", "shard-0/names.json", "shard-0/bad.json"])
def test_whatever_a_list_of_anyone_says_it_is_used_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    built(write_embeddings(tmp_path, [0], gone={0: [4]}))
    written, index = tmp_path / name, tmp_path / "search" / "index.json"
    whole, listed = json.loads(written.read_text()), json.loads(index.read_text())
    index.write_text(json.dumps({**listed, "shards": [{**listed["shards"][0], "xxh3": {}}]}))
    errors = list[str]()
    for place in _places(whole):
        for wrong in (*WRONG, "removed"):
            written.write_text(json.dumps(_with(whole, place, wrong)))
            try:
                found = stored(tmp_path, None) if name == "embeddings.json" else open_index(tmp_path).collection
                assert all(isinstance(found.name(row), str) for row in (0, len(found) - 1, *found.bad))
                found.image(0)
            except ValueError as error:
                errors.append(str(error))
    assert len(errors) > len(WRONG) // 2
    assert not [error for error in errors if "\n" in error]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in a JSON text; of a list the first two."""
    for key in value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ():
        yield (*at, key)
        yield from _places(value[key], (*at, key))


def _with(whole: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    found = json.loads(json.dumps(whole))
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = wrong
    if wrong == "removed":
        del inside[place[-1]]
    return found


def test_an_index_of_other_rows_than_its_list_says_finds_nothing_wrong(tmp_path: Path) -> None:
    index = built(write_embeddings(tmp_path, [0]))
    listed = json.loads(index.path.read_text())
    listed["shards"][0]["first_id"] = 7  # so that the ids of the index name no row
    index.path.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="has rows that its list does not have"):
        open_index(tmp_path).nearest(np.eye(CHANNELS, dtype=np.float32), 3)
    other = built(write_embeddings(tmp_path / "other", [0, 1]))
    listed["index"] = json.loads(other.path.read_text())["index"]
    (index.path.parent / listed["index"]["path"]).write_bytes(
        (other.path.parent / listed["index"]["path"]).read_bytes()
    )
    index.path.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=f"has {2 * EACH - 2} rows of {CHANNELS} channels, expected {EACH - 1} of"):
        open_index(tmp_path)


def test_an_index_is_built_by_one_process_at_a_time_and_of_some_image(tmp_path: Path) -> None:
    built(write_embeddings(tmp_path, [0]))
    with (
        lock_file(tmp_path / "search" / "lock"),
        pytest.raises(ValueError, match="another process builds its index"),
    ):
        build_index(tmp_path, tmp_path / "model", Console())
    with pytest.raises(ValueError, match="there is no index; `grappa-dist embed --index` with --out"):
        open_index(tmp_path / "elsewhere")
    every = range(EACH)
    write_embeddings(tmp_path, [0], gone={0: [place for place in every if place != BAD]})
    with pytest.raises(ValueError, match="there is nothing to index: none of 1 images could be read"):
        build_index(tmp_path, tmp_path / "model", Console())


@pytest.mark.long
def test_a_build_that_is_killed_before_any_of_its_steps_leaves_the_old_index_or_the_new(tmp_path: Path) -> None:
    built(write_embeddings(tmp_path / "old", [0, 1]))
    write_embeddings(tmp_path / "new", [1, 2], gone={1: [4]})
    command = [
        sys.executable,
        "-m",
        "tests.retrieval.killed_builds",
        *(str(tmp_path / d) for d in ("old", "new", "work")),
    ]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, timeout=500, check=True)
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert all("error" not in one for one in told), ended.stdout
    old, new = told[0]["names"], told[-1]["names"]
    assert (len(old), len(new)) == (2 * EACH, 2 * EACH - 1)
    killed, again = [one for one in told if one["step"] >= 0], [one for one in told if one["step"] < 0]
    states = [one["names"] for one in killed]
    assert {tuple(state) for state in states} == {tuple(old), tuple(new)}
    assert states == sorted(states, key=lambda state: state == new)  # old before a step, new from then on
    assert all(one["names"] == new and one["hits"] == told[-1]["hits"] for one in again)
    assert all(one["files"] == [".faiss", ".json", ".parquet"] for one in (*again, killed[-1]))  # nothing is left over
    assert len(killed) == 9  # three files synced and renamed, two removed; and the one that was not killed


def test_a_reader_of_an_index_that_is_replaced_at_that_moment_reads_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(write_embeddings(tmp_path, [0, 1]))
    read, builds = module._opened, list[Path]()

    def replaced_first(path: Path, device: torch.device) -> SearchIndex:
        listed = path.read_bytes()
        if not builds:
            builds.append(build_index(write_embeddings(tmp_path, [1, 2]), tmp_path / "model", Console()))
            fresh = path.read_bytes()
            path.write_bytes(listed)  # what the reader has read before
            try:
                return read(path, device)
            finally:
                path.write_bytes(fresh)
        return read(path, device)

    monkeypatch.setattr(module, "_opened", replaced_first)
    assert names_in(open_index(tmp_path))[-1] == "2/39.png"


def test_readers_see_whole_states_while_an_index_is_built_again_and_again(tmp_path: Path) -> None:
    built(write_embeddings(tmp_path, [0, 1]))
    stop, seen, failed = Event(), set[tuple[str, ...]](), list[BaseException]()

    def read() -> None:
        while not stop.is_set():
            try:
                index = open_index(tmp_path)
                seen.add(tuple(names_in(index)))
                check_exact(index)
            except Exception as error:
                failed.append(error)
                return

    reader = Thread(target=read)
    reader.start()
    for number in range(12):
        built(write_embeddings(tmp_path, [number % 3, 5]))
    stop.set()
    reader.join()
    assert failed == []
    assert {len(names) for names in seen} == {2 * EACH}


BESIDE_TORCH_UTILS = """
import faiss, numpy as np
import faiss.contrib.torch_utils
from grappa_dist.retrieval.faiss_index import search
rows = np.eye(8, dtype=np.float32)
index = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
index.train(rows)
index.add(rows)
assert search(index, rows, 2, probes=1)[1][:, 0].tolist() == list(range(8))
"""


def test_lists_are_searched_where_a_package_has_replaced_the_search_of_faiss() -> None:
    done = subprocess.run([sys.executable, "-c", BESIDE_TORCH_UTILS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
