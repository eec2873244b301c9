from __future__ import annotations

import re
from pathlib import Path

import pytest

from grappa_dist.functions import check_arguments, import_function


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def other(): ...", "the module {module} has no 'make'"),
        ("make = [1]", "'make' is of type list, expected a function"),
        ("import no_such_package", "No module named 'no_such_package', which {module} imports"),
        ("def make(:", "importing {module} raised SyntaxError: invalid syntax ("),
        ("raise SystemExit(3)", "importing {module} raised SystemExit: 3 ("),
    ],
)
def test_what_cannot_be_called_is_refused_by_the_name_of_its_setting(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    module = "of_a_setting_" + re.sub(r"\W", "_", request.node.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(ValueError, match=re.escape(f"some.setting={module}:make: {words.format(module=module)}")):
        import_function("some.setting", f"{module}:make")


def test_arguments_are_held_against_those_of_the_function() -> None:
    assert import_function("some.setting", "builtins:len") is len
    check_arguments("some.kwargs", import_function("some.setting", "json:dumps"), {"obj": 1})
    check_arguments("some.kwargs", dict, {"any": 1})  # a function of C that tells nothing
    with pytest.raises(ValueError, match=r"some\.kwargs: missing a required argument: 'obj'"):
        check_arguments("some.kwargs", import_function("some.setting", "json:dumps"), {})
