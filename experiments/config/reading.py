"""A run's configuration from YAML files and dotted overrides, and back.

jsonargparse reads and merges files and the command line; the dataclasses of :mod:`experiments.config.run_config` check
themselves when they are built. Whatever is wrong becomes one :class:`~experiments.errors.ConfigError` of one line that
names the key, the value and what would work.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from experiments.config import yaml_text
from experiments.config.explaining import explain
from experiments.config.field_docs import field_docs
from experiments.config.records import RECORDS, check_section, check_values, naming
from experiments.config.run_config import OutputConfig, RunConfig
from experiments.errors import ConfigError

DEFAULT_RECIPE = "quickstart"


def recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    folder = resources.files("experiments.config") / "recipes"
    return {
        Path(str(item)).stem: Path(str(item))
        for item in sorted(folder.iterdir(), key=str)
        if item.name.endswith(".yaml")
    }


def find_config(name: str) -> Path:
    """The file that ``name`` means: a path, or the name of a recipe.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipes()
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"--config: {name} is no file and no recipe; {hint}recipes: {', '.join(known)}")


def create_parser(command: str) -> ArgumentParser:
    """A parser for all of :class:`RunConfig` as ``--config FILE`` and dotted options."""
    parser = ArgumentParser(
        prog=f"sparse-trainer {command}",
        description="Train a sparse Vision Transformer under one exact budget.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file or name of a recipe ({', '.join(recipes())}); without one: {DEFAULT_RECIPE}. Of "
        "several the later wins; options win over files.",
    )
    parser.add_class_arguments(RunConfig)
    explain_options(parser)
    return parser


def explain_options(parser: ArgumentParser) -> None:
    """Give every dotted option the text that stands under its field."""
    texts = field_docs(RunConfig)
    for section, record in RECORDS.items():
        texts |= {f"{section}.{name}": text for name, text in field_docs(record).items()}
    # The parser lists no options of a section that may be null.
    for section, null in (("sparsity", "null trains the dense network."), ("selector", "null looks at all tokens.")):
        inner = [f"--{key}: {text}" for key, text in texts.items() if key.startswith(f"{section}.")]
        texts[section] = " ".join([null, *inner])
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")


def _expand_config_names(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The files behind ``--config`` in order, and the command line with them in front: overrides win over files
    wherever they stand."""
    rest: list[str] = []
    files: list[Path] = []
    waiting = False
    for argument in arguments:
        if waiting or argument.startswith("--config="):
            files.append(find_config(argument if waiting else argument.removeprefix("--config=")))
            waiting = False
        elif argument == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise ConfigError("--config: needs a file or the name of a recipe")
    return [*(f"--config={path}" for path in files), *rest], files


def last_option(arguments: Sequence[str], key: str) -> str | None:
    """The last value of ``--key`` on a command line, before it is parsed; None if it is not there."""
    value = None
    for argument, after in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == f"--{key}":
            value = after
        elif argument.startswith(f"--{key}="):
            value = argument.partition("=")[2]
    return value


def read_output(arguments: Sequence[str]) -> tuple[OutputConfig, str | None]:
    """Where a run writes, and the name of its recipe where the line names a file; nothing else need fit together yet.

    What the line holds against a run that is not known yet (``--data.root`` of a run with folders) is no mistake.

    Raises:
        ConfigError: a file cannot be read, or these settings are wrong.
    """
    _, files = _expand_config_names(arguments)
    recipe, found = None, dict[str, Any]()
    for path in files:
        content = _read_yaml(path)
        found |= content.get("output") or {}
        recipe = content.get("recipe") or path.stem
    inline = last_option(arguments, "output")
    if inline is not None:
        try:
            found |= yaml_text.load(inline) or {}
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"output: {inline!r} is not a mapping such as {{name: long}}") from error
    for name in ("runs", "name"):
        given = last_option(arguments, f"output.{name}")
        if given is not None:
            found[name] = given
    return build({"output": found}).output, recipe


def parse(parser: ArgumentParser, arguments: Sequence[str], *, base: Path | None = None) -> tuple[RunConfig, Namespace]:
    """Read files and overrides.

    Args:
        parser: of :func:`create_parser`, with more options or without.
        arguments: the command line after the sub-command.
        base: configuration where the command line names none; by default the quick start.

    Returns:
        The configuration, named after the last file, and all parsed values.

    Raises:
        ConfigError: with all problems of all sections on one line.
    """
    expanded, files = _expand_config_names(arguments)
    if not files:
        files = [base or recipes()[DEFAULT_RECIPE]]
        expanded = [f"--config={files[0]}", *expanded]
    contents = [_read_yaml(path) for path in files]
    contents += _read_inline(expanded)
    try:
        parsed = parser.parse_args(expanded)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, expanded, contents)) from error
    config = build(parsed.as_dict())
    return (config if config.recipe else dataclasses.replace(config, recipe=files[-1].stem)), parsed


def load_config(path: Path) -> RunConfig:
    """The configuration in a file, with nothing changed.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return parse(create_parser("train"), ["--config", str(path)])[0]


def build(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from plain values by section; missing ones take their defaults.

    Raises:
        ConfigError: with all problems of all sections on one line.
    """
    sections: dict[str, Any] = {"recipe": values.get("recipe") or ""}
    problems = []
    for section, record in RECORDS.items():
        if section not in values:
            continue
        given = values[section]
        if given is None or isinstance(given, record):
            sections[section] = given
            continue
        known = {item.name for item in dataclasses.fields(record)}
        try:
            check_values(section, given)
            with naming(section):
                sections[section] = record(**{key: value for key, value in given.items() if key in known})
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return RunConfig(**sections)


def to_yaml(config: RunConfig) -> str:
    """YAML that :func:`parse` reads back into an equal configuration."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def flatten(config: RunConfig) -> dict[str, Any]:
    """All values by dotted key; a section that is switched off is None under its name."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from walk(inner, f"{key}.{name}" if key else name)
        else:
            yield key, value

    return dict(walk(_plain(dataclasses.asdict(config)), ""))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml_text.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place is not None else ""
        raise ConfigError(f"--config: {path} is not YAML{where}") from error
    if content is None or content == {}:
        raise ConfigError(
            f"--config: {path} is empty; give sections such as model and training, or leave it out for {DEFAULT_RECIPE}"
        )
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} holds {type(content).__name__}, not sections such as model and training")
    for section in RECORDS:
        check_section(section, content.get(section, {}))
    return content


def _read_inline(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Sections that stand on the line as mappings, as in ``--data={batch_size: 16}``.

    Raises:
        ConfigError: a key stands twice in such a mapping, there or in ``--model.kwargs={depth: 6, depth: 8}``; or a
            section is no mapping.
    """
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        key = option.removeprefix("--")
        whole = key in RECORDS and option != argument
        if not whole and not value.strip().startswith("{"):
            continue
        try:
            content = yaml_text.load(value)
        except yaml.YAMLError:  # the parser says what is wrong
            continue
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        if whole:
            check_section(key, content)
            found.append({key: content})
    return found
