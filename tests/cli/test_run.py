"""`grappa-dist run`: what its words and options mean; the run itself is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from grappa_dist import rates
from grappa_dist.cli.plan import command as plan_command
from grappa_dist.cli.run import SPLITS, STAGES, command
from grappa_dist.config import CONFIG_FILE, Config
from grappa_dist.defaults import Split
from tests.cli.calling import called
from tests.stages import tiny
from tests.test_defaults import flat, in_classes, keep

VIT = ("--backbone", "tests.models.tiny:create", "backbone.image_size=32")


class Asked(list[tuple[Config, Path, str | None]]):
    """Runs that were asked for."""

    def run(self, config: Config, root: Path, until: str | None = None) -> Any:
        self.append((config, root, until))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    asked = Asked()
    monkeypatch.setattr("grappa_dist.pipeline.run", asked.run)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_folder_is_run_with_settings_that_suit_it_and_those_that_are_given(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_classes(tmp_path / "photos", 4, 4)
    found = called(command, "photos", *VIT, "--out", "mine", "adapt.epochs=7", "--until", "embed")
    assert (found.status, found.out) == (0, "done up to embed; the same command without --until goes on\n")
    assert "; the backbone is tests.models.tiny:create" in found.err
    ((config, root, until),) = asked
    assert (root, until, config.adapt.epochs) == (tmp_path / "mine", "embed", 7)
    assert (config.data.train, config.data.split) == ((str(tmp_path / "photos"),), "classes")
    called(command, "photos", *VIT, "--until", "embed", "--split", "none")
    assert asked[1][1] == tmp_path / "runs" / "photos"
    assert asked[1][0].data.split == "none"
    monkeypatch.chdir(tmp_path / "photos" / "class-0")
    called(command, "..", *VIT, "--until", "embed", "--split", "none")
    assert asked[2][1] == tmp_path / "photos" / "class-0" / "runs" / "photos"


def test_a_run_directory_alone_goes_on_and_a_config_is_taken_as_it_is(asked: Asked, tmp_path: Path) -> None:
    config = tiny.config([flat(tmp_path / "photos")])
    keep(config, tmp_path / "mine")
    assert called(command, "--out", "mine", "--until", "fuse").status == 0
    assert called(command, "--config", "mine/config.yaml", "--out", "other", "seed=5", "--until", "fuse").status == 0
    (first, root, _), (second, other, _) = asked
    assert (root, other) == (tmp_path / "mine", tmp_path / "other")
    assert first == config.absolute(root)
    assert second == config.model_copy(update={"seed": 5})


def test_several_seeds_are_run_as_asked_for_or_as_they_were_begun(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[list[int]]()

    def run_seeds(config: Config, root: Path, seeds: list[int], until: str | None) -> None:
        seen.append(seeds)

    monkeypatch.setattr("grappa_dist.seeds.run_seeds", run_seeds)
    photos = flat(tmp_path / "photos")
    called(command, photos, *VIT, "--out", "mine", "--seeds", "3,1", "--until", "embed")
    (tmp_path / "mine" / "seed-1").mkdir(parents=True)
    keep(tiny.config([photos]), tmp_path / "mine" / "seed-1")
    called(command, "--out", "mine", "--until", "embed")
    assert (seen, asked) == ([[3, 1], [1]], [])


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PART_S", 0.01)
    flat(tmp_path / "photos")
    before = tiny.files_below(tmp_path)
    found = called(command, "photos", *VIT, "--dry-run")
    assert found.out.startswith(f"run directory  {tmp_path / 'runs' / 'photos'}\n")
    assert "\ntime           about " in found.out
    assert (asked, tiny.files_below(tmp_path)) == ([], before)
    planned = called(plan_command, "photos", *VIT)
    assert planned.out.splitlines()[0] == found.out.splitlines()[0]
    assert (planned.status, tiny.files_below(tmp_path)) == (0, before)


@pytest.mark.parametrize(("option", "on_stdout"), [("--quiet", 0), ("--json", 1)])
def test_what_was_chosen_is_shown_as_the_mode_has_it(asked: Asked, tmp_path: Path, option: str, on_stdout: int) -> None:
    keep(tiny.config([flat(tmp_path / "photos")]), tmp_path / "mine")
    found = called(command, "--out", "mine", option, "--until", "fuse")
    assert found.err == ""
    logged = [line for line in found.out.splitlines() if "goes on with" in line]
    assert len(logged) == on_stdout
    assert [json.loads(line)["name"] for line in logged] == ["log"] * on_stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected images, or --out DIR of a run that has begun, or --config FILE"),
        (("photos", "--config", "x.yaml"), "--config FILE names the images"),
        (("photos", "--split", "clases"), "did you mean 'classes'?"),
        (("photos", "--until", "embeed"), "did you mean 'embed'?"),
        (("--out", "nothing"), f"nothing has no {CONFIG_FILE} of an earlier run to go on with"),
        (("photos", "adapt.epoch=3"), "unknown key adapt.epoch; did you mean 'epochs'?"),
        (("photos", "--quiet", "--json"), "--quiet and --json: expected one of them"),
        (("nowhere",), "nothing at nowhere"),
        (("photos", "--seeds", "1,1"), "--seeds 1,1: expected different whole numbers"),
        (("photos", "--seeds", "1,2", "--dry-run"), "leave out --dry-run"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(
    asked: Asked, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    flat(tmp_path / "photos")
    found = called(command, *words)
    assert (found.status, asked) == (2, [])
    assert message in found.err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_choices_are_those_of_the_package() -> None:
    assert get_args(Split) == SPLITS
    assert STAGES == ("embed", "pseudo_label", "adapt", "fuse")
