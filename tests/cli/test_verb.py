"""A function as a verb: its statuses, its words, and words that are misspelt."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from grappa_dist.cli.verb import OneOf, settings_of, split_words, verb, words
from grappa_dist.console import Ending


@verb("echo", examples=["grappa-dist echo photos/"])
@words("given", "IMAGES...")
@click.option("--until", type=OneOf(["embed", "adapt", "fuse"]))
@click.option("--fail", is_flag=True)
def echo(ending: Ending, given: tuple[str, ...], until: str | None, fail: bool) -> None:
    """Prints what it was given."""
    if fail:
        raise ValueError("adapt.epochs=-1: expected at least 1")
    if given == ("--",):
        raise click.UsageError("nothing to echo")
    print(isinstance(ending, Ending), split_words(given), until)


def called(*args: str) -> tuple[int, str]:
    found = CliRunner().invoke(echo, args, standalone_mode=False)
    if isinstance(found.exception, click.ClickException):
        return found.exception.exit_code, found.exception.format_message()
    assert found.exception is None
    return found.return_value, found.output


def test_places_options_and_settings_come_in_any_order() -> None:
    assert called("photos/", "adapt.epochs=1", "--until", "fuse", "s3://a/b?c=d") == (
        0,
        "True (['photos/', 's3://a/b?c=d'], ['adapt.epochs=1']) fuse\n",
    )


def test_a_folder_with_an_equals_sign_is_no_setting_with_its_dot() -> None:
    assert split_words(["./a=b", "a=b", "/data/a=b", "A=b"]) == (["./a=b", "/data/a=b", "A=b"], ["a=b"])


def test_what_a_verb_raises_becomes_its_status() -> None:
    assert called("--fail") == (2, "error: adapt.epochs=-1: expected at least 1\n")


def test_wrong_arguments_that_a_verb_finds_itself_leave_as_they_are() -> None:
    assert called("--", "--") == (2, "nothing to echo")


@pytest.mark.parametrize(("word", "hint"), [("fues", "; did you mean 'fuse'?"), ("zzz", "")])
def test_a_misspelt_choice_gets_a_suggestion(word: str, hint: str) -> None:
    status, text = called("--until", word)
    assert status == 2
    assert text.endswith(f"'{word}' is not one of 'embed', 'adapt', 'fuse'{hint}")


def test_help_has_the_docstring_the_examples_and_the_statuses() -> None:
    text = called("--help")[1]
    assert "Prints what it was given." in text
    assert "Examples:\n    grappa-dist echo photos/\n" in text
    assert "Exit status: 0 done" in text


def test_a_verb_about_a_run_takes_a_run_directory_or_a_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"name: mine\nout: {tmp_path}\ndata: {{train: photos}}\nbackbone: {{name: 'timm:vit_tiny'}}\n")
    for settings, root in (
        settings_of([str(tmp_path), "adapt.epochs=3"], None, None),
        settings_of(["adapt.epochs=3"], str(config), None),
    ):
        assert (settings.name, settings.adapt.epochs, root) == ("mine", 3, tmp_path)
    assert settings_of([], str(config), str(tmp_path / "other"))[1] == tmp_path / "other"
    for given, file in (([], None), (["a", "b"], None), (["a"], str(config))):
        with pytest.raises(click.UsageError, match="expected one run directory, or --config FILE"):
            settings_of(given, file, None)
