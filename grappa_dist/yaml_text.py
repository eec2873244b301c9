"""YAML of settings, parsed with limits: keys given twice are refused, and texts that grow or nest beyond measure."""

from __future__ import annotations

from typing import Any

import yaml

from grappa_dist.output import without_secrets

MOST_VALUES, MOST_DEPTH = 100_000, 50  # aliases written out


def parse(text: bytes | str) -> Any:
    """What a text holds; None if it is empty.

    Raises:
        yaml.YAMLError: it is no YAML, or beyond the limits.
    """
    return _Loader(text).get_single_data()


def describe(error: yaml.YAMLError) -> str:
    """Why a text was refused, in one line."""
    why = " ".join(str(error).replace(' in "<byte string>",', " in").split())
    if isinstance(error, yaml.reader.ReaderError):
        return f"it is no text in UTF-8 ({why})"
    if "'\\t' that cannot start" in why:
        why += "; YAML is indented by spaces, not tabs"
    return without_secrets(why)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would silently drop the first, and texts that grow or nest."""

    _depth = 0

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        try:
            return self.construct_document(node)
        except ValueError as error:  # of a date or number that is none
            raise yaml.MarkedYAMLError(problem=str(error)) from None

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The values of a node, as often as aliases repeat them.

    Args:
        counts: of the nodes that were counted before, by id; 0 while one is being counted.
    """
    if id(node) not in counts:
        counts[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [n for part in parts for n in (part if isinstance(part, tuple) else (part,))]
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in flat)
        if counts[id(node)] > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} values", problem_mark=node.start_mark)
    if not counts[id(node)]:
        raise yaml.MarkedYAMLError(problem="an alias within what it names", problem_mark=node.start_mark)
    return counts[id(node)]
