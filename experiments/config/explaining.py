"""What a parser refuses, said in one line that names the key, the value and what would work."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from experiments.config.records import RECORDS, in_words, leaves
from experiments.config.run_config import RunConfig


def explain(
    error: str,
    parser: ArgumentParser,
    arguments: Iterable[str],
    contents: Iterable[Mapping[str, Any]] = (),
    sections: Sequence[str] = ("recipe", *RECORDS),
) -> str:
    """One line for what a parser refused in a command line or in the contents of files.

    Unknown keys are found here and not in the parser's text, since it does not say what is close to them.

    Args:
        sections: those parts of :class:`RunConfig` that the parser knows.
    """
    known = {key: hint for key, hint in leaves(RunConfig).items() if key.split(".")[0] in sections}
    extra = {action.dest for action in parser._actions}
    given = [a[2:].split("=", 1)[0] for a in arguments if a.startswith("--")]
    for content in contents:
        given.extend(_keys(content))
    unknown = [key for key in given if not _is_known(key, known, extra)]
    if unknown:
        ours = sorted(dest.replace("_", "-") for dest in extra if re.fullmatch(r"(?!help|print)\w+", dest))
        options = [dest for dest in ours if dest not in sections]
        return "; ".join(_unknown_key(key, known, options) for key in dict.fromkeys(unknown))
    choice = re.search(r"argument --([\w.-]+): invalid choice: '?(.*?)'? \(choose from (.*)\)", error)
    if choice is not None:
        key = choice.group(1) if choice.group(1) in known else f"--{choice.group(1)}"
        return f"{key}: {choice.group(2)!r} is not one of {choice.group(3).replace(chr(39), '')}"
    keys = list(re.finditer(r'[Kk]ey "([^"]+)"', error))
    key = ".".join(match.group(1) for match in keys)
    value = re.search(r"(?:Given|Got) value: (.*)", error[keys[-1].end() :]) if keys else None
    if key in known and value is not None:
        return f"{key}: {value.group(1).strip()!r} is not {in_words(known[key])}"
    if value is not None and (simple := re.search(r"Expected a <class '(int|float|bool|str)'>", error)):
        kind = {"int": int, "float": float, "bool": bool, "str": str}[simple.group(1)]
        return f"--{key.replace('_', '-')}: {value.group(1).strip()!r} is not {in_words(kind)}"
    return " ".join(error.split())


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{key}.")
        else:
            yield key


def _is_known(key: str, leaves: Mapping[str, Any], extra: set[str]) -> bool:
    if key in leaves or key.replace("-", "_") in extra:
        return True
    return any(key.startswith(f"{leaf}.") and typing.get_origin(hint) is dict for leaf, hint in leaves.items())


def _unknown_key(key: str, leaves: Mapping[str, Any], options: Sequence[str]) -> str:
    section, _, last = key.rpartition(".")
    if section in RECORDS:
        there = [leaf for leaf in leaves if leaf.startswith(f"{section}.")]
        close = difflib.get_close_matches(key, there, n=1, cutoff=0.8)
    else:
        there = list(dict.fromkeys([*(leaf.split(".")[0] for leaf in leaves), *options]))
        close = difflib.get_close_matches(section or key, there, n=1)
    if not close:  # the right name in the wrong section, or without one
        names = {leaf.rsplit(".", 1)[-1]: leaf for leaf in reversed(list(leaves))}
        close = [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.8)]
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
    return f"{key}: unknown key; {hint}"
