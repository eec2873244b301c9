"""What the documents say of files, functions, tests, settings and links is so."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from grappa_dist.config import Config
from tests import settings_page
from tests.structure import PACKAGE, ROOT, TREES, imported_modules, name_of
from tests.test_house_rules import LEVELS, MAY_DISTRIBUTE

DOCS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
FOLDERS = ("grappa_dist", "launch", "benchmarks", "examples", "cluster", "configs", "tests")
TEXT = (".py", ".yaml", ".sh", ".env", ".sbatch")
ARCHITECTURE = DOCS["docs/architecture.md"]
TESTS = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
FILE = re.compile(r"(?<![\w./<*>-])[\w-]+(?:/[\w.-]+)*\.(?:py|sh|sbatch|yaml|toml|env)\b")
OUTSIDE = {"mine.yaml", "mine.sh", "mine.py", "clamped_vit_tiny.py", "config.yaml"}  # of a user, in examples; of a run
OF_CLUSTER = {path.name for path in (ROOT / "cluster").rglob("*") if path.is_file()}  # named without their folder
CODE = [
    ROOT / "Makefile",
    ROOT / "pyproject.toml",
    *(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in TEXT),
]
WORDS_OF_CODE = {word for path in CODE for word in re.findall(r"\w+", path.read_text())}
OF_OTHERS = {
    "AWS_PROFILE",
    "FSSPEC_S3_ANON",
    "UV_FIND_LINKS",
    "UV_TORCH_BACKEND",
    "IPC_LOCK",
    "PreemptMode",
    "IndexHNSWFlat",
    "reducing_gap",
    *("hit_rate_at_k", "map_at_k", "map_cut", "mean_average_precision", "mean_average_precision_at_r", "trec_eval"),
}


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r}"
    return found[1]


@pytest.mark.parametrize("document", DOCS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    folders = (ROOT, *(ROOT / name for name in ("grappa_dist", "launch", "cluster", "cluster/kubernetes")))
    without_tree = re.sub(r"^```text.*?^```", "", DOCS[document], flags=re.MULTILINE | re.DOTALL)
    named = {name for name in FILE.findall(without_tree) if Path(name).name not in OUTSIDE} - OF_CLUSTER
    assert [name for name in sorted(named) if not any((folder / name).exists() for folder in folders)] == []


@pytest.mark.parametrize("document", DOCS)
def test_every_test_that_a_document_names_exists(document: str) -> None:
    defined = set(re.findall(r"def (test_\w+)\(", "\n".join(TESTS.values()))) | {Path(file).stem for file in TESTS}
    assert set(re.findall(r"\btest_\w+", DOCS[document])) - defined == set()


@pytest.mark.parametrize("document", DOCS)
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCS[document]):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = ((ROOT / document).parent / file).resolve() if file else ROOT / document
        known = anchor in anchors(path.read_text()) if path.is_file() and anchor else path.exists() and not anchor
        wrong += [link] * (not known)
    assert wrong == []


@pytest.mark.parametrize("document", DOCS)
def test_every_target_of_make_that_a_document_names_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", DOCS[document])) - targets == set()


@pytest.mark.parametrize("document", DOCS)
def test_every_identifier_that_a_document_names_occurs_in_the_code(document: str) -> None:
    named = {part for token in re.findall(r"`([A-Za-z_][\w.]*)(?:\(|`|=)", DOCS[document]) for part in token.split(".")}
    own = {name for name in named if re.search(r"_|[a-z][A-Z]", name)}  # a word of one piece may be anything
    assert sorted(own - WORDS_OF_CODE - OF_OTHERS) == []


def test_every_option_of_a_measurement_exists() -> None:
    sources = [
        path for folder in ("benchmarks", "launch", "grappa_dist/make_shards") for path in (ROOT / folder).glob("*.py")
    ]
    known = {word for path in sources for word in re.findall(r"\w+", path.read_text())}
    commands = re.findall(r"launch/bench\.py[^`#]+", DOCS["docs/experiments.md"] + DOCS["docs/scale.md"])
    options = {option for command in commands for option in re.findall(r"--([a-z][a-z-]+)", command)}
    assert len(options) > 10
    assert {option for option in options if option.replace("-", "_") not in known} == set()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCS)
def test_every_setting_that_a_document_names_exists(document: str) -> None:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    wrong = []
    for name, key in re.findall(r"`['\"]?([a-z]+)\.([a-z_]+)(?=[=:` ])", DOCS[document]):
        kind = sections.get(name)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key != "py":  # embed.py is a program
            wrong += [f"{name}.{key}"] * (key not in kind.model_fields)
    assert wrong == []


def test_the_file_tree_has_every_module_and_nothing_else() -> None:
    named, folders = set(), list[str]()
    for line in section(ARCHITECTURE, "The files").split("```")[1].splitlines()[1:]:
        indent, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split(maxsplit=1)) == 2, f"{name}: nothing is said of it"
        folders[indent:] = [name]
        named.add("".join(folders))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert {file for file in PACKAGE if not file.endswith("__init__.py")} - named == set()


def test_the_levels_of_imports_are_those_that_are_tested() -> None:
    block = section(ARCHITECTURE, "Who may import what").split("```")[1]
    levels = [tuple(line.split()) for line in block.splitlines()[1:]]
    named = (tuple(part for part in parts if not part.startswith("_")) for parts in LEVELS)
    assert levels == [parts for parts in named if parts]


def test_what_may_import_the_distributed_libraries_is_named() -> None:
    text = section(ARCHITECTURE, "Who may import what")
    assert [name for name in MAY_DISTRIBUTE if f"`{name.removeprefix('grappa_dist/')}`" not in text] == []


def paths() -> dict[str, list[tuple[str, list[str]]]]:
    """What is looked for -> the (file, names) that lead to it, from the page's first table on."""
    rows = re.findall(r"^\| (.+) \|$", section(ARCHITECTURE, "From a step to its formula"), re.MULTILINE)[1:]
    found = {}
    for what, *cells in (row.split(" | ") for row in rows):
        parts = [re.findall(r"`([^`]+)`", cell) for cell in cells]
        found[what] = [(f"grappa_dist/{file}", names) for file, *names in (part for part in parts if part)]
    return found


