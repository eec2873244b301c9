"""A run from Python, with tasks and jobs in this process."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import grappa_dist
from grappa_dist import estimate, fitted, pipeline, rates
from grappa_dist.config import Config
from grappa_dist.console import Interrupted, Terminated
from grappa_dist.distributed.runner import Signals
from grappa_dist.fitted import FittedRun
from grappa_dist.output import mode
from grappa_dist.plan import plan
from grappa_dist.stages.run import read_config
from tests.stages import tiny
from tests.test_defaults import flat, in_classes, keep

SETTINGS: dict[str, Any] = {
    "backbone": {"kwargs": {"dim": 16, "depth": 2}, "image_size": 32},
    "adapt": {"bottleneck": 4, "epochs": 1},
    "clustering.num_labels": [2],
    "clustering.iterations": 2,
    "evaluate": {"view_queries": 4, "gallery_queries": 1, "gallery_hits": 2},
}


def run_here(here: tiny.Here) -> Callable[..., Any]:
    """A run without Ray, with the files that a run keeps."""

    def run(config: Config, root: Path) -> Any:
        with pipeline.keeping_config(context := tiny.run_in(config, root, here)):
            return pipeline.run_in(context)

    return run


def fit(root: Path, photos: str, here: tiny.Here, **more: Any) -> FittedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "run", run_here(here))
        return grappa_dist.fit(photos, out=root, backbone="tests.models.tiny:create", settings=SETTINGS, **more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[FittedRun, str]:
    folder = tmp_path_factory.mktemp("fit")
    photos = in_classes(folder / "photos", 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "MEASURED_FROM", 1)
        patch.setattr(rates, "PART_S", 0.01)
        return fit(folder / "run", photos, tiny.Here(), seed=3), photos


def test_three_lines_give_a_model_scores_a_report_and_a_verdict(done: tuple[FittedRun, str]) -> None:
    run, _ = done
    assert run.model(torch.rand(1, 3, 32, 32)).shape == (1, 16)
    assert run.model is run.model
    assert {row["model"] for row in run.scores} >= {"backbone", "k=2", "average"}
    assert run.verdict is not None
    assert run.report.read_text().startswith("<!")
    page = run.report._repr_html_()
    assert page.startswith('<iframe srcdoc="&lt;!')
    assert "<script" not in page
    assert str(run).splitlines()[0].startswith("R-Precision / MAP@R")
    config = read_config(run.root)
    assert (config.seed, config.adapt.epochs, config.evaluate.view_queries) == (3, 1, 4)


def test_the_report_shows_settings_as_they_were_given_and_images_by_the_names_of_their_files(
    done: tuple[FittedRun, str],
) -> None:
    run, photos = done
    page = run.report.read_text()
    settings = page[page.index("<summary>Configuration</summary>") :]
    assert f"- {photos}" in settings
    assert "shards/" not in settings
    assert "report written" in page
    names = {path.relative_to(photos).as_posix() for path in Path(photos).rglob("*.png")}
    shown = set(re.findall(r"query ([^ ]+ )?([^ <]+/[^ <]+)</title>", page))
    assert {name for _, name in shown} <= names
    assert shown
    for section in ("classes", "galleries"):
        assert f'<section id="{section}">' in page


def test_a_run_keeps_the_rates_that_it_has_measured(done: tuple[FittedRun, str]) -> None:
    run, _ = done
    config = read_config(run.root)
    found = rates.stored_rates(run.root, config, 1)
    assert found is not None
    assert found.sizes.channels == 16
    assert "by rates that were measured here before" in plan(config, run.root)


def test_a_further_call_reuses_what_is_there_and_makes_what_is_new(done: tuple[FittedRun, str]) -> None:
    run, photos = done
    again = tiny.Here()
    page = run.report.read_bytes()
    same = fit(run.root, photos, again)
    assert same.report.read_bytes() == page  # dates included
    assert again.asked == []
    assert same.scores == run.scores
    assert read_config(run.root).seed == 3  # which was not given again


def test_errors_are_those_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder of images; .*nothing has no config\.yaml"):
        grappa_dist.fit(out=tmp_path / "nothing")
    photos = in_classes(tmp_path / "photos", 4, 4)
    with pytest.raises(ValueError, match=r"unknown key adapt\.epoch; did you mean 'epochs'"):
        grappa_dist.fit(photos, tmp_path / "run", adapt={"epoch": 3})
    assert not (tmp_path / "run").exists()


def test_the_directory_is_called_as_the_images_and_a_home_folder_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, asked = tmp_path / "home", list[tuple[Config, Path]]()

    def note(config: Config, root: Path) -> None:
        keep(config, root)
        asked.append((config, root))
        raise Terminated

    def call(images: str, **given: Any) -> tuple[Config, Path]:
        with pytest.raises(RuntimeError, match="terminated"):
            grappa_dist.fit(images, quiet=True, **given)
        return asked[-1]

    monkeypatch.setattr(fitted, "run", note)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    photos, lab = flat(home / "photos"), in_classes(home / "lab", 2)
    (tmp_path / "runs").mkdir()
    assert call("~/photos")[1] == tmp_path / "runs" / "photos"
    first = call("~/photos", out="~/mine", test="~/lab")
    assert first[1] == home / "mine"
    assert (first[0].data.train, first[0].data.test) == ((photos,), (lab,))
    assert call("~/photos", out="~/mine") == first
    with pytest.raises(ValueError, match=r"^expected images, or out=\.\.\. of a run that has begun$"):
        grappa_dist.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "runs"]


@pytest.mark.parametrize(
    ("stopped", "raised"), [(Interrupted(at_once=False), KeyboardInterrupt), (Terminated(), RuntimeError)]
)
def test_a_signal_ends_a_call_with_what_python_programs_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: BaseException, raised: type[BaseException]
) -> None:
    def stop(config: Config, root: Path) -> None:
        raise stopped

    monkeypatch.setattr(fitted, "run", stop)
    with pytest.raises(raised, match="the same call goes on"):
        grappa_dist.fit(in_classes(tmp_path / "photos", 4, 4), tmp_path / "run", quiet=True)
    assert mode() == "auto"  # a later call is not quiet


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    entered = list[bool]()

    def work() -> None:
        with Signals().handled():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
