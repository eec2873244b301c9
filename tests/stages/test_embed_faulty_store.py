"""Images on a store that fails now and then: the features are those of the same images on a disk, bit for bit."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from grappa_dist import object_store, pipeline
from grappa_dist.object_store import StoreUnavailable
from tests.faults.faulty_http import PASSING, Fault, always, now_and_then
from tests.stages import tiny
from tests.stores import Answer, folder_backend, proxy_to


def embedded(train: list[str], root: Path) -> dict[str, bytes]:
    """Features and bad rows of a run that ends after `embed`, by file."""
    settings = tiny.config(train, resources={"cache_dir": str(root / "cache"), "requests_in_flight": 4})
    pipeline.run_in(tiny.run_in(settings, root, tiny.Here()), "embed")
    kept = [*root.glob("features/*/*/rows.npy"), *root.glob("features/*/*/bad.json")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def test_a_store_that_fails_now_and_then_changes_no_feature_and_one_that_stays_away_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)
    local = tiny.write_shards(tmp_path / "images")
    expected = embedded(local, tmp_path / "of the disk")
    assert len(expected) == 2 * len(local)
    with proxy_to(folder_backend(tmp_path / "images")) as proxy:
        train = [f"{proxy.url}/{Path(path).name}" for path in local]
        mix = now_and_then(seed=0, share=0.3, kinds=PASSING - {Fault.SHORT})  # the length of a whole file is not known
        spoilt: list[bool] = []

        def spoil(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
            found = mix(handler, answer)
            spoilt.append(found is not answer)
            return found

        proxy.spoil = spoil
        assert embedded(train, tmp_path / "of the store") == expected
        assert sum(spoilt) > 5
        proxy.spoil = always(Fault.SLOW_DOWN)
        with pytest.raises(StoreUnavailable, match=r"index\.json: all of it cannot be read in 6 attempts: .*503"):
            embedded(train, tmp_path / "of none")
