"""From a CSV, a tar or class folders to shards: splits, bytes, and one clear line for what is wrong."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from grappa_dist.data.shards import ImageShards
from launch.make_shards import main

SCRIPT = Path(__file__).parents[2] / "launch" / "make_shards.py"


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pair(folder: Path, task: str, classes: dict[str, int], split: str = "train") -> list[str]:
    """A CSV and its tar; the arguments that name them."""
    lines = ["file,split,fine,coarse,dataset"]
    with tarfile.open(folder / f"{task}.tar", "w") as tar:
        for label, images in classes.items():
            for image in range(images):
                member = tarfile.TarInfo(f"{task}/{label}.{image}.png")
                data = png(len(lines))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                lines.append(f"{member.name},{split},{label},any,{task}")
    (folder / f"{task}.csv").write_text("\n".join(lines) + "\n")
    return ["--csv", str(folder / f"{task}.csv"), "--images", str(folder / f"{task}.tar")]


def write_images(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))


def rows_of(folder: Path) -> list[tuple[str, str, bytes]]:
    shards = ImageShards.open([folder], None)
    labels = [shards.labels(row) or {"task": "-", "label": "-"} for row in range(len(shards))]
    return [(label["task"] or "-", label["label"] or "-", shards.image_bytes(row)) for row, label in enumerate(labels)]


def classes_in(folder: Path) -> set[str]:
    return {f"{task}:{label}" for task, label, _ in rows_of(folder)}


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that a wrong call prints."""
    assert main([*map(str, argv)]) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert printed.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("make_shards: ")
    return lines[0]


def test_the_first_half_of_the_classes_rounded_up_trains_in_every_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    birds = write_pair(tmp_path, "birds", {"c": 2, "a": 3, "b": 1})
    tools = write_pair(tmp_path, "tools", {"a": 1, "z": 4})
    assert main([*birds, *tools, "--out", str(tmp_path / "out"), "--images-per-shard", "4"]) == 0
    assert classes_in(tmp_path / "out" / "train") == {"birds:a", "birds:b", "tools:a"}
    assert classes_in(tmp_path / "out" / "test") == {"birds:c", "tools:z"}
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[1:] == [["birds", "2", "4", "1", "2"], ["tools", "1", "1", "1", "4"], ["all", "3", "5", "2", "6"]]
    assert len(ImageShards.open([tmp_path / "out" / "train"], None).shards) == 2


def test_images_are_copied_byte_for_byte_and_train_is_mixed_by_the_seed(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "birds", {"a": 20, "b": 20})
    for out, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        assert main([*pair, "--out", str(tmp_path / out), "--seed", seed]) == 0
    one, two, three = (rows_of(tmp_path / out / "train") for out in ("one", "two", "three"))
    assert one == two != three
    assert sorted(data for _, _, data in one) == sorted(png(shade) for shade in range(1, 21))
    assert [data for _, _, data in one] != [png(shade) for shade in range(1, 21)]
    assert [data for _, _, data in rows_of(tmp_path / "one" / "test")] == [png(shade) for shade in range(21, 41)]


