"""Values of `label` and `task` as programs write them: which are none, and which are the same."""

from __future__ import annotations

import json

import pytest

from grappa_dist.data.labels import LONGEST, Names, named

SAME = [
    ('"a"', '" a "', '"a\\n"', '"\\u00a0a"', '"\\ufeffa"', '["a"]', '[["a"]]'),
    ("1", "1.0", '"1"', '"1.0"', '"1."', '" 1 "', "[1]", "1e0", "10e-1"),
    ("0", "-0.0", "-0", '"0"', '"-0"', '"0.0"', "0.0"),
    ("-2", "-2.0", '"-2"', '"-2.0"'),
    ('"caf\\u00e9"', '"cafe\\u0301"'),
    ("0.5", '"0.5"', "5e-1"),
    ("true", '"true"'),
    ("9007199254740991", "9007199254740991.0", '"9007199254740991"'),
]
DIFFERENT = ['"a"', '"A"', '"b"', "1", '"01"', '"1.5"', "0", "-2", "10", '"1e0"', '"nano"', '"Nan"', '"none"', '"NA"']
DIFFERENT += ["true", "false", '"a b"', '"a  b"', '"2.0.1"', '"\\uff11"', "1e300", "123456789012345678901"]
NONE = [
    "null",
    "[]",
    "[[]]",
    "[1, 2]",
    '{"a": 1}',
    "{}",
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "-1.0",
    '"-1"',
    '"-1.0"',
]
NONE += ['""', '"  "', '"\\t\\n"', '"\\u200b"', '"nan"', '"NaN"', '"<NA>"', '"None"', '"null"', "[null]", "1e999"]
NONE += [f'"{"x" * (LONGEST + 1)}"', "9" * (LONGEST + 1)]


@pytest.mark.parametrize("texts", SAME)
def test_one_class_is_one_in_all_ways_of_writing(texts: tuple[str, ...]) -> None:
    names = {named(json.loads(text)).name for text in texts}
    assert len(names) == 1
    assert None not in names


def test_what_differs_stays_different() -> None:
    names = [named(json.loads(text)).name for text in DIFFERENT]
    assert None not in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:20])
def test_what_is_no_label_is_none(text: str) -> None:
    found = named(json.loads(text))
    assert found.name is None
    assert bool(found.remark) == (text not in ("null", "[null]"))


def test_a_name_is_that_of_one_rule_applied_twice() -> None:
    for text in (*DIFFERENT, *(text for texts in SAME for text in texts)):
        name = named(json.loads(text)).name
        assert named(name).name == name


def test_numbers_follow_first_appearance_and_names_are_shown_as_first_written() -> None:
    names = Names()
    values = [1.0, "b", 1, float("nan"), "", -1, " b", None, "B"]
    assert [names.number(value) for value in values] == [0, 1, 0, -1, -1, -1, 1, -1, 2]
    assert names.shown == ["1.0", "b", "B"]
    lines = names.described("label")
    assert lines[0].startswith("3 images have a label that counts as none (1 NaN, 1 blank, 1 -1)")
    assert lines[1].startswith("2 label names are written in several ways and count as one each, such as 1.0 and 1;")
    assert names.number(1, within="other") == 3


def test_plain_names_give_no_line() -> None:
    names = Names()
    assert [names.number(value) for value in ("a", "b", "a", None)] == [0, 1, 0, -1]
    assert names.described("label") == []
