"""The sections of a run's configuration, and what their values may be."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from experiments.config.run_config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainingConfig,
)
from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from models.selector_config import SelectorConfig
from sparse_trainer.sparsity_config import SparsityConfig

RECORDS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "sparsity": SparsityConfig,
    "selector": SelectorConfig,
    "losses": LossConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
}


OPTIONAL = ("sparsity", "selector")
"""Sections that null switches off."""


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Turn the ValueError of a part into a :class:`ConfigError` of one line that names the section."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_with_section(section, str(error))) from error


def _with_section(section: str, message: str) -> str:
    """Put ``section.`` before every key that a record's problems begin with."""
    names = leaves(RECORDS[section]) if section in RECORDS else {}
    problems = []
    for line in message.split("\n"):
        if not line.strip():
            continue
        if names:
            pattern = rf"(^|; )(?=(?:{'|'.join(map(re.escape, names))})\b)"
            line = re.sub(pattern, rf"\g<1>{section}.", line)
        problems.append(line.strip())
    text = "; ".join(problems)
    return text if re.match(rf"{section}\b", text) else f"{section}: {text}"


def _record_type(hint: Any) -> type | None:
    """The dataclass in a type hint such as ``SparsityConfig | None``."""
    candidates = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def leaves(record: type, prefix: str = "") -> dict[str, Any]:
    """Type hints of all values by dotted key."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(record)
    for item in dataclasses.fields(record):
        hint = hints[item.name]
        inner = _record_type(hint)
        if inner is None:
            found[prefix + item.name] = hint
        else:
            found.update(leaves(inner, f"{prefix}{item.name}."))
    return found


def in_words(hint: Any) -> str:
    """A type hint as a user would say it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(in_words(inner) for inner in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"a list such as [{'a, b' if str in inner else '0.5, 0.5'}]"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a mapping such as {depth: 6}",
        types.NoneType: "null",
    }
    return words.get(origin or hint, str(hint))


def check_values(section: str, given: Mapping[str, Any]) -> None:
    """Refuse null where no null is meant, and numbers that are not finite. The records of the packages beside this one
    see to that themselves.

    Raises:
        ConfigError: naming all of them.
    """
    problems = []
    if section in OPTIONAL:
        return
    hints = leaves(RECORDS[section])
    for name in given.keys() & hints.keys():
        value, hint = given[name], hints[name]
        if value is None and types.NoneType not in typing.get_args(hint):
            problems.append(f"{section}.{name}: null is not {in_words(hint)}; leave the key out for its default")
        odd = _not_finite(value, f"{section}.{name}")
        problems += [f"{key}: {number!r} is not a finite number" for key, number in odd]
    if problems:
        raise ConfigError("; ".join(sorted(problems)))


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """NaN and infinity, wherever they stand in a value, with their keys."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _not_finite(inner, f"{key}.{number}")


def check_section(section: str, value: Any) -> None:
    """Refuse what is no mapping of keys in the place of a section.

    Raises:
        ConfigError: naming the keys that there are.
    """
    if not isinstance(value, Mapping) and not (value is None and section in OPTIONAL):
        keys = ", ".join(item.name for item in dataclasses.fields(RECORDS[section]))
        raise ConfigError(f"{section}: {value!r} is not a section with keys such as {keys}")