def test_a_second_call_leaves_finished_shards_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, out = write_pair(tmp_path, "birds", {"a": 3, "b": 3}), tmp_path / "out"
    assert main([*pair, "--out", str(out)]) == 0
    assert main([*pair, "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("was finished before") == 2
    assert "with other shards" in refused(capsys, *pair, "--out", out, "--seed", "5")
    assert "have no test part" in refused(capsys, *pair, "--out", out, "--split", "none")
    assert sorted(path.name for path in out.iterdir()) == ["test", "train"]


def test_the_split_column_is_obeyed_and_other_values_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_pair(tmp_path, "birds", {"a": 2, "b": 1})
    text = (tmp_path / "birds.csv").read_text()
    (tmp_path / "birds.csv").write_text(text.replace("a.1.png,train", "a.1.png,test"))
    assert main([*pair, "--split", "column", "--out", str(tmp_path / "out")]) == 0
    assert [data for _, _, data in rows_of(tmp_path / "out" / "test")] == [png(2)]
    capsys.readouterr()
    (tmp_path / "birds.csv").write_text(text.replace("a.1.png,train", "a.1.png,holdout"))
    message = refused(capsys, *pair, "--split", "column", "--out", tmp_path / "other")
    assert "birds.csv line 3: split is 'holdout'; expected train, val, valid, validation or test" in message
    assert not (tmp_path / "other").exists()


def test_class_folders_need_no_csv(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", "b/1.png", "b/x/2.PNG", "a/1.png", "c/1.png", "a/.hidden.png")
    (tmp_path / "fruit" / "a" / "notes.txt").write_text("none")
    assert main(["--images", str(tmp_path / "fruit"), "--out", str(tmp_path / "out")]) == 0
    assert classes_in(tmp_path / "out" / "train") == {"fruit:a", "fruit:b"}
    assert classes_in(tmp_path / "out" / "test") == {"fruit:c"}
    assert len(rows_of(tmp_path / "out" / "train")) == 3


def test_an_unlabelled_pile_trains_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "pile", "1.png", "2.png", "some/3.png")
    assert "no class folder" in refused(capsys, "--images", tmp_path / "pile", "--out", tmp_path / "out")
    assert main(["--images", str(tmp_path / "pile"), "--split", "none", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    assert {(task, label) for task, label, _ in rows_of(tmp_path / "out" / "train")} == {("-", "-")}


def test_a_csv_without_labels_makes_an_unlabelled_pile(tmp_path: Path) -> None:
    write_images(tmp_path / "pile", "1.png", "2.png")
    (tmp_path / "pile.csv").write_text("file\n1.png\n")
    pair = ["--csv", str(tmp_path / "pile.csv"), "--images", str(tmp_path / "pile")]
    assert main([*pair, "--split", "none", "--task", "pile", "--out", str(tmp_path / "out")]) == 0
    assert rows_of(tmp_path / "out" / "train") == [("-", "-", png(0))]


def test_larger_images_are_re_encoded_and_bad_ones_keep_their_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pile").mkdir()
    Image.new("RGB", (90, 60), "red").save(tmp_path / "pile" / "1.jpg")
    Image.new("RGBA", (40, 80), "red").save(tmp_path / "pile" / "2.png")
    (tmp_path / "pile" / "3.jpg").write_bytes(b"nonsense")
    (tmp_path / "pile" / "4.png").write_bytes(png(9))
    argv = ["--images", str(tmp_path / "pile"), "--split", "none", "--image-size", "30", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    shards = ImageShards.open([tmp_path / "out" / "train"], None)
    data = [shards.image_bytes(row) for row in range(len(shards))]
    images = [Image.open(io.BytesIO(file)) for file in data if file != b"nonsense"]
    assert sorted((image.format or "", image.size) for image in images) == [
        ("JPEG", (45, 30)),
        ("PNG", (6, 4)),
        ("PNG", (30, 60)),
    ]
    assert png(9) in data
    assert f"3.jpg does not decode; it keeps row {data.index(b'nonsense')}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ("fine", "kind", [], "birds.csv: no column 'fine'; it has file, split, kind"),
        ("dataset", "task", [], "birds.csv: no column 'dataset'"),
        ("file", "path", [], "birds.csv: no column 'file'"),
        ("", "", ["--label-column", "species"], "no column 'species'"),
        ("b.0.png", "b.7.png", [], "birds.csv line 4: 'birds/b.7.png' is not in"),
        ("b.0.png", "b.0.mp4", [], "line 4: 'birds/b.0.mp4' has no image suffix; expected jpg, "),
        ("b.0.png", "a.0.png", [], "line 4: 'birds/a.0.png' is listed twice"),
        (",b,", ",,", [], "line 4: column 'fine' is empty"),
        (",b,any", ",b", [], "line 4: 4 fields; expected 5"),
        (",b,any", ",b,any,more", [], "line 4: 6 fields; expected 5"),
        (",b,", ",\udcff,", [], "not a CSV in UTF-8"),
        ("", "", ["--images-per-shard", "0"], "images_per_shard must be at least 1, got 0"),
        ("", "", ["--seed", "-1"], "seed must be at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, options: list[str], message: str
) -> None:
    pair = write_pair(tmp_path, "birds", {"a": 2, "b": 1})
    text = (tmp_path / "birds.csv").read_text()
    (tmp_path / "birds.csv").write_text(text.replace(before, after) if before else text, errors="surrogateescape")
    assert message in refused(capsys, *pair, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, tar = write_pair(tmp_path, "birds", {"a": 2, "b": 1})[1::2]
    out = tmp_path / "out"
    assert "none.tar: does not exist" in refused(capsys, "--images", tmp_path / "none.tar", "--out", out)
    assert "none.csv: does not exist" in refused(capsys, "--csv", tmp_path / "none.csv", "--images", tar, "--out", out)
    Path(tar).write_bytes(Path(tar).read_bytes()[:700])
    assert "birds.tar: " in refused(capsys, "--csv", csv, "--images", tar, "--out", out)
    (tmp_path / "empty").mkdir()
    assert "empty: no images" in refused(capsys, "--images", tmp_path / "empty", "--out", out)
    write_images(tmp_path / "one", "a/1.png")
    assert "one class folder, 'a'" in refused(capsys, "--images", tmp_path / "one", "--out", out)
    write_images(tmp_path / "mixed", "a/1.png", "2.png")
    assert "'2.png' lies in no class folder" in refused(capsys, "--images", tmp_path / "mixed", "--out", out)
    (tmp_path / "file").write_text("")
    assert refused(capsys, "--images", tmp_path / "one", "--split", "none", "--out", tmp_path / "file")
    assert not out.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["--csv", csv, "--images", tar, "--images", tar, "--out", str(out)])


def test_the_script_runs_from_anywhere_and_ends_with_2_without_a_traceback(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", "a/1.png", "b/1.png")
    call = [sys.executable, str(SCRIPT), "--images", "fruit", "--out", "out"]
    good = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "out" / "test" / "index.json").is_file()
    bad = subprocess.run([*call, "--seed", "-1"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert bad.stderr == "make_shards: seed must be at least 0, got -1\n"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(
    "GRAPPA_SHARED" not in os.environ, reason="GRAPPA_SHARED names no folder with images/<task>.tar and .csv"
)
def test_the_four_real_tasks_split_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = Path(os.environ["GRAPPA_SHARED"]) / "data" / "images"
    argv = ["--out", str(tmp_path)]
    for task in ("cub100", "grocery", "omniglot_small", "eth80"):
        argv += ["--csv", str(images / f"{task}.csv"), "--images", str(images / f"{task}.tar")]
    assert main(argv) == 0
    counts = {line.split()[0]: line.replace(",", "").split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert counts == {
        "cub100": ["50", "2969", "50", "2933"],
        "eth80": ["40", "1640", "40", "1640"],
        "grocery": ["41", "2544", "40", "2877"],
        "omniglot_small": ["121", "2420", "121", "2420"],
        "all": ["252", "9573", "251", "9870"],
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "s3://bucket/images"], "s3://bucket/images: expected a local tar or folder"),
        (["--images", "here", "--images", "here"], "here: named twice"),
        (["--images", "here", "--images", "there/here"], "both would be the task 'here'"),
    ],
)
def test_images_that_cannot_be_meant_so_are_refused(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "there/here"):
        write_images(tmp_path, f"{folder}/a/1.png", f"{folder}/b/2.png")
    assert message in refused(capsys, *argv, "--out", "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "here", "--out", "s3://bucket/out"], "s3://bucket/out: expected a local folder"),
        (["--benchmark", "mrt", "--root", ".", "--out", "out", "--task", "x"], "for one's own images"),
        (["--benchmark", "mrt", "--root", ".", "--out", "out", "--split", "none"], "for one's own images"),
        (["--images", "here", "--out", "out", "--part", "mrt"], "belong to --benchmark"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_home_folders_and_variables_are_expanded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_SET", raising=False)
    write_images(tmp_path / "home", "fruit/a/1.png", "fruit/b/2.png")
    assert main(["--images=~/fruit", "--out=$SCRATCH/out"]) == 0
    assert (tmp_path / "scratch" / "out" / "train" / "index.json").is_file()
    capsys.readouterr()
    assert "the variable NOT_SET is not set" in refused(capsys, "--images", "$NOT_SET/x", "--out", "out")
    with pytest.raises(SystemExit, match="2"):
        main(["--images=~/fruit", "--out=$NOT_SET/out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "scratch"]


def test_folders_of_one_name_may_be_one_task_by_wish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, "here/1.png", "there/here/2.png")
    argv = ["--images", str(tmp_path / "here"), "--images", str(tmp_path / "there/here"), "--task", "both"]
    assert main([*argv, "--split", "none", "--out", str(tmp_path / "out")]) == 0
    assert len(rows_of(tmp_path / "out" / "train")) == 2


def test_links_to_nothing_pipes_and_loops_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, "pile/1.png", "pile/deep/2.png", "elsewhere/3.png")
    pile = tmp_path / "pile"
    os.mkfifo(pile / "pipe.png")
    (pile / "gone.png").symlink_to(tmp_path / "nothing.png")
    (pile / "deep" / "loop").symlink_to(pile)
    (pile / "linked").symlink_to(tmp_path / "elsewhere")
    assert main(["--images", str(pile), "--split", "none", "--out", str(tmp_path / "out")]) == 0
    assert len(rows_of(tmp_path / "out" / "train")) == 3
    message = capsys.readouterr().err
    assert "left out: 2 files, a link to nothing, a pipe or another special file" in message
    assert "left out: 1 file, a link to a folder that holds it" in message


def test_a_class_folder_that_is_not_utf8_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, "pile/a/1.png", os.fsdecode(b"pile/caf\xe9/2.png"))
    message = refused(capsys, "--images", tmp_path / "pile", "--out", tmp_path / "out")
    assert r"b'caf\xe9' is not UTF-8; rename it" in message
