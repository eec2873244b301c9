from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("grappa_dist", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
DISTRIBUTED = ("ray", "deepspeed", "torch.distributed", "faiss")
STAGES = {"distributed", "models", "data", "ops", "artifacts", "files", "report", "observe", "config"}
MAY_IMPORT: dict[str, set[str]] = {  # of ours, beside itself
    **{part: set() for part in ("ops", "config", "observe", "files", "_compat")},
    "artifacts": {"config", "files"},
    "config_file": {"config"},
    "data": {"artifacts", "files", "config"},
    "models": {"ops", "_compat"},
    "report": {"observe"},
    "distributed": {"ops", "artifacts", "files", "observe", "config"},
    "demo": {"data", "models", "ops", "_compat"},
    "stages": STAGES,
    "export": {*STAGES, "stages"},
    "exits": {"observe"},
    "embedding": {*STAGES, "stages", "config_file"},
    "layout": {*STAGES, "stages"},
    "pipeline": {*STAGES, "stages", "layout", "export"},
    "plan": {*STAGES, "stages", "layout"},
    "bench": {*STAGES, "stages", "export", "pipeline", "config_file", "_compat"},
    "__init__": {"export"},
}


def part_of(file: str) -> str:
    """The part of the package that a file belongs to: ops, models, config, ..."""
    return Path(file).with_suffix("").parts[1]


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def test_parts_import_only_what_they_may() -> None:
    wrong = []
    for file, tree in TREES.items():
        for module in imports(tree):
            names = module.split(".")
            if names[0] == "grappa_dist" and not file.startswith("launch"):
                own = part_of(file)
                wrong += [(file, module)] * (names[1] != own and names[1] not in MAY_IMPORT[own])
            wrong += [(file, module)] * (names[0] == "")
    assert wrong == []


def test_only_distributed_imports_what_distributes() -> None:
    wrong = []
    for file, tree in TREES.items():
        found = [m for m in imports(tree) if any(f"{m}.".startswith(f"{name}.") for name in DISTRIBUTED)]
        wrong += [(file, module) for module in found if not file.startswith("grappa_dist/distributed/")]
    assert wrong == []


def test_files_and_functions_fit_a_screen() -> None:
    functions = [
        (file, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [(file, name, lines) for file, name, lines in functions if lines > 40] == []
    files = {file: len((ROOT / file).read_text().splitlines()) for file in TREES}
    assert {file: lines for file, lines in files.items() if lines > 300} == {}


def test_modules_have_names_that_say_something_and_open_with_what_they_are() -> None:
    empty_words = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert [file for file in TREES if empty_words & set(Path(file).with_suffix("").parts)] == []
    assert [file for file, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_launch_files_have_no_logic_of_their_own() -> None:
    logic = (ast.ClassDef, ast.For, ast.While)
    launch = {file: tree for file, tree in TREES.items() if file.startswith("launch")}
    assert [file for file, tree in launch.items() if any(isinstance(node, logic) for node in ast.walk(tree))] == []


def test_nothing_is_unpickled_and_no_error_is_swallowed_bare() -> None:
    safe = {"allow_pickle": False, "weights_only": True}
    wrong = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in safe:
                wrong += [(file, node.arg)] * (getattr(node.value, "value", None) is not safe[node.arg])
            wrong += [(file, "except:")] * (isinstance(node, ast.ExceptHandler) and node.type is None)
        wrong += [(file, name) for name in imports(tree) if name.startswith(("pickle.load", "dill", "cloudpickle"))]
    assert wrong == []
