from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.structure import (
    LINES,
    MODULES,
    MOST_FUNCTION_LINES,
    MOST_LINES,
    MOST_SHORT_MODULES,
    PACKAGE,
    ROOT,
    TREES,
    functions,
    imported_modules,
    imports,
    name_of,
    short_modules,
)

LEVELS = (  # a part imports parts of lower levels, and files of its own
    ("__init__",),
    ("pipeline", "plan"),
    ("layout", "export"),
    ("report",),
    ("stages",),
    ("training",),
    ("models", "knn", "demo"),
    ("kmeans", "make_shards"),
    ("data", "distributed"),
    ("metrics", "artifacts"),
    ("search", "config", "console", "files", "prefetch", "_compat"),
)
DISTRIBUTED = ("ray", "deepspeed", "torch.distributed", "faiss")
MAY_DISTRIBUTE = (
    "grappa_dist/distributed/",
    "grappa_dist/training/deepspeed_engine.py",
    "grappa_dist/kmeans/ivf.py",
    "grappa_dist/search/backends.py",
    "benchmarks/",
    "examples/",
)
WHOLE = ["house_rules", "packaging", "public_api", "docs"]  # tests of no single module


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: search, models, config, ..."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def test_a_part_imports_only_parts_of_lower_levels() -> None:
    level = {part: i for i, parts in enumerate(LEVELS) for part in parts}
    wrong = []
    for file in PACKAGE:
        own = part_of(name_of(file))
        for module in imported_modules(file):
            part = part_of(module)
            allowed = part == own or level[part] > level[own]
            wrong += [(file, module)] * (not allowed or not module.startswith("grappa_dist"))
    assert wrong == []
    assert [(file, name) for file, tree in TREES.items() for name in imports(tree) if name.startswith(".")] == []


def test_files_import_each_other_in_no_circle() -> None:
    left = {name_of(file): imported_modules(file) for file in PACKAGE}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert left == {}


def test_only_what_runs_on_several_processes_imports_what_distributes() -> None:
    wrong = []
    for file, tree in TREES.items():
        found = [m for m in imports(tree) if any(f"{m}.".startswith(f"{name}.") for name in DISTRIBUTED)]
        wrong += [(file, module) for module in found if not file.startswith(MAY_DISTRIBUTE)]
    assert wrong == []


def test_files_and_functions_are_not_too_long() -> None:
    assert [function for function in functions() if function.lines > MOST_FUNCTION_LINES] == []
    assert {file: lines for file, lines in LINES.items() if lines > MOST_LINES} == {}


def test_few_modules_are_short_and_none_of_these_has_a_single_importer() -> None:
    short = short_modules("grappa_dist")
    assert len(short) <= MOST_SHORT_MODULES
    importers = Counter(module for file in TREES for module in imported_modules(file))
    assert [file for file in short if importers[name_of(file)] == 1] == []


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


def test_tests_mirror_the_package() -> None:
    """Each is named after the module that it tests, and perhaps a topic; other folders are tests of the whole."""
    wrong = []
    for folder in ("grappa_dist", "benchmarks", "examples"):
        below = ROOT / "tests" / ("" if folder == "grappa_dist" else folder)
        for place in {Path(file).parent.relative_to(folder) for file in TREES if file.startswith(f"{folder}/")}:
            modules = [path.stem for path in (ROOT / folder / place).glob("*.py")] + WHOLE
            for test in (below / place).glob("test_*.py"):
                topic = test.stem.removeprefix("test_")
                wrong += [test.name] * (not any(topic == m or topic.startswith(f"{m}_") for m in modules))
    assert wrong == []


@pytest.mark.parametrize("folder", ["grappa_dist", "benchmarks", "examples"])
def test_every_module_is_imported_by_a_test_or_by_one_that_is(folder: str) -> None:
    tested = {name for path in (ROOT / "tests").rglob("*.py") for name in imports(ast.parse(path.read_text()))}
    reached = {module for module in MODULES if any(f"{name}.".startswith(f"{module}.") for name in tested)}
    while more := {m for file in TREES if name_of(file) in reached for m in imported_modules(file)} - reached:
        reached |= more
    assert [m for m in sorted(MODULES) if m.startswith(folder) and m not in reached] == []
