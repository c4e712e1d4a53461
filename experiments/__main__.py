"""The command line: ``sparse-trainer COMMAND ...``, the same as ``python -m experiments COMMAND ...``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

COMMANDS = {
    "train": "train a sparse Vision Transformer from a recipe",
    "shrink": "a trained network made small and fast",
    "evaluate": "accuracy of a sparse checkpoint",
    "predict": "what a sparse checkpoint sees in images",
    "export": "a sparse checkpoint in other formats",
    "inspect": "what is in a sparse checkpoint or a run",
    "benchmark": "measure speed and memory",
}


def commands() -> dict[str, str]:
    """The sub-commands of this release and what they do."""
    return {name: text for name, text in COMMANDS.items() if find_spec(f"experiments.commands.{name}") is not None}


def with_home(argument: str) -> str:
    """``--config=~/my.yaml`` or ``"~/runs"`` with the home folder, which a shell puts in only where a word begins."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Only the module of the sub-command is imported."""
    arguments = sys.argv[1:] if arguments is None else arguments
    there = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, there))
        lines = [f"  {name:<{width}}  {text}" for name, text in there.items()]
        print(
            "\n".join(["usage: sparse-trainer COMMAND ...", "", *lines, "", "sparse-trainer COMMAND --help says more"])
        )
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sparse-trainer {metadata.version('sparse-trainer')}")
        return 0
    command, *rest = map(with_home, arguments)
    if command not in there:
        close = difflib.get_close_matches(command, there, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
        print(f"sparse-trainer: error: unknown command {command!r}; {hint}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"experiments.commands.{command}")
    except KeyboardInterrupt:  # the libraries take seconds to load
        return 130
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
