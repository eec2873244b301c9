from __future__ import annotations

import ast
import os
import re
from collections import Counter
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from grappa_dist.cli.main import VERBS
from grappa_dist.gpu_check.checks import CHECKS
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
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("bench", "gpu_check", "fitted", "seeds", "serving", "formats", "integrations"),
    ("pipeline", "plan", "clean", "doctor", "status", "retrieval", "run_models"),
    ("estimate", "defaults"),
    ("layout", "export", "rates"),
    ("report",),
    ("stages",),
    ("training",),
    ("models", "knn", "demo", "inputs"),
    ("kmeans", "make_shards", "verdict"),
    ("data", "distributed"),
    ("metrics", "significance", "artifacts"),
    ("lease", "class_ranks", "checksums"),
    ("bucket",),
    ("search", "config", "console", "files", "functions", "prefetch", "lack_of_memory", "_compat"),
    ("bars", "yaml_text", "object_store", "variants"),
    ("output", "storage", "extras", "progress"),
)
DISTRIBUTED = ("ray", "deepspeed", "torch.distributed", "faiss")
MAY_DISTRIBUTE = (
    "grappa_dist/distributed/",
    "grappa_dist/training/deepspeed_engine.py",
    "grappa_dist/kmeans/ivf.py",
    "grappa_dist/search/backends.py",
    "grappa_dist/serving/ray_serve.py",
    "grappa_dist/retrieval/faiss_index.py",  # the file that `embed --index` writes is faiss's own
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
    loaders = {"np.load": "allow_pickle", "torch.load": "weights_only", "timm.models.load_state_dict": "weights_only"}
    wrong = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in safe:
                wrong += [(file, node.arg)] * (getattr(node.value, "value", None) is not safe[node.arg])
            may_load = isinstance(node, ast.Call) and file in PACKAGE and last_name(node) in ("load", "load_state_dict")
            if isinstance(node, ast.Call) and may_load and (needed := loaders.get(ast.unparse(node.func))):
                wrong += [(file, ast.unparse(node))] * (needed not in {keyword.arg for keyword in node.keywords})
            wrong += [(file, "except:")] * (isinstance(node, ast.ExceptHandler) and node.type is None)
        wrong += [(file, name) for name in imports(tree) if name.startswith(("pickle.load", "dill", "cloudpickle"))]
    assert wrong == []


def last_name(call: ast.Call) -> str:
    """What is called, without what it is looked up in; "" where that has no name."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def test_text_files_are_utf_8_whatever_the_locale() -> None:
    trees = {file: tree for file, tree in TREES.items() if file.startswith(("grappa_dist/", "launch/"))}
    of_cluster = (ROOT / "cluster").rglob("*.py")
    trees |= {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in of_cluster}
    wrong = []
    for file, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = last_name(call)
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            is_text = name in ("read_text", "write_text") or (
                name in ("open", "fdopen")
                and ast.unparse(call.func) in ("open", "os.fdopen")
                and not any("b" in mode for mode in modes)
            )
            named = {keyword.arg for keyword in call.keywords}
            wrong += [(file, ast.unparse(call))] * (is_text and "encoding" not in named)
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


def is_slow(decorated: ast.AST) -> bool:
    """Whether `make test` leaves it out."""
    marks = {node.attr for node in ast.walk(decorated) if isinstance(node, ast.Attribute)}
    return bool(marks & {"slow", "long", "cluster"})


def has_fast_test(tree: ast.Module) -> bool:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and is_slow(node.value):
            return False
    tests = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    whole = (
        [mark for mark in test.decorator_list if not isinstance(mark, ast.Call)] for test in tests
    )  # not of one case
    return any(not any(is_slow(mark) for mark in marks) for marks in whole)


@cache
def modules_of_fast_tests() -> frozenset[str]:
    """The modules that fast tests import."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
    names = {name for tree in trees if has_fast_test(tree) for name in imports(tree)}
    return frozenset(names | {name.rpartition(".")[0] for name in names}) & MODULES.keys()


@pytest.mark.parametrize("folder", ["grappa_dist", "benchmarks", "examples"])
def test_every_module_is_imported_by_a_test_of_make_test_or_by_a_module_that_is(folder: str) -> None:
    by_name = {
        "grappa_dist.__main__",
        "grappa_dist.cli",
        *(f"grappa_dist.cli.{verb}" for verb in VERBS),  # tests/cli/test_main.py
        *(f"grappa_dist.gpu_check.{check.function.partition(':')[0]}" for check in CHECKS),  # tests/gpu_check
    }
    reached = set(modules_of_fast_tests()) | by_name & MODULES.keys()
    while more := {m for file in TREES if name_of(file) in reached for m in imported_modules(file)} - reached:
        reached |= more
    assert [m for m in sorted(MODULES) if m.startswith(folder) and m not in reached] == []


RETIRED = {  # what is said in place of what; docs/words.md. Names on disk stay: "truth", "packs/", the key "lost"
    "bf16, micro-batches": r"\bhalves\b|\bHal(f|ves)[A-Z]",
    "error bound, score margin": r"\bgaps? (of|between) pairs|\b_?gaps\b(?!\.$| in)|\bGaps\b",
    "threshold": r"\bsift\w*|\bfloors\b",
    "candidates, generate": r"\b[Pp]ropos\w+",
    "competitors, unresolved, nearest": r"\brivals?\b|\bcrowd\w*|\bwho[_ ](may[_ ])?wins?\b",
    "satisfies its error bound": r"\bkeeps?[_ ]its[_ ]word",
    "ShardedRows": r"\bclass Share\b|: Share\b",
    "distributed top-k select": r"\bclass Cut\b|\bdef lowest\b",
    "D^2 weights": r"\b[Rr]ow[_ ]?[Ww]eights\b",
    "single group": r"\bone[_ ]group\b",
    "checkpoint": r"\btrail\b|_trail\b|\bTrail\b",
    "callback, logger": r"\bTold\b|\bAudience\b|\b(is|are|was) told\b|\bhears?\b|\b(say|tell)[=:]|\.say\(",
    "sharded module": r"\bclass Beside\b",
    "baseline": r"\b[Jj]udge[sd]?_?\b",
    "ground truth": r"(?<!ground[ _-])(?<!Ground )\b(?!truth-)truth\b(?!\")|\bTRUTH_",
    "attention statistics": r"\bAttentionWatch|\bwatching\b",
    "describe_, format_": r"\bin[_ ]words\b",
    "memory budget, capacity, space": r"\b[Rr]oom\b",
    "automatic batch size": r"\bfitting\b(?! \()",
    "current model": r"of the moment",
    "default, left out of the fingerprint": r"goe?s? without saying",
    "multi-set job": r"(?<!struct\.)(?<![\"/])\bpacks?\b(?![/\"(.])",
    "pluralize": r"\bcounted\(",
    "release": r"\blet[_ ]go\b",
    "missing images": r"\blost[_ ](images?|files?)\b|\bclass (Lost|Loss)\b",
    "make_shards": r"data[./]making\b",
    "generate the demo data set": r"\bdraws? (a|the) collection|draw_collection|has_drawn",
    "waiting for slower ranks": r"\blong[_ ]work\b",
    "randomly initialised adaptor sets": r"\bown[_ ]sets\b|\bset of its own\b",
}
PROSE = ("*.py", "*.md", "*.yaml", "*.toml", "*.sh", "Makefile")


@cache
def prose() -> list[tuple[str, str]]:
    """Every line of code and documents, with where it stands."""
    own = {ROOT / "docs" / "words.md", Path(__file__)}
    skipped = {".venv", ".venv-oldest", ".git", "runs", "shards", "build", "wheels"}
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - skipped)
        for path in (Path(folder, name) for name in sorted(names) if any(fnmatch(name, kind) for kind in PROSE)):
            if path not in own:
                lines = path.read_text(encoding="utf-8").splitlines()
                found += [(f"{path.relative_to(ROOT)}:{number}", line) for number, line in enumerate(lines, 1)]
    return found


@pytest.mark.parametrize("instead", RETIRED)
def test_retired_words_do_not_come_back(instead: str) -> None:
    word = re.compile(RETIRED[instead])
    assert [f"{where}: {line.strip()}" for where, line in prose() if word.search(line)] == []
