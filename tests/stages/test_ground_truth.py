"""Labels as they come: what cannot be read is counted and named, and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grappa_dist.data.shards import BadLabels, ImageShards
from grappa_dist.stages.ground_truth import ground_truth_of, load_ground_truth, write_ground_truth
from tests.stages import tiny


def test_an_image_whose_json_member_is_broken_counts_as_without_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images", label=lambda row: str(row % 2), task=lambda _: "a"))
    images, read = ImageShards.open(settings.data.train, None), ImageShards.labels

    def broken(self: ImageShards, row: int) -> dict[str, Any] | None:
        if row in (3, 7):
            raise BadLabels(f"image {row}: its JSON member does not parse")
        return read(self, row)

    monkeypatch.setattr(ImageShards, "labels", broken)
    run = tiny.run_in(settings, tmp_path / "run", tiny.Here())
    artifact = ground_truth_of(run.store, images, labelled=True)
    write_ground_truth(run, images, artifact, "evaluate")
    ground_truth = load_ground_truth(artifact)
    assert {row for row in range(len(images)) if ground_truth.labels[row] < 0} == {3, 7}
    assert "2 images count as without a label: image 3: its JSON member does not parse" in capsys.readouterr().err
    write_ground_truth(run, images, artifact, "evaluate")
    assert not capsys.readouterr().err
