"""Lists of images to leave out: what a line means, which rows go, what is refused; `--drop` of make_shards."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards.cli import main
from grappa_dist.make_shards.exclusions import Excluded, read_exclusions
from tests.stages import tiny


def found(path: Path, text: str, names: str, side: str = "train") -> Excluded:
    """What a list of this text excludes of images that are called by one letter each."""
    path.write_text(text)
    return read_exclusions([str(path)]).among(((name,) for name in names), side)


GROUPS = "group,name,cosine,drop\n1,a,1,0\n1,c,0.99,1\n1,e,0.99,1\n2,b,1,0\n2,x,0.98,1\n"


def test_of_a_group_what_is_dropped_goes_and_the_first_that_is_kept_stands_for_it(tmp_path: Path) -> None:
    excluded = found(tmp_path / "groups.csv", GROUPS, "abcde")
    assert excluded.rows.tolist() == [2, 4]
    assert excluded.firsts.tolist() == [0, 0]
    assert excluded.reasons == ("near-duplicate", "near-duplicate")
    assert excluded.matched.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("group,name\n1,a\n1,c\n2,d\n2,b\n", [1, 2]),  # all but the first of each group
        ("file,reason\nb,blurred\nd,\n", [1, 3]),
        ("\ufeffname,drop\nb,yes\nd,no\n", [1]),
        ("name,side\na,test\nb,train\nc,\n", [1, 2]),
        ("group,name,drop\n1,a,1\n1,b,0\n", [0]),  # edited: another one stays
    ],
)
def test_a_list_needs_no_more_than_names(tmp_path: Path, text: str, rows: list[int]) -> None:
    assert found(tmp_path / "list.csv", text, "abcd").rows.tolist() == rows


def test_images_of_one_name_stay_where_their_group_keeps_it_and_else_go_together(tmp_path: Path) -> None:
    assert found(tmp_path / "a.csv", "group,name,drop\n1,a,0\n1,a,1\n", "aba").rows.tolist() == []
    assert found(tmp_path / "b.csv", "name\na\n", "aba").rows.tolist() == [0, 2]


def test_what_one_list_drops_stands_for_nothing_of_another(tmp_path: Path) -> None:
    lists = {"groups": GROUPS, "outliers": "name,reason\na,outlier\ne,outlier\n", "more": "group,name\nz,d\nz,b\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    excluded = read_exclusions([str(tmp_path / name) for name in lists]).among(((name,) for name in "abcde"), "train")
    assert dict(zip(excluded.rows.tolist(), excluded.firsts.tolist(), strict=True)) == {0: -1, 1: 3, 2: -1, 4: -1}
    assert excluded.reasons[0] == "outlier"


def test_lists_that_drop_each_others_first_images_drop_both(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("group,name\n1,a\n1,b\n")
    (tmp_path / "2").write_text("group,name\n1,b\n1,a\n")
    excluded = read_exclusions([str(tmp_path / "1"), str(tmp_path / "2")]).among((("a",), ("b",)), "train")
    assert (excluded.rows.tolist(), excluded.firsts.tolist()) == ([0, 1], [-1, -1])


def test_a_list_is_named_by_what_it_says_of_a_side(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,side\na,train\n")
    (tmp_path / "b.csv").write_text("name,cosine,side\r\na,0.99,train\r\n")
    (tmp_path / "c.csv").write_text("name,side\na,test\n")
    a, b, c = (read_exclusions([str(tmp_path / f"{name}.csv")]) for name in "abc")
    assert a.digest("train") == b.digest("train") != ""
    assert a.digest("test") == c.digest("train") == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("label\na\n", "no column 'name'; it has label"),
        ("", "no column 'name'; it has none"),
        ("name,drop\na,perhaps\n", "line 2: drop is 'perhaps'; expected 1 or 0"),
        ("name,side\na,left\n", "line 2: side is 'left'; expected train, test or nothing"),
        ("name,drop\n,1\n", "line 2: column 'name' is empty"),
        ("name,drop\na\n", "line 2: expected 2 fields"),
        ('name\n"a\n', "not a CSV"),
    ],
)
def test_what_is_no_list_is_refused_by_its_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_exclusions([str(tmp_path / "list.csv")])


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected a CSV with a column 'name'"):
        read_exclusions([str(tmp_path / "none.csv")])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(8):
        path = tmp_path / "photos" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.picture(number))
    return tmp_path / "photos"


def made(photos: Path, text: str) -> tuple[int, Path]:
    (photos.parent / "groups.csv").write_text(text)
    out = photos.parent / "out"
    given = ["--images", str(photos), "--out", str(out), "--workers", "1"]
    return main([*given, "--drop", str(photos.parent / "groups.csv")]), out


def test_shards_are_made_without_what_a_list_drops_and_left_out_csv_names_it(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absolute = photos / "class 1" / "7.png"
    text = f"group,name,drop\n1,class 0/0.png,0\n1,class 0/4.png,1\n2,gone.png,0\n2,{absolute},1\n"
    status, out = made(photos, text)
    assert status == 0
    names = {}
    for side in ("train", "test"):
        shards = ImageShards.open([out / side], None)
        names[side] = sorted(shards.name(row) for row in range(len(shards)))
    assert names["train"] == ["class 0/0.png", "class 0/2.png", "class 0/6.png"]
    assert names["test"] == ["class 1/1.png", "class 1/3.png", "class 1/5.png"]
    with (out / "left_out.csv").open(newline="") as file:
        listed = list(csv.reader(file))[1:]
    assert listed == [["class 0/4.png", "near-duplicate"], ["class 1/7.png", "near-duplicate"]]
    told = capsys.readouterr().err
    assert "warning: 1 of 4 names in" in told
    assert "no image is called so; the first is 'gone.png', names are as in 'class 0/0.png'" in told


def test_a_list_that_names_no_image_ends_make_shards_before_anything_is_written(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = made(photos, "name\nphotos/class 0/0.png\n")
    assert status == 2
    assert not out.exists()
    assert "1 of 1 name in" in capsys.readouterr().err
