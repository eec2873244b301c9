"""Every command in the documents exists with its options, and is marked with the test that runs it or what it needs.

A block of shell commands has an HTML comment above it: `<!-- run by: test_... -->` or `<!-- needs: a GPU -->`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from PIL import Image

from benchmarks.cli import add_commands
from benchmarks.harness import OneLineParser
from grappa_dist.cli.main import VERBS, group, main
from grappa_dist.make_shards import cli as make_shards
from tests.retrieval.photos import model_in, write_photos
from tests.stages import tiny
from tests.structure import ROOT
from tests.test_docs import DOCS, section

BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>run by|needs): (?P<what>[^\n]+?) -->\n)?```(?:sh|bash|console)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
OTHERS = {  # programs of others, whose options are not checked
    *("pip", "docker", "kubectl", "ray", "openssl", "cp", "export", "eval", "umask", "$EDITOR"),
}


class Block(NamedTuple):
    document: str
    kind: str | None
    what: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.text.strip().splitlines()[0][:60]}"


BLOCKS = [
    Block(name, *found.group("kind", "what", "text")) for name, text in DOCS.items() for found in BLOCK.finditer(text)
]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every simple command in a block: without prompts, comments, assignments and here-documents."""
    text = re.sub(r"<<'(\w+)'.*?^\1$", "", text.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\w+=\([^)]*\)|for \w+ in [^;]*; do|\bdone\b|\$\([^)]*\)", "", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&;|()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in (*lexer, ";"):
            if not set(word) <= set("&;|()"):
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield words
            words = []


def check_verb(args: list[str]) -> None:
    """Parses the words of `grappa-dist` without running anything."""
    if not args or args[0].startswith("-"):
        group.make_context("grappa-dist", args, resilient_parsing=True)
        return
    if args[0] == "shards":  # hands its words on
        parse_shards(args[1:])
        return
    verb = group.get_command(click.Context(group), args[0])
    assert verb is not None
    verb.make_context(args[0], args[1:], parent=click.Context(group, info_name="grappa-dist"))


def parse_shards(args: list[str]) -> None:
    parser = make_shards.arguments("grappa-dist shards")
    make_shards._check(parser, parser.parse_args(args))


