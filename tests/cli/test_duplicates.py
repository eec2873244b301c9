"""`grappa-dist duplicates` on a folder and on embeddings, which need no model."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from grappa_dist.cli.duplicates import command
from tests.cli.calling import called
from tests.retrieval.photos import model_in, write_photos


def test_copies_are_one_group_in_the_csv_and_embeddings_need_no_model(tmp_path: Path) -> None:
    photos, keep, out = tmp_path / "photos", str(tmp_path / "keep"), tmp_path / "groups.csv"
    write_photos(photos, bad=("cat/1.png",))
    shutil.copyfile(photos / "cat" / "0.png", photos / "cat" / "copy\n.png")
    given = ["--images", str(photos), "--threshold", "0.999999", "--out", str(out)]
    first = called(command, "--model", model_in(tmp_path / "run"), "--keep", keep, *given)
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].startswith("1 group of near-duplicates among 12 images; without them, 11 images are left")
    assert lines[1] == f"groups  {out}"
    assert lines[2] == "left out: 1 of 13 images could not be read"
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))
    assert [line[:2] for line in found[1:]] == [["1", "cat/0.png"], ["1", "cat/copy\n.png"]]
    again = called(command, "--images", keep, "--threshold", "0.999999", "--out", str(out))
    assert again.out == first.out
    assert called(command, *given).err.endswith("images need a model that embeds them: --model (embeddings need none)")
