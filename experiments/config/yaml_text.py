"""YAML in which no key stands twice: YAML itself would take the last and say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

STRICTER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""What it refuses, the parser of the command line refuses too; of what both do, the other names the line better."""


def load(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        ValueError: a key stands twice, or a value holds itself; it names the key, and the lines.
        yaml.YAMLError: it is no YAML.
    """
    value = yaml.safe_load(text)
    yaml.load(text, Loader=STRICTER)
    twice = next(duplicates(text), None)
    if twice is not None:
        key, first, second = twice
        where = f"at lines {first} and {second}" if first != second else f"in line {first}"
        raise ValueError(f"{key} stands twice, {where}; leave one out")
    return value


def duplicates(text: str) -> Iterator[tuple[str, int, int]]:
    """Keys that stand twice in one mapping, with their path, and the two lines, counted from 1.

    Raises:
        ValueError: a value holds itself.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        yield from _duplicates(root, "", frozenset(), set())


def _duplicates(node: yaml.Node, path: str, above: frozenset[int], seen: set[int]) -> Iterator[tuple[str, int, int]]:
    if id(node) in above:
        raise ValueError(f"{path} holds itself, in line {node.start_mark.line + 1}")
    if id(node) in seen:  # by an alias; what aliases of aliases say grows without bounds
        return
    seen.add(id(node))
    above |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for number, inner in enumerate(node.value):
            yield from _duplicates(inner, f"{path}.{number}" if path else str(number), above, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            inner_path = f"{path}.{name}" if path else name
            if (key.tag, name) in lines and key.tag != "tag:yaml.org,2002:merge":
                yield inner_path, lines[key.tag, name], line
            lines.setdefault((key.tag, name), line)
            yield from _duplicates(value, inner_path, above, seen)
