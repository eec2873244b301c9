"""The modules of the code and their imports, read by `ast`. `python -m tests.structure` prints counts of the package.

Modules do not include the `__init__.py` of folders; an import between files counts once, however many names it has.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("grappa_dist", "launch", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGE = {file: tree for file, tree in TREES.items() if file.startswith("grappa_dist/")}
LINES = {file: len((ROOT / file).read_text().splitlines()) for file in TREES}
MOST_LINES, MOST_FUNCTION_LINES = 600, 40
FEW_LINES, MOST_SHORT_MODULES = 60, 10


def name_of(file: str) -> str:
    """The module of a file: grappa_dist.data.shards, ..."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {name_of(file): file for file in TREES}


def imports(tree: ast.Module) -> Iterator[str]:
    """What is imported: a.b for `from a import b`, be b a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


@cache
def imported_modules(file: str) -> frozenset[str]:
    """The modules of this repository that a file imports."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imports(TREES[file])}
    return frozenset(found & MODULES.keys()) - {name_of(file)}


def modules_of(folder: str) -> list[str]:
    """The files of a folder, `__init__.py` left out."""
    return [file for file in TREES if file.startswith(f"{folder}/") and not file.endswith("__init__.py")]


def short_modules(folder: str) -> list[str]:
    """But for `__main__` and the verbs of the command line, whose files are found by their names."""
    named = [f"{folder}/__main__.py", *modules_of(f"{folder}/cli")]
    return [file for file in modules_of(folder) if LINES[file] < FEW_LINES and file not in named]


class Function(NamedTuple):
    file: str
    name: str
    lines: int


def functions() -> list[Function]:
    """Every function and method, with its length in lines."""
    return [
        Function(file, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def counts(folder: str = "grappa_dist") -> dict[str, int]:
    files = [file for file in TREES if file.startswith(f"{folder}/")]
    inside = {name_of(file) for file in files}
    return {
        "modules": len(modules_of(folder)),
        "imports between files": sum(len(imported_modules(file) & inside) for file in files),
        f"modules under {FEW_LINES} lines": len(short_modules(folder)),
        f"modules over {MOST_LINES} lines": sum(LINES[file] > MOST_LINES for file in files),
        f"functions over {MOST_FUNCTION_LINES} lines": sum(
            function.lines > MOST_FUNCTION_LINES for function in functions() if function.file in files
        ),
    }


if __name__ == "__main__":
    for what, number in counts().items():
        print(f"{number:5d}  {what}")
