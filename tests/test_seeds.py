from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist import load_model, pipeline, seeds
from grappa_dist.artifacts import LOCK
from grappa_dist.config import CONFIG_FILE, Config
from grappa_dist.report.seeds import seeds_conclusion
from grappa_dist.seeds import FinishedSeeds, parse_seeds, run_seeds
from grappa_dist.stages.run import read_config
from grappa_dist.verdict import validation_half
from tests.stages import tiny

SEEDS = (3, 0)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, FinishedSeeds, dict[str, list[str]]]:
    """Two seeds of one small run, without Ray, and what each has asked of its workers."""
    root, asked = tmp_path_factory.mktemp("several"), dict[str, list[str]]()

    def run_here(config: Config, folder: Path, until: str | None = None) -> pipeline.Finished | None:
        folder.mkdir(parents=True, exist_ok=True)
        here = tiny.Here(num_workers=1, asked=asked.setdefault(folder.name, []))
        return pipeline.run_in(tiny.run_in(config, folder, here), until)

    train = tiny.write_shards(root / "train", sizes=(12, 9), bad=())
    test = tiny.write_shards(root / "test", sizes=(15, 6), bad=(), label=lambda row: str(row % tiny.GROUPS), seed=1)
    settings = tiny.config(
        train,
        data={"test": tuple(test), "streams": 2},
        clustering={"num_labels": (4,)},
        adapt={"epochs": 2},
        evaluate={"export": "auto"},
        resources={"workers": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "run", run_here)
        found = run_seeds(settings, root / "run", SEEDS)
        assert found is not None
        before = {name: len(of_one) for name, of_one in asked.items()}
        again = run_seeds(settings, root / "run", SEEDS)
    assert {name: len(of_one) for name, of_one in asked.items()} == before  # all is reused
    assert again is not None
    assert again.text() == found.text()
    return settings, found, asked


Several = tuple[Config, FinishedSeeds, dict[str, list[str]]]


@pytest.mark.slow
def test_what_does_not_depend_on_the_seed_is_made_once(several: Several) -> None:
    _, found, asked = several
    counts = {name: of_one.count("embed_shards") for name, of_one in asked.items()}
    assert counts == {"seed-3": 4, "seed-0": 2}  # shards: training images once, test images in one pass of each
    assert "read_ground_truth" not in asked["seed-0"]
    assert {"pseudo_label", "k=4"} <= set(asked["seed-0"])  # these do
    rows = next(found.root.glob("seed-3/features/backbone/**/rows.npy"))
    assert rows.samefile(found.root / "seed-0" / rows.relative_to(found.root / "seed-3"))
    assert not list(found.root.rglob("*.fetched"))


@pytest.mark.slow
def test_the_gain_of_each_query_is_the_mean_over_seeds_on_the_half_that_chose_nothing(several: Several) -> None:
    _, found, _ = several
    assert found.verdict is not None
    gains = []
    for one in found.runs.values():
        (task,) = one.queries
        assert one.verdict is not None
        gains.append(task.less(one.verdict.exported, "backbone")[~validation_half(task.classes)])
    assert found.verdict.each == pytest.approx([of_seed.mean() for of_seed in gains])
    assert found.verdict.mean.gain == pytest.approx(np.mean(gains))
    assert found.verdict.mean.queries == len(gains[0])
    assert found.verdict.seeds == SEEDS


@pytest.mark.slow
def test_the_end_shows_mean_and_spread_of_every_model_and_the_verdict_last(several: Several) -> None:
    _, found, _ = several
    assert found.verdict is not None
    lines = found.text().splitlines()
    scores = [
        [100 * row["r_precision"] for row in one.rows if row["model"] == "average"] for one in found.runs.values()
    ]
    (shown,) = (line for line in lines if line.startswith("average"))
    assert shown.split()[1:] == [f"{np.mean(scores):.1f}", f"±{np.std(scores, ddof=1):.1f}"]
    assert lines[-1] == seeds_conclusion(found.verdict, str(found.root)).replace("−", "-")
    assert "by seed" in lines[-1] or "each exports the backbone" in lines[-1]


@pytest.mark.slow
def test_the_folder_of_all_seeds_has_the_model_of_the_first_and_the_figures_of_all(several: Several) -> None:
    _, found, _ = several
    images = torch.rand(2, 3, tiny.SIZE_PX, tiny.SIZE_PX)
    both = [load_model(path, trust_modules=True)(images) for path in (found.root, found.root / "seed-3")]
    assert torch.equal(*both)
    page = (found.root / "report" / "report.html").read_text()
    for seed in SEEDS:
        assert (found.root / "report" / f"../seed-{seed}/report/report.html").is_file()
        assert f'href="../seed-{seed}/report/report.html"' in page
    assert not (found.root / LOCK).exists()  # by which `status` knows a single run
    kept = json.loads((found.root / "report" / "metrics.json").read_text())
    assert kept["seeds"] == list(SEEDS)
    (average,) = (row["r_precision"] for row in kept["rows"] if row["model"] == "average")
    assert average["mean"] == pytest.approx(np.mean(average["by_seed"]))
    assert kept["verdict"]["mean"]["queries"] + found.runs[3].verdict.validation_queries == 21  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "found"), [("0", [0]), ("0,1,2", [0, 1, 2]), ("7, 3", [7, 3])])
def test_seeds_are_read_from_a_command_line(text: str, found: list[int]) -> None:
    assert parse_seeds(text) == found


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1,1", "-1", "1.5", "0..3"])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected different whole numbers"):
        parse_seeds(text)


def test_the_directory_of_a_single_run_is_no_folder_of_several(tmp_path: Path) -> None:
    for made, begin in {"config.yaml": Path.touch, "report": lambda path: path.symlink_to("reports/of-one")}.items():
        root = tmp_path / made / "run"
        root.mkdir(parents=True)
        begin(root / made)
        with pytest.raises(ValueError, match=r"run is the directory of a single run; expected another"):
            run_seeds(tiny.config(["nowhere"]), root, SEEDS)
        assert [path.name for path in root.iterdir()] == [made]


def test_a_folder_of_several_is_no_directory_of_a_single_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for seed in (10, 2):
        (root / f"seed-{seed}").mkdir(parents=True)
        (root / f"seed-{seed}" / CONFIG_FILE).write_text(tiny.config(["nowhere"]).yaml())
    names = f"{root}/seed-2, {root}/seed-10"
    with pytest.raises(ValueError, match=f"run has runs of several seeds: expected one of {names}, or another dir"):
        pipeline.run(tiny.config(["nowhere"]), root)
    with pytest.raises(ValueError, match=f"it has runs of several seeds, which have theirs: {names}$"):
        read_config(root)
    assert {path.name for path in root.iterdir()} == {"seed-2", "seed-10"}


def test_no_seed_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one at least"):
        run_seeds(tiny.config(["nowhere"]), tmp_path / "run", [])
    assert not (tmp_path / "run").exists()