def check_script(script: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the words of a program of this repository without running it."""
    assert (ROOT / script).is_file(), script
    if script == "launch/make_shards.py":
        parse_shards(args)
    elif script == "launch/bench.py":
        parser = OneLineParser()
        add_commands(parser)
        parser.parse_args(args)
    else:
        spec = importlib.util.spec_from_file_location("a_program_of_the_documents", ROOT / script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *args])
        module.parse()


def check_module(module: str, args: list[str]) -> None:
    """Sees that `python -m` finds a module, and that its source has the options."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    if module.split(".")[0] == "tests":
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        assert [word for word in args if word.startswith("--") and f'"{word}' not in source] == []


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *args = words
    if program == "grappa-dist":
        check_verb(args)
    elif program in ("python", ".venv/bin/python"):
        if args[0] == "-m":
            check_module(args[1], args[2:])
        else:
            check_script(args[0], args[1:], monkeypatch)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in args:
            name, _, value = word.partition("=")
            assert re.search(rf"^{name}{' [?]=' if value else ':'}", makefile, re.MULTILINE), word
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK), program
    else:
        assert program in OTHERS, f"{program} is no program that the documents may name"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_of_commands_says_which_test_runs_it_or_what_it_needs(block: Block) -> None:
    assert block.what, "put <!-- run by: test_... --> or <!-- needs: ... --> above it"
    if block.kind == "run by":
        assert re.fullmatch(r"test_\w+(, test_\w+)*", block.what), block.what


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_commands_of_a_block_exist_with_their_options(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(block.text):
        try:
            check(words, monkeypatch)
        except (SystemExit, click.ClickException) as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


def run_by(test: str) -> list[list[list[str]]]:
    """The commands of each block that a test runs."""
    return [list(commands(block.text)) for block in BLOCKS if block.kind == "run by" and test in block.what.split(", ")]


@pytest.mark.parametrize("document", DOCS)
def test_verbs_and_options_within_sentences_exist(document: str) -> None:
    wrong = []
    prose = re.sub(r"^```.*?^```", "", DOCS[document], flags=re.MULTILINE | re.DOTALL)
    for verb, rest in re.findall(r"`grappa-dist ([a-z]+)([^`]*)`", prose):
        if verb not in VERBS:
            wrong.append(verb)
            continue
        found = group.get_command(click.Context(group), verb)
        assert found is not None
        known = {option for param in found.params for option in param.opts} | {"--help"}
        known |= set(make_shards.arguments("shards")._option_string_actions) if verb == "shards" else set()
        wrong += [f"{verb} {option}" for option in re.findall(r"--[a-z-]+", rest) if option not in known]
    assert wrong == []


SAID = {"search": "cat/2.png", "duplicates": "near-duplicates among 12 images", "evaluate": "R-Precision"}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what the command replaces in its process: its streams, and what it does on signals."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("process")
def test_the_commands_on_a_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        model_in(Path("runs", name))
    write_photos(Path("photos"))
    shutil.copy("photos/cat/2.png", "query.jpg")
    for words in (words for lines in run_by("test_the_commands_on_a_model_run") for words in lines):
        assert main(words[1:]) == 0, shlex.join(words)
        said = capfd.readouterr().out
        assert SAID[words[1]] in said, shlex.join(words)


@pytest.mark.usefixtures("process")
def test_the_commands_on_a_split_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(Path("runs", "mine"))
    names = write_photos(Path("shop"))
    for number in range(3):
        picture(Path("asked", "cat", f"{number}.png"), 90 + number)
        picture(Path("crawl", f"{number}.png"), 80 + number)
    rows = [f'"shop/{name}","{name.split("/")[0]}",{("query", "gallery")[at % 2]}' for at, name in enumerate(names)]
    Path("list.csv").write_text("\n".join(["file,label,side", *rows]))
    for words in (words for lines in run_by("test_the_commands_on_a_split_run") for words in lines):
        assert main(words[1:]) == 0, shlex.join(words)
        assert "among the images of their task in a gallery of" in capfd.readouterr().out


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.picture(number))


@pytest.mark.usefixtures("process")
def test_the_shards_commands_of_the_docs_write_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        picture(tmp_path / "photos" / f"class {number % 4}" / f"{number}.png", number)
        picture(tmp_path / "pile" / f"{number}.png", number)
        picture(tmp_path / "food" / f"{number}.png", number)
    with tarfile.open("birds.tar", "w") as tar:
        tar.add("food", "birds")
    for task, folder in (("birds", "birds/"), ("food", "")):
        rows = [f"{folder}{number}.png,{number % 4},{task}" for number in range(8)]
        Path(f"{task}.csv").write_text("\n".join(["file,fine,dataset", *rows]))
    (lines,) = run_by("test_the_shards_commands_of_the_docs_write_shards")
    written = {"photos": {"train", "test"}, "birds.csv": {"train", "test"}, "pile": {"train"}}
    for words in lines:
        shutil.rmtree("shards", ignore_errors=True)
        assert main([*words[1:], "--workers", "1"]) == 0
        assert {path.name for path in Path("shards").iterdir()} == written[words[3]]


def test_the_python_on_a_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(Path("runs", "mine"))
    for number, name in enumerate(("a.jpg", "b.jpg")):
        Path(name).write_bytes(tiny.picture(number))
    using = section(DOCS["docs/evaluate_and_search.md"], "Use the model in Python")
    (first, second) = re.findall(r"^```python\n(.*?)^```", using, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["embeddings"].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert names["weights"].shape[::2] == (2, len(names["model"].sets))
    model = names["model"]
    names["gallery"] = [model.transform(Image.open(io.BytesIO(tiny.picture(number)))) for number in range(6)]
    exec(second, names)
    assert names["rows"].shape == (6, names["embeddings"].shape[1])
