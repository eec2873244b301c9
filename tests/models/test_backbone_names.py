"""What is found out about a backbone of a user's own without importing it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.models import create_backbone
from grappa_dist.models.backbone import check_name

SOURCE = """
raise AssertionError("this module is not imported to be checked")
import os.path as place
from math import *
def create(dim, *, depth=2): ...
def any_of(**kwargs): ...
class Vit: ...
if place:
    def of_branch(): ...
other, (last,) = create, (1,)
def outer():
    def inner(): ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module of its own for each test: paths of modules are remembered."""
    name = "own_" + re.sub(r"\W", "_", request.node.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{name}.py").write_text(SOURCE.replace("from math import *\n", ""))
    return name


@pytest.mark.parametrize("function", ["any_of", "Vit", "of_branch", "other", "last", "place"])
def test_a_name_that_a_module_binds_is_accepted(function: str, module: str) -> None:
    check_name(f"{module}:{function}")


def test_a_name_that_nothing_binds_is_refused_with_those_of_functions(module: str, tmp_path: Path) -> None:
    for function in ("creat", "inner", "dim"):
        with pytest.raises(ValueError, match=f"py has no '{function}'; its functions: create, any_of, of"):
            check_name(f"{module}:{function}")
    path = tmp_path / f"{module}.py"
    for more in ("from math import *", "def __getattr__(name): ...", "globals().update(creat=1)"):
        path.write_text(f"{SOURCE}{more}\n")
        check_name(f"{module}:creat")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "backbone.kwargs={} lacks dim"),
        ({"dim": 3, "width": 4}, "has width, which it does not take"),
        ({"dim": 3, "depth": 4}, ""),
    ],
)
def test_arguments_are_held_against_those_of_the_function(kwargs: dict[str, Any], words: str, module: str) -> None:
    check_name(f"{module}:any_of", kwargs)
    if not words:
        check_name(f"{module}:create", kwargs)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        check_name(f"{module}:create", kwargs)


def test_what_is_no_python_is_refused_by_its_line(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("def create(:\n")
    with pytest.raises(ValueError, match=r"py is no Python: line 1: invalid syntax"):
        check_name(f"{module}:create")
    with pytest.raises(ValueError, match=rf"importing {module} raised SyntaxError: invalid syntax \(.*py, line 1\)"):
        create_backbone(f"{module}:create", {}, {})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_package", "No module named 'no_such_package', which {module} imports"),
        ("1 / 0", "importing {module} raised ZeroDivisionError: division by zero ("),
        ("import sys; sys.exit(3)", "importing {module} raised SystemExit: 3 ("),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(
    source: str, words: str, module: str, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text(f"{source}\ndef create(): ...\n")
    with pytest.raises(ValueError, match=re.escape(words.format(module=module))) as caught:
        create_backbone(f"{module}:create", {}, {})
    if source.startswith("import no_such_package"):
        with pytest.raises(ValueError, match=re.escape(str(caught.value))):
            check_name(f"{module}:create")
    else:
        check_name(f"{module}:create")


@pytest.mark.parametrize(
    ("source", "kind"),
    [("create = 3", "of type int"), ("create: list = [1]", "of type list"), ("async def create(): ...", "a coroutine")],
)
def test_what_is_no_function_is_refused_without_importing_it(
    source: str, kind: str, module: str, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text(f"1 / 0\n{source}\n")
    with pytest.raises(ValueError, match=f"'create' is {kind}.*, expected a function"):
        check_name(f"{module}:create")
    (tmp_path / f"{module}.py").write_text(f"{source}\ndef create(): ...\n")
    check_name(f"{module}:create")


def test_a_package_that_a_module_can_do_without_is_no_fault(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("try:\n    import no_such_package\nexcept ImportError: ...\ncreate = len\n")
    check_name(f"{module}:create")


def test_a_package_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("1 / 0\n")
    (tmp_path / "broken_package" / "vit.py").write_text("def create(): ...\n")
    with pytest.raises(ValueError, match="importing its package raised ZeroDivisionError: division by zero"):
        check_name("broken_package.vit:create")


@pytest.mark.parametrize("name", ["timm:crossvit_9_240", "timm:hf-hub:someone/model"])
def test_models_of_timm_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"CrossVit\.patch_embed is a ModuleList, expected one|has no such model"):
        create_backbone(name, {}, {}, pretrained=False)
