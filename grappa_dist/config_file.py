"""A config from a YAML file and `key=value` overrides, and errors that name the key, the value and what is right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grappa_dist.config import Config


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file and `key.sub=value` overrides (values are YAML).

    Raises:
        ValueError: naming the key, the value found and what would be right.
    """
    try:
        tree = _Loader(Path(path).read_bytes()).get_single_data()
    except FileNotFoundError:
        raise ValueError(f"config {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"config {path} must be a mapping of sections, got {type(tree).__name__}")
    return read(tree, overrides)


def read(tree: dict[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The config of a tree of settings, with overrides, which are written into it; errors as of `load`."""
    for override in overrides:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(map(_describe, error.errors()[:3]))) from error


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must look like section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent!r} is not a section")
        node = child
    try:
        node[leaf] = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from error


def _describe(problem: Mapping[str, Any]) -> str:
    branch = re.compile(r"constrained-|\w+\[")  # pydantic also names which side of "this or that" it tried
    where = ".".join(str(part) for part in problem["loc"] if not branch.match(str(part)))
    if problem["type"] == "extra_forbidden":
        known = sorted(_fields(problem["loc"][:-1]))
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if where == "mirror":
        return f"{where}={problem['input']!r}: must be s3://<bucket>/<prefix> or gs://<bucket>/<prefix>"
    if problem["type"] == "string_pattern_mismatch":
        return f"{where}={problem['input']!r}: must be <module>:<function>, or timm:<model> for a backbone"
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    return message if problem["type"] == "value_error" else f"{where}={problem['input']!r}: {message}"


def _fields(loc: Iterable[str | int]) -> set[str]:
    section: Any = Config
    for part in loc:
        section = section.model_fields[part].annotation
    return set(section.model_fields)