@pytest.mark.parametrize("what", paths())
def test_a_path_of_the_reader_has_four_files_at_most_each_of_which_leads_to_the_next(what: str) -> None:
    path = paths()[what]
    assert 0 < len(path) <= 4
    for file, names in path:
        defined = {node.name for node in ast.walk(TREES[file]) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert names, f"{file}: no function is named"
        assert set(names) <= defined, f"{file} lacks {set(names) - defined}"
    assert path[0][0] in section(ARCHITECTURE, "In two minutes"), f"the table of steps does not name {path[0][0]}"
    for (file, _), (following, names) in pairwise(path):
        folder = name_of(following).rpartition(".")[0]
        assert {name_of(following), folder} & imported_modules(file), f"{file} does not import {following}"
        used = {node.id for node in ast.walk(TREES[file]) if isinstance(node, ast.Name)}
        assert used & set(names), f"{file} uses none of {names} of {following}"


def test_paths_lead_to_every_formula() -> None:
    assert len(paths()) >= 5


def test_the_tables_of_settings_are_those_of_the_schema() -> None:
    page = DOCS["docs/settings.md"]
    assert settings_page.written(page) == page, "python -m tests.settings_page writes them again"


def test_every_setting_has_a_meaning_in_the_tables() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", DOCS["docs/settings.md"], re.MULTILINE)
    assert len(rows) > 60
    assert [name for name, cells in rows if "||" in cells.replace(" ", "").replace(r"\|\|", "")] == []
    assert [name for name, cells in rows if re.search(r" <\w", re.sub("`[^`]*`", "", cells))] == [], "HTML to a browser"


def test_the_readme_is_short() -> None:
    assert len(DOCS["README.md"].splitlines()) <= 150


def test_every_message_that_troubleshooting_quotes_is_one_of_the_code() -> None:
    parts = [path.read_text() for folder in ("grappa_dist", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(parts))  # strings over several lines as one
    symptoms = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", DOCS["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [message for symptom in symptoms for message in re.findall(r"`([^`]{9,})`", symptom)]
    assert len(quoted) > 25
    pieces = [piece for message in quoted for piece in message.split("...") if len(piece.strip()) > 5]
    assert [piece for piece in pieces if piece.strip() not in code] == []
