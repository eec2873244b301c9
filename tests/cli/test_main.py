"""The command `grappa-dist`: which verbs there are, their help, and one line for what is misspelt."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from grappa_dist.cli.main import VERBS, group, main

KNOWN = group.list_commands(click.Context(group))


def test_the_verbs_are_those_that_are_described() -> None:
    assert set(KNOWN) <= VERBS.keys()
    assert all(line.endswith(".") and len(line) < 90 for line in VERBS.values())


def test_help_lists_the_verbs_without_importing_torch_or_any_of_them() -> None:
    code = (
        "import sys; from grappa_dist.cli.main import main; status = main(['--help']); "
        "loaded = [m for m in sys.modules if m == 'torch' or m.startswith('grappa_dist.cli.')]; "
        "assert loaded == ['grappa_dist.cli.main'], loaded; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name in KNOWN if f"  {name} " not in done.stdout] == []
    assert "_GRAPPA_DIST_COMPLETE" in done.stdout


@pytest.mark.parametrize("name", KNOWN)
def test_a_verb_has_help_with_examples_that_begin_with_its_name(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command.name == name
    text = command.get_help(click.Context(command, info_name=name))
    assert f"  grappa-dist {name}" in text.split("Examples:")[1]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["shardz"], "error: there is no verb 'shardz'; did you mean 'shards'?"),
        (["--hlep"], "error: No such option '--hlep'."),
        (["a\x1bverb"], r"error: there is no verb 'a\x1bverb'"),
    ],
)
def test_a_misspelt_word_is_one_line_on_stderr_and_status_2(
    args: list[str], line: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # guarded by main
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert main(args) == 2
    found = capfd.readouterr()
    assert found.out == ""
    assert found.err.startswith(line)
    assert found.err.endswith(" (grappa-dist --help)\n")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_the_package_runs_as_a_module_and_without_a_verb_prints_the_help(args: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "grappa_dist", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: grappa-dist [OPTIONS] VERB ...")


@pytest.mark.parametrize("name", ["embed", "search", "serve", "evaluate", "duplicates", "map", "export"])
def test_options_of_a_model_are_called_alike_and_come_first(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert {"--gallery-weights", "--trust-modules"} <= {word for one in options for word in one.opts}
    if name != "export":
        assert options[0].opts == ["--model"]
